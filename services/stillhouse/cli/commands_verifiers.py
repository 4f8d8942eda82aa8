"""`stillhouse verifiers`: what judges completions. Nothing of ours is imported before a command runs."""

from __future__ import annotations

from typing import Annotated

import typer

from stillhouse.cli.options import PROVISIONS

verifiers_app = typer.Typer(invoke_without_command=True)
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for other programs.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.add_typer(verifiers_app, name="verifiers", rich_help_panel=PROVISIONS)


@verifiers_app.callback()
def ls(ctx: typer.Context, as_json: AsJson = False) -> None:
    """List the verifiers of this installation: what judges completions for outcome rewards.

    Example:  stillhouse verifiers
    """
    from stillhouse.cli import verifiers

    if ctx.invoked_subcommand is None:
        verifiers.show(as_json=as_json)


@verifiers_app.command("try")
def try_(
    name: Annotated[str, typer.Argument(help="Name of the verifier.")],
    text: Annotated[str, typer.Option(help="The completion to judge; - reads it from standard input.")],
    answer: Annotated[str | None, typer.Option(help="The row's reference answer.")] = None,
    row: Annotated[str, typer.Option(help="What else the row says, a JSON object.")] = "{}",
    timeout_s: Annotated[float, typer.Option(min=0.1, max=600, help="Deadline of the verdict, seconds.")] = 10.0,
    as_json: AsJson = False,
) -> None:
    """Judge one text as a trainer would: in a process of its own, with a deadline. Exit code 1 = no verdict.

    Example:  stillhouse verifiers try numeric --answer 42 --text '6 * 7 = 42'
    """
    from stillhouse.cli import verifiers

    verifiers.judge(name, text, answer, row, timeout_s, as_json=as_json)
