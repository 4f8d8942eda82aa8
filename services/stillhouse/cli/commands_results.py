"""Commands that show what a job did, and fetch what it made. Nothing of ours is imported before one runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stillhouse.cli.options import (
    RESULTS,
    AsJson,
    AsJsonLines,
    Checkpoint,
    IsSure,
    JobId,
    group,
    propose_checkpoints,
    propose_jobs,
    words,
)

checkpoints_app = group("List the checkpoints of a job, mark one as the best, delete one.")
letters_app = group("List the samples that a job gave up, and try them again.")
Follow = Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (events, logs, metrics, evaluations, samples):
        app.command(rich_help_panel=RESULTS)(command)
    app.add_typer(letters_app, name="dead-letters", rich_help_panel=RESULTS)
    app.add_typer(checkpoints_app, name="checkpoints", rich_help_panel=RESULTS)
    for command in (download, report, plot, compare):
        app.command(rich_help_panel=RESULTS)(command)


def events(job: JobId, follow: Follow = False, as_json: AsJsonLines = False) -> None:
    """Print what happened to a job, oldest first.

    Example:  stillhouse events job_3f9c0a12b4d5e6f70819 --follow
    """
    from stillhouse.cli import history

    history.show_events(job, is_followed=follow, as_json=as_json)


def logs(
    job: JobId,
    service: Annotated[str, typer.Option(help="Only sampler, teacher, trainer or gateway.")] = "",
    tail: Annotated[int, typer.Option("--tail", "-n", min=0, max=10_000, help="Lines from the end.")] = 100,
    follow: Follow = False,
    as_json: AsJsonLines = False,
) -> None:
    """Print what the services wrote about a job.

    Example:  stillhouse logs job_3f9c0a12b4d5e6f70819 --service trainer --follow
    """
    from stillhouse.cli import history

    history.show_logs(job, service=service, tail=tail, is_followed=follow, as_json=as_json)


def metrics(
    job: JobId,
    names: Annotated[str, typer.Option(help="Names, separated by commas; `all` = a list of what there is.")] = "",
    step_from: Annotated[int, typer.Option("--from", min=0, help="First step.")] = 0,
    step_to: Annotated[int | None, typer.Option("--to", min=0, help="Last step.", show_default=False)] = None,
    points: Annotated[int, typer.Option(min=1, max=10_000, help="Most rows; each is a mean over its steps.")] = 20,
    as_json: AsJsonLines = False,
) -> None:
    """Print the metrics of a job's steps.

    Example:  stillhouse metrics job_3f9c0a12b4d5e6f70819 --names loss/reverse_kl/mean,lr --from 10
    """
    from stillhouse.cli import history

    history.show_metrics(job, words(names), step_from=step_from, step_to=step_to, points=points, as_json=as_json)


def evaluations(job: JobId, as_json: AsJson = False) -> None:
    """Print the held-out evaluations of a job: as a whole, and by teacher and domain.

    Example:  stillhouse evaluations job_3f9c0a12b4d5e6f70819
    """
    from stillhouse.cli import history

    history.show_evaluations(job, as_json=as_json)


def samples(
    job: JobId,
    step: Annotated[int | None, typer.Option(min=1, help="Only of this step.", show_default=False)] = None,
    teacher: Annotated[str, typer.Option(help="Only those that this teacher judged, in its words.")] = "",
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=1000, help="How many.")] = 3,
    top: Annotated[int, typer.Option(min=0, max=100, help="Explain so many tokens of each: the most disputed.")] = 3,
    as_json: AsJsonLines = False,
) -> None:
    """Show texts that a job trained on, each token coloured by how much student and teacher disagree about it.

    Red: the student found it likelier than the teacher does, and unlearns it. Blue: the other way round. Where there
    are no colours, such tokens stand in brackets with their difference in nats.

    Example:  stillhouse samples job_3f9c0a12b4d5e6f70819 --step 12 --top 5
    """
    from stillhouse.cli import samples as implementation

    implementation.show(job, step=step, teacher=teacher, limit=limit, top=top, as_json=as_json)


@letters_app.command("ls")
def letters_ls(job: JobId, as_json: AsJson = False) -> None:
    """List the samples that a job gave up, and why. Its steps went on without them.

    Example:  stillhouse dead-letters job_3f9c0a12b4d5e6f70819
    """
    from stillhouse.cli import history

    history.show_dead_letters(job, as_json=as_json)


@letters_app.command("retry")
def letters_retry(
    job: JobId,
    ids: Annotated[list[str] | None, typer.Argument(metavar="[SAMPLE]...", help="Ids; none = all.")] = None,
    as_json: AsJson = False,
) -> None:
    """Put samples that were given up on their queue again, while their step is still being collected.

    Exit code 1 if one could not be.

    Example:  stillhouse dead-letters retry job_3f9c0a12b4d5e6f70819 12/0
    """
    from stillhouse.cli import history

    history.retry_dead_letters(job, ids or [], as_json=as_json)


@checkpoints_app.command("ls")
def checkpoints_ls(job: JobId, as_json: AsJson = False) -> None:
    """List the checkpoints of a job, the finished student last.

    Example:  stillhouse checkpoints job_3f9c0a12b4d5e6f70819
    """
    from stillhouse.cli import checkpoints as implementation

    implementation.show(job, as_json=as_json)


@checkpoints_app.command("best")
def checkpoints_best(
    job: JobId,
    checkpoint: Checkpoint,
    undo: Annotated[bool, typer.Option("--undo", help="Take the mark back.")] = False,
    as_json: AsJson = False,
) -> None:
    """Mark a checkpoint as the best: it is kept.

    Example:  stillhouse checkpoints best job_3f9c0a12b4d5e6f70819 ckpt_1-00000020-5d0e3a77
    """
    from stillhouse.cli import checkpoints as implementation

    implementation.mark(job, checkpoint, is_best=not undo, as_json=as_json)


@checkpoints_app.command("delete")
def checkpoints_delete(job: JobId, checkpoint: Checkpoint, yes: IsSure = False, as_json: AsJson = False) -> None:
    """Delete a checkpoint that nobody needs any more.

    Example:  stillhouse checkpoints delete job_3f9c0a12b4d5e6f70819 ckpt_1-00000010-9b1f00c2 --yes
    """
    from stillhouse.cli import checkpoints as implementation

    implementation.delete(job, checkpoint, is_sure=yes, as_json=as_json)


def download(
    job: JobId,
    checkpoint: Annotated[
        str,
        typer.Option(
            help="Id of a checkpoint.  [default: the finished student]",
            show_default=False,
            autocompletion=propose_checkpoints,
        ),
    ] = "",
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder to write, or a file *.tar; must not exist.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Download the finished student, or a checkpoint, as a folder. A download that was cut off goes on where it was.

    Example:  stillhouse download job_3f9c0a12b4d5e6f70819 -o student-v2
    """
    from stillhouse.cli import checkpoints as implementation

    implementation.download(job, checkpoint=checkpoint, output=output, as_json=as_json)


