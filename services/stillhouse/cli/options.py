"""Arguments and options that commands share, and what the shell proposes for them. Imports nothing of ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Final

import typer
from typer.core import TyperGroup

JOBS: Final = "Jobs"
RESULTS: Final = "What a job did and made"
PROVISIONS: Final = "Models, prompts, methods"
SERVER: Final = "The deployment"
MACHINE: Final = "This machine"
"""Panels of --help."""

Proposals = list[tuple[str, str]]


def propose_jobs(incomplete: str) -> Proposals:
    """Ids of jobs, newest first."""
    from stillhouse.cli import completion

    return completion.jobs(incomplete)


def propose_checkpoints(ctx: typer.Context, incomplete: str) -> Proposals:
    """Ids of the checkpoints of the job that stands before."""
    from stillhouse.cli import completion

    return completion.checkpoints(str(ctx.params.get("job") or ""), incomplete)


def propose_models(incomplete: str) -> Proposals:
    """Names of registered models, and ids of jobs."""
    from stillhouse.cli import completion

    return completion.models(incomplete)


def propose_files(incomplete: str) -> Proposals:
    """Ids of uploaded files."""
    from stillhouse.cli import completion

    return completion.files(incomplete)


JobId = Annotated[
    str,
    typer.Argument(metavar="JOB", help="Id of a job, as `submit` and `jobs` print it.", autocompletion=propose_jobs),
]
Checkpoint = Annotated[
    str,
    typer.Argument(metavar="CHECKPOINT", help="Id, as `checkpoints` lists it.", autocompletion=propose_checkpoints),
]
Writer = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A registered model, JOB (its newest checkpoint) or JOB/ckpt_...",
        autocompletion=propose_models,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for other programs.")]
AsJsonLines = Annotated[bool, typer.Option("--json", help="Print a JSON object per line, for other programs.")]
IsSure = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


class ListByDefault(TyperGroup):
    """A group whose name alone, or followed by what is none of its commands, lists: `checkpoints JOB`, `files`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        is_named = bool(args) and (args[0] in self.commands or args[0] in ("-h", "--help"))
        is_being_typed = ctx.resilient_parsing and not args  # the shell asks what may come here
        return super().parse_args(ctx, args if is_named or is_being_typed else ["ls", *args])

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """Its commands, and what `ls` takes."""
        arguments = [param for param in self.commands["ls"].params if param.param_type_name == "argument"]
        found = super().shell_complete(ctx, incomplete)
        return found + [item for argument in arguments[:1] for item in argument.shell_complete(ctx, incomplete)]


def group(help_text: str) -> typer.Typer:
    """A group of commands, one of which is `ls`."""
    return typer.Typer(cls=ListByDefault, help=help_text)


def words(text: str) -> Sequence[str]:
    """`a,b` as a list."""
    return [word for word in (part.strip() for part in text.split(",")) if word]
