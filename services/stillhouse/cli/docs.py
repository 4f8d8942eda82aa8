"""All commands as data, for the page that describes them and for tests."""

from __future__ import annotations

from typing import Any

import typer

from stillhouse.cli.main import app


def commands() -> dict[str, Any]:
    """Name as typed, `checkpoints best` -> command, in the order of --help; hidden ones are left out."""
    return dict(_leaves(typer.main.get_command(app), ()))


def _leaves(command: Any, path: tuple[str, ...]) -> list[tuple[str, Any]]:
    children = getattr(command, "commands", None)
    if not children:
        return [(" ".join(path), command)]
    own = [(" ".join(path), command)] if command.callback and path else []
    found = [(name, child) for name, child in children.items() if not child.hidden]
    return own + [leaf for name, child in found for leaf in _leaves(child, (*path, name))]
