"""`stillhouse recipes` and `stillhouse init`. Nothing of ours is imported before a command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stillhouse.cli.options import PROVISIONS


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (recipes, init):
        app.command(rich_help_panel=PROVISIONS)(command)


def recipes(
    name: Annotated[str, typer.Argument(help="A recipe, to explain.  [default: a table of all]")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for other programs.")] = False,
) -> None:
    """Explain the published methods that a stage may name (`recipe: NAME`): what for, every value, its source.

    Example:  stillhouse recipes glm5
    """
    from stillhouse.cli import recipes as implementation

    implementation.show(name, as_json=as_json)


def init(
    name: Annotated[str, typer.Argument(help="A recipe, as `stillhouse recipes` lists them.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="File to write; - prints it.", show_default=True)
    ] = Path("job.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Write a job file for a recipe, with a comment on every value. Fill in models and prompts, then submit it.

    Example:  stillhouse init gkd -o job.yaml
    """
    from stillhouse.cli import recipes as implementation

    implementation.init(name, output, is_forced=force)
