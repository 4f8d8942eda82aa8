"""Environments for TRL and Liger, which never enter the project's: under build/, made when first needed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
TORCH: Final = "torch==2.13.0"


@dataclass(frozen=True)
class Environment:
    """What a benchmark imports beside the project."""

    name: str
    """Of its folder; NAME_PYTHON is the variable that names another Python which has it."""
    module: str
    """That tells it from others."""
    packages: tuple[str, ...]
    """Installed without their requirements."""
    needed: tuple[str, ...]
    """What they and the project's losses import."""

    def enter(self) -> None:
        """Continue in this environment: replaces the process unless it runs there already."""
        if importlib.util.find_spec(self.module) is None:
            default = ROOT / "build" / self.name / "bin" / "python"
            python = Path(os.environ.get(f"{self.name.upper()}_PYTHON", default))
            if Path(sys.prefix) == python.parent.parent:
                raise SystemExit(
                    f"{python} has no {self.module}, its installation was cut short: "
                    f"remove {sys.prefix} and start again"
                )
            if not python.exists():
                self._make(python)
            os.execv(python, [str(python), *sys.argv])
        sys.path.insert(0, str(ROOT / "services"))

    def _make(self, python: Path) -> None:
        folder = python.parent.parent
        print(f"installing {TORCH} and {', '.join(self.packages)} into {folder} ...", file=sys.stderr)
        venv.create(folder, with_pip=True, clear=True)

        def pip(*args: str) -> None:
            command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *args]
            subprocess.run(command, check=True, cwd=ROOT)

        # torch first, as the machine has it (CPU or CUDA): the packages' own requirements might bring another
        pip(TORCH)
        pip("-c", "constraints.txt", *self.needed)
        pip("--no-deps", *self.packages)


TRL: Final = Environment(
    name="trl",
    module="trl",
    packages=("trl==1.16.0",),
    needed=("numpy", "transformers", "accelerate", "datasets", "pydantic", "pyyaml", "protobuf", "matplotlib"),
)
LIGER: Final = Environment(
    name="liger",
    module="liger_kernel",
    packages=("liger-kernel==0.8.5", "triton"),
    needed=("numpy", "packaging", "structlog"),
)