def report(
    job: JobId,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write it: a page (.html) or JSON (.json).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a job was, cost and reached; with -o as a page that is complete in itself.

    Example:  stillhouse report job_3f9c0a12b4d5e6f70819 -o report.html
    """
    from stillhouse.cli import report as implementation

    implementation.report(job, output, as_json=as_json)


def plot(
    jobs: Annotated[
        list[str],
        typer.Argument(metavar="JOB...", help="One job, or several on one figure.", autocompletion=propose_jobs),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Picture to write: .png, .svg or .pdf.")] = Path(
        "curves.png"
    ),
    names: Annotated[str, typer.Option(help="Metrics to draw, separated by commas.  [default: the usual]")] = "",
    as_json: AsJson = False,
) -> None:
    """Draw the curves of jobs: reverse KL, loss, learning rate, speed, mismatch, held-out measures.

    Example:  stillhouse plot job_3f9c0a12b4d5e6f70819 job_77ab0c12d4e5f6a70b18 -o curves.png
    """
    from stillhouse.cli import plot as implementation

    implementation.draw(jobs, output, words(names), as_json=as_json)


def compare(
    job: Annotated[str, typer.Argument(metavar="A", help="Id of a job.", autocompletion=propose_jobs)],
    other: Annotated[str, typer.Argument(metavar="B", help="Id of another.", autocompletion=propose_jobs)],
    as_json: AsJson = False,
) -> None:
    """Compare two jobs: what differs in what was asked for, held-out measures, last metrics, what they cost.

    Example:  stillhouse compare job_3f9c0a12b4d5e6f70819 job_77ab0c12d4e5f6a70b18
    """
    from stillhouse.cli import compare as implementation

    implementation.compare(job, other, as_json=as_json)
