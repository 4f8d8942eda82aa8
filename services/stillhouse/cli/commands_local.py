"""Commands about this machine: up, down, ps, doctor, healthcheck, version. Nothing of ours is imported before one
runs.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from stillhouse.cli.deployment import Deployment

PANEL = "This machine"
Home = Annotated[
    Path | None,
    typer.Option(help="Folder of the deployment.  [default: STILLHOUSE_HOME or ~/.stillhouse]", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for other programs.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(rich_help_panel=PANEL)(up)
    app.command(rich_help_panel=PANEL)(down)
    app.command(rich_help_panel=PANEL)(ps)
    app.command(rich_help_panel=PANEL)(doctor)
    app.command(rich_help_panel=PANEL)(healthcheck)
    app.command(rich_help_panel=PANEL)(version)


def up(
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return when everything is ready.")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the REST interface; 0 = any free one.")] = 8470,
    samplers: Annotated[int, typer.Option(min=1, max=64, help="Sampler processes.")] = 1,
    teachers: Annotated[int, typer.Option(min=1, max=64, help="Teacher processes.")] = 1,
    trainers: Annotated[int, typer.Option(min=1, max=64, help="Trainer processes: jobs that run at once.")] = 1,
    trainer_ranks: Annotated[
        int,
        typer.Option(min=0, max=1024, help="Processes that split a trainer's student; 0 = the setting trainer_ranks."),
    ] = 0,
    threads: Annotated[
        int, typer.Option(min=0, max=1024, help="Compute threads per process; 0 = the cores shared out.")
    ] = 0,
    sampler_engine: Annotated[
        str, typer.Option(help="transformers or vllm.  [default: the setting engine]", show_default=False)
    ] = "",
    teacher_engine: Annotated[
        str, typer.Option(help="transformers or vllm.  [default: the setting engine]", show_default=False)
    ] = "",
    only: Annotated[
        str, typer.Option(help="teacher = neither samplers nor trainers: a server for scores.", show_default=False)
    ] = "",
    hang: Annotated[
        float, typer.Option(min=0.0, hidden=True, help="Restart what is silent for so many seconds; 0 = never.")
    ] = 15.0,
    home: Home = None,
) -> None:
    """Start the queue server and all services on this machine.

    Ctrl-C stops them; with --detach, `stillhouse down` does. What dies or freezes is started again. Logs: HOME/logs.

    Example:  stillhouse up --detach --samplers 2;  stillhouse up --only teacher
    """
    from stillhouse.cli import up as implementation

    options = implementation.UpOptions(
        port, samplers, teachers, trainers, trainer_ranks, threads, sampler_engine, teacher_engine, only, hang
    )
    implementation.up(_deployment(home), options, detach=detach)


def down(home: Home = None) -> None:
    """Stop what `up` started. Jobs continue at the next `up`.

    Example:  stillhouse down
    """
    from stillhouse.cli import down as implementation

    implementation.down(_deployment(home))


def ps(as_json: AsJson = False, home: Home = None) -> None:
    """Show what runs on this machine: pids, state, restarts, memory.

    Example:  stillhouse ps --json
    """
    from stillhouse.cli import ps as implementation

    implementation.show(_deployment(home), as_json=as_json)


def doctor(as_json: AsJson = False, home: Home = None) -> None:
    """Check this machine: packages, memory, disk, ports, models. Exit code 1 if something needed is missing.

    Example:  stillhouse doctor
    """
    from stillhouse.cli import doctor as implementation

    implementation.doctor(_deployment(home), as_json=as_json)


def healthcheck(
    address: Annotated[
        str, typer.Argument(metavar="ADDRESS", help="HOST:PORT of a gRPC service, or the gateway's http://HOST:PORT.")
    ],
    service: Annotated[str, typer.Argument(help="Full name of a service; none = the process.")] = "",
    timeout_s: Annotated[float, typer.Option(min=0.1, help="Wait so long for the answer, seconds.")] = 3.0,
) -> None:
    """Ask a service for its health. Exit code 0 = it serves.

    Example:  stillhouse healthcheck 127.0.0.1:9001 stillhouse.v1.SamplerService
    """
    from stillhouse.cli import healthcheck as implementation
    from stillhouse.cli.console import say

    say(implementation.check(address, service, timeout_s))


def version() -> None:
    """Print the version.

    Example:  stillhouse version
    """
    from importlib.metadata import version as installed

    from stillhouse.cli.console import say

    say(installed("stillhouse"))


def _deployment(home: Path | None) -> Deployment:
    """The deployment, also for everything below that reads STILLHOUSE_HOME."""
    from stillhouse.cli.deployment import Deployment

    deployment = Deployment(home)
    if home is not None:
        os.environ["STILLHOUSE_HOME"] = str(deployment.home)
    return deployment
