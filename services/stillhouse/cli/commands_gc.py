"""`stillhouse gc`: take away what nobody needs. Nothing of ours is imported before it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stillhouse.cli.options import MACHINE


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(rich_help_panel=MACHINE)(gc)


def gc(
    job: Annotated[
        str, typer.Argument(metavar="[JOB]", help="Only this job.  [default: all]", show_default=False)
    ] = "",
    is_dry: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    artifacts: Annotated[
        Path | None,
        typer.Option(help="Artifacts folder that holds jobs/.  [default: that of this deployment]", show_default=False),
    ] = None,
    older_than: Annotated[
        float, typer.Option(min=0, metavar="DAYS", help="Old checkpoints only of jobs that ended so long ago.")
    ] = 0.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for other programs.")] = False,
) -> None:
    """Delete old checkpoints of ended jobs, and what crashed processes left behind.

    Of an ended job the checkpoints stay that its `checkpoint.keep_last` and `keep_best` ask for, two that verify at
    least; the finished student, journals and history always stay. Of a running job only goes what it can never need:
    checkpoints of trainers that had lost it. Half-written files go when they are an hour old.

    Works without services, and beside them.

    Example:  stillhouse gc --dry-run
    """
    from stillhouse.cli import gc as implementation

    implementation.collect(job, is_dry=is_dry, artifacts=artifacts, older_than_days=older_than, as_json=as_json)
