"""`stillhouse checkpoints` and `stillhouse download`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from stillhouse.cli.console import (
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    CliError,
    confirm,
    console,
    done,
    local_time,
    print_json,
    print_table,
    say,
    size,
)
from stillhouse.client.client import Client
from stillhouse.core.schemas import Checkpoint

OnProgress = Callable[[int, int | None], object]
"""(bytes so far, bytes of all; None = not known)."""


def show(job_id: str, *, as_json: bool) -> None:
    """A table of a job's checkpoints."""
    with Client() as client:
        found = client.jobs.checkpoints(job_id)
    if as_json:
        print_json(found)
    elif found:
        print_checkpoints(found)
    else:
        say(f"{job_id} has no checkpoint yet")


def print_checkpoints(checkpoints: Sequence[Checkpoint]) -> None:
    """Oldest first, the finished student last."""
    columns = ("id", "kind", ">step", "stage", ">size", "created", "")
    print_table(columns, [_row(checkpoint) for checkpoint in checkpoints])


def _row(checkpoint: Checkpoint) -> tuple[str, ...]:
    marks = [word for word, holds in (("best", checkpoint.is_best), ("kept", checkpoint.is_pinned)) if holds]
    return (
        checkpoint.id,
        checkpoint.kind,
        str(checkpoint.step),
        checkpoint.stage,
        size(checkpoint.size_bytes),
        local_time(checkpoint.created_at),
        ", ".join(marks),
    )


def mark(job_id: str, checkpoint: str, *, is_best: bool, as_json: bool) -> None:
    """Mark as the best, or take the mark back."""
    with Client() as client:
        marked = (client.jobs.mark_best if is_best else client.jobs.unmark_best)(job_id, checkpoint)
    text = "is marked as the best, and kept" if is_best else "is marked no more"
    done(f"{checkpoint} {text}", as_json=as_json, **marked.to_dict())


def delete(job_id: str, checkpoint: str, *, is_sure: bool, as_json: bool) -> None:
    """Delete a checkpoint."""
    confirm(f"Delete {checkpoint} of {job_id}?", is_sure=is_sure)
    with Client() as client:
        client.jobs.delete_checkpoint(job_id, checkpoint)
    done(f"deleted {checkpoint}", as_json=as_json, id=checkpoint, is_deleted=True)


def download(job_id: str, *, checkpoint: str, output: Path | None, as_json: bool) -> None:
    """Fetch the finished student or a checkpoint into a folder."""
    target = output or Path(f"{job_id}-{checkpoint or 'student'}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CliError(f"{target} exists already", fix="give another folder with -o", exit_code=EXIT_USAGE)
    try:
        with Client() as client, _bar(target.name) as on_progress:
            place = Path(client.jobs.download(job_id, target, checkpoint=checkpoint or None, on_progress=on_progress))
    except KeyboardInterrupt:
        print("\ncut off; the same command goes on where it stopped", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    paths = [place] if place.is_file() else [path for path in place.rglob("*") if path.is_file()]
    total = sum(path.stat().st_size for path in paths)
    if as_json:
        print_json({"path": str(place), "size_bytes": total})
        return
    say(f"{place}: {size(total)}")
    if not checkpoint and place.is_dir():
        say(f"use it in jobs: stillhouse models add NAME {place}")


@contextmanager
def _bar(name: str) -> Iterator[OnProgress]:
    """A bar on a terminal's stderr; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True))
    with Progress(*columns, TransferSpeedColumn(), TimeRemainingColumn(), console=console(stderr=True)) as progress:
        task = progress.add_task(name, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
