"""Commands that start, follow and steer jobs. Nothing of ours is imported before one runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stillhouse.cli.options import JOBS, AsJson, AsJsonLines, IsSure, JobId, propose_checkpoints

JobFile = Annotated[Path, typer.Argument(metavar="FILE", help="Job file, YAML or JSON.", show_default=False)]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (submit, validate, jobs, job, watch, cancel, pause, resume, retry, delete):
        app.command(rich_help_panel=JOBS)(command)
    app.command("show", hidden=True)(job)


def submit(
    file: JobFile,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Watch it to its end.")] = False,
    name: Annotated[str, typer.Option(help="Name of the job, instead of the file's.")] = "",
    as_json: AsJson = False,
) -> None:
    """Check a job file, upload its prompts (`data.path`) and start the job.

    With --watch the exit code is the job's: 0 succeeded, 1 failed, 2 cancelled; 4 = could not watch. Ctrl-C leaves the
    job running.

    Example:  stillhouse submit examples/quickstart/job.yaml --watch
    """
    from stillhouse.cli import jobs as implementation

    implementation.submit(file, name=name, is_watched=watch, as_json=as_json)


def validate(
    file: JobFile,
    live: Annotated[bool, typer.Option("--live", help="Load the models and probe them; takes minutes.")] = False,
    all_checks: Annotated[bool, typer.Option("--all", help="Also list what is in order.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check a job without starting it: each check with verdict, evidence and fix, and what the job will cost.

    Exit code: 0 = it may run (there may be warnings), 1 = it would be refused, 2 = the file is no job.

    Example:  stillhouse validate job.yaml --live
    """
    from stillhouse.cli import preflight

    preflight.validate(file, is_live=live, shows_all=all_checks, as_json=as_json)


def jobs(
    status: Annotated[str, typer.Option(help="Only jobs with this status, for example running.")] = "",
    owner: Annotated[str, typer.Option(help="Only jobs of this owner; for administrators.")] = "",
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="How many, newest first.")] = 20,
    after: Annotated[str, typer.Option(help="Only jobs behind this one in the list.", metavar="JOB")] = "",
    oldest_first: Annotated[bool, typer.Option("--oldest-first", help="Turn the list around.")] = False,
    as_json: AsJson = False,
) -> None:
    """List jobs, newest first.

    Example:  stillhouse jobs --status running --limit 5
    """
    from stillhouse.cli import jobs as implementation

    filters = {"status": status or None, "owner": owner or None, "limit": limit, "after": after}
    implementation.show_jobs(**filters, order="asc" if oldest_first else "desc", as_json=as_json)


def job(job: JobId, as_json: AsJson = False) -> None:
    """Show one job: status, progress, evaluations, checkpoints, result. `show` is the same.

    Example:  stillhouse job job_3f9c0a12b4d5e6f70819 --json
    """
    from stillhouse.cli import jobs as implementation

    implementation.show_job(job, as_json=as_json)


def watch(job: JobId, as_json: AsJsonLines = False) -> None:
    """Follow a job: steps, speed, reverse KL, what it waits for. Survives restarts of the gateway.

    Lines instead of a screen when the output is no terminal. Exit code: 0 succeeded, 1 failed, 2 cancelled,
    4 could not watch (no such job, or no answer for ten minutes), 130 Ctrl-C.

    Example:  stillhouse watch job_3f9c0a12b4d5e6f70819
    """
    from stillhouse.cli import jobs as implementation

    implementation.watch(job, as_json=as_json)


def cancel(job: JobId, as_json: AsJson = False) -> None:
    """Ask a job to stop. What it has committed stays.

    Example:  stillhouse cancel job_3f9c0a12b4d5e6f70819
    """
    from stillhouse.cli import jobs as implementation

    implementation.steer(job, "cancel", as_json=as_json)


def pause(job: JobId, as_json: AsJson = False) -> None:
    """Stop a job after its step, with a checkpoint. Its trainer, samplers and teachers are free for others.

    Example:  stillhouse pause job_3f9c0a12b4d5e6f70819
    """
    from stillhouse.cli import jobs as implementation

    implementation.steer(job, "pause", as_json=as_json)


def resume(job: JobId, as_json: AsJson = False) -> None:
    """Let a paused job go on where it stopped.

    Example:  stillhouse resume job_3f9c0a12b4d5e6f70819
    """
    from stillhouse.cli import jobs as implementation

    implementation.steer(job, "resume", as_json=as_json)


def retry(
    job: JobId,
    checkpoint: Annotated[
        str,
        typer.Option(
            help="Go on from this one.  [default: the newest that is whole]",
            show_default=False,
            autocompletion=propose_checkpoints,
        ),
    ] = "",
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Watch the new job to its end.")] = False,
    as_json: AsJson = False,
) -> None:
    """Start a new job that goes on from a checkpoint of one that ended: weights, optimizer, step, place in the data.

    Example:  stillhouse retry job_3f9c0a12b4d5e6f70819 --watch
    """
    from stillhouse.cli import jobs as implementation

    implementation.retry(job, checkpoint=checkpoint, is_watched=watch, as_json=as_json)


def delete(job: JobId, yes: IsSure = False, as_json: AsJson = False) -> None:
    """Delete a job that has ended, with its checkpoints and all else that it made.

    Example:  stillhouse delete job_3f9c0a12b4d5e6f70819 --yes
    """
    from stillhouse.cli import jobs as implementation

    implementation.delete(job, is_sure=yes, as_json=as_json)
