"""An environment of its own for TRL, which never enters the project's: under build/, made when first needed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
TRL: Final = "trl==1.16.0"
TORCH: Final = "torch==2.13.0"
NEEDED: Final = ("numpy", "transformers", "accelerate", "datasets", "pydantic", "pyyaml", "protobuf", "matplotlib")
"""What TRL's distillation and this project's kernel import."""


def enter() -> None:
    """Continue in the environment that has TRL: replaces this process unless it runs there already."""
    if importlib.util.find_spec("trl") is None:
        python = Path(os.environ.get("TRL_PYTHON", ROOT / "build" / "trl" / "bin" / "python"))
        if Path(sys.prefix) == python.parent.parent:
            raise SystemExit(
                f"{python} has no TRL, its installation was cut short: remove {sys.prefix} and start again"
            )
        if not python.exists():
            _make(python)
        os.execv(python, [str(python), *sys.argv])
    sys.path.insert(0, str(ROOT / "services"))


def _make(python: Path) -> None:
    folder = python.parent.parent
    print(f"installing {TORCH} and {TRL} into {folder} ...", file=sys.stderr)
    venv.create(folder, with_pip=True, clear=True)

    def pip(*args: str) -> None:
        command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *args]
        subprocess.run(command, check=True, cwd=ROOT)

    # torch first, as the machine has it (CPU or CUDA): TRL's own requirement might bring another
    pip(TORCH)
    pip("-c", "constraints.txt", *NEEDED)
    pip("--no-deps", TRL)
