"""Commands about jobs. Nothing of ours is imported before one runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

PANEL = "Models and jobs"
JobId = Annotated[str, typer.Argument(metavar="JOB", help="Id of a job, as `submit` and `jobs` print it.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for other programs.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (submit, watch, jobs, job, events, dead_letters, cancel, download, plot):
        app.command(rich_help_panel=PANEL)(command)


def submit(
    file: Annotated[Path, typer.Argument(help="Job file, YAML or JSON.")],
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Watch it to its end.")] = False,
    name: Annotated[str, typer.Option(help="Name of the job, instead of the file's.")] = "",
) -> None:
    """Check a job file, upload its prompts (`data.path`) and start the job.

    With --watch the exit code is the job's: 0 succeeded, 1 failed, 2 cancelled; 4 = could not watch. Ctrl-C leaves the
    job running.

    Example:  stillhouse submit examples/quickstart/job.yaml --watch
    """
    from stillhouse.cli import jobs as implementation

    implementation.submit(file, name=name, is_watched=watch)


def watch(job: JobId, as_json: AsJson = False) -> None:
    """Follow a job: steps, speed, reverse KL, what it waits for. Survives restarts of the gateway.

    Lines instead of a screen when the output is no terminal. Exit code: 0 succeeded, 1 failed, 2 cancelled,
    4 could not watch (no such job, or no answer for ten minutes), 130 Ctrl-C.

    Example:  stillhouse watch job_3f9c0a12b4d5e6f70819
    """
    from stillhouse.cli import jobs as implementation

    implementation.watch(job, as_json=as_json)


def jobs(
    limit: Annotated[int, typer.Option(min=1, max=100, help="How many, newest first.")] = 20, as_json: AsJson = False
) -> None:
    """List jobs, newest first.

    Example:  stillhouse jobs --limit 5
    """
    from stillhouse.cli import jobs as implementation

    implementation.show_jobs(limit=limit, as_json=as_json)


def job(job: JobId, as_json: AsJson = False) -> None:
    """Show one job: status, progress, evaluations, result.

    Example:  stillhouse job job_3f9c0a12b4d5e6f70819 --json
    """
    from stillhouse.cli import jobs as implementation

    implementation.show_job(job, as_json=as_json)


def events(
    job: JobId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print what happened to a job, oldest first.

    Example:  stillhouse events job_3f9c0a12b4d5e6f70819 --follow
    """
    from stillhouse.cli import jobs as implementation

    implementation.show_events(job, follow=follow, as_json=as_json)


def dead_letters(job: JobId, as_json: AsJson = False) -> None:
    """List the samples that a job gave up, and why. Its steps went on without them.

    Example:  stillhouse dead-letters job_3f9c0a12b4d5e6f70819
    """
    from stillhouse.cli import jobs as implementation

    implementation.show_dead_letters(job, as_json=as_json)


def cancel(job: JobId) -> None:
    """Ask a job to stop. What it has committed stays.

    Example:  stillhouse cancel job_3f9c0a12b4d5e6f70819
    """
    from stillhouse.cli import jobs as implementation

    implementation.cancel(job)


def download(
    job: JobId,
    checkpoint: Annotated[str, typer.Option(help="Id of a checkpoint.  [default: the finished student]")] = "",
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder to write; must not exist.")] = None,
) -> None:
    """Download the finished student, or a checkpoint, as a folder.

    Example:  stillhouse download job_3f9c0a12b4d5e6f70819 -o student-v2
    """
    from stillhouse.cli import jobs as implementation

    implementation.download(job, checkpoint=checkpoint, output=output)


def plot(
    job: JobId,
    output: Annotated[Path, typer.Option("-o", "--output", help="Picture to write: .png, .svg or .pdf.")] = Path(
        "curves.png"
    ),
) -> None:
    """Draw the curves of a job: reverse KL, loss, learning rate, speed, mismatch.

    Example:  stillhouse plot job_3f9c0a12b4d5e6f70819 -o curves.png
    """
    from stillhouse.cli import jobs as implementation

    implementation.plot(job, output)
