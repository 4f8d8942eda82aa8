"""The light parts work without torch: each is imported in a fresh process, which then looks at `sys.modules`."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import pytest

import stillhouse

HEAVY = ("torch", "transformers", "vllm", "safetensors")
LIGHT_PACKAGES = ("stillhouse.core", "stillhouse.gateway", "stillhouse.client", "stillhouse.cli", "stillhouse.v1")
LIGHT_MODULES = (
    "stillhouse.trainer.app",
    "stillhouse.trainer.lead",
    "stillhouse.trainer.learner",
    "stillhouse.trainer.loop",
    "stillhouse.trainer.node",
    "stillhouse.trainer.run",
    "stillhouse.sampler.app",
    "stillhouse.teacher.app",
)


def light_modules() -> list[str]:
    names = list(LIGHT_MODULES)
    for package in LIGHT_PACKAGES:
        module = __import__(package, fromlist=["_"])
        names += [info.name for info in pkgutil.walk_packages(module.__path__, package + ".")]
    return [name for name in names if not name.endswith("__main__")]


def test_light_modules_leave_the_heavy_ones_alone() -> None:
    code = (
        "import importlib, sys\n"
        f"for name in {light_modules()!r}:\n"
        "    importlib.import_module(name)\n"
        f"    heavy = [heavy for heavy in {HEAVY!r} if heavy in sys.modules]\n"
        "    assert not heavy, f'{name} imports {heavy}'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_check_can_fail() -> None:
    """Negative control: a leaf module does import torch."""
    code = "import stillhouse.trainer.engine, sys; assert 'torch' not in sys.modules"
    with pytest.raises(subprocess.CalledProcessError):
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60, stderr=subprocess.DEVNULL)


@pytest.mark.parametrize("package", [info.name for info in pkgutil.iter_modules(stillhouse.__path__)])
def test_init_files_are_empty(package: str) -> None:
    module = __import__(f"stillhouse.{package}", fromlist=["_"])
    assert module.__file__ is not None
    with open(module.__file__) as file:
        assert file.read() == ""
