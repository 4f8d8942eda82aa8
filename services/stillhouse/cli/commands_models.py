"""Commands about models. Nothing of ours is imported before one runs."""

from __future__ import annotations

from typing import Annotated

import typer

from stillhouse.cli.options import PROVISIONS

models_app = typer.Typer(help="Name the models that jobs may use.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.add_typer(models_app, name="models", rich_help_panel=PROVISIONS)


@models_app.command("add")
def add(
    name: Annotated[str, typer.Argument(help="Name that jobs use.")],
    path: Annotated[
        str, typer.Argument(help="Model folder (safetensors), JOB_ID[/ckpt_...], or OWNER/MODEL[@REV] of the hub.")
    ],
    source: Annotated[str, typer.Option(help="Where it came from; a note for people.")] = "",
) -> None:
    """Check a model and give it a name. Its files are pinned by sha256.

    Example:  stillhouse models add teacher ./qwen3-1.7b
    """
    from stillhouse.cli import models

    models.add(name, path, source)


@models_app.command("ls")
def ls(as_json: Annotated[bool, typer.Option("--json", help="Print JSON for other programs.")] = False) -> None:
    """List the models. Equal values in the column `tokenizer` can be student and teacher of one job.

    Example:  stillhouse models ls
    """
    from stillhouse.cli import models

    models.show(as_json=as_json)


@models_app.command("rm")
def rm(name: Annotated[str, typer.Argument(help="Name of the model.")]) -> None:
    """Forget a model; its files stay.

    Example:  stillhouse models rm teacher
    """
    from stillhouse.cli import models

    models.remove(name)
