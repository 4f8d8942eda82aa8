"""Prints what pyproject.toml asks for, one requirement a line: the dependencies, and those of extras that are named.

    python docker/dependencies.py gateway transformers > requirements.txt

An image installs them in a layer below the source, so that a change of the source does not install them again. Standard
library only: it runs before anything is installed.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

OWN = re.compile(r"stillhouse\[([\w,-]+)\]$")
"""An extra that consists of other extras."""


def requirements(project: dict[str, object], extras: list[str]) -> list[str]:
    """Requirements of the package and of extras, extras within extras resolved."""
    optional: dict[str, list[str]] = project["optional-dependencies"]  # type: ignore[assignment]
    found: list[str] = list(project["dependencies"])  # type: ignore[call-overload]
    for extra in extras:
        for requirement in optional[extra]:
            own = OWN.match(requirement)
            found += requirements(project, own.group(1).split(",")) if own else [requirement]
    return list(dict.fromkeys(found))


if __name__ == "__main__":
    pyproject = Path(__file__).resolve().parents[1] / "pyproject.toml"
    print("\n".join(requirements(tomllib.loads(pyproject.read_text())["project"], sys.argv[1:])))
