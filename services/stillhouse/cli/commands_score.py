"""`stillhouse score`. Nothing of ours is imported before it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stillhouse.cli.options import PROVISIONS


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(rich_help_panel=PROVISIONS)(score)


def score(
    model: Annotated[str, typer.Argument(help="Name of a registered model.")],
    text: Annotated[list[str] | None, typer.Option(help="A text to score; may be given several times.")] = None,
    file: Annotated[
        Path | None, typer.Option(help='JSON lines: texts, or {"prompt", "text"}; - reads standard input.')
    ] = None,
    prompt: Annotated[str, typer.Option(help="What the model reads before each --text.")] = "",
    top_k: Annotated[int, typer.Option(min=0, max=50, help="Likeliest tokens to show at each place.")] = 0,
    temperature: Annotated[float, typer.Option(min=0.05, max=10, help="Of the log-probabilities.")] = 1.0,
    dtype: Annotated[str, typer.Option(help="Type the model computes in: float32 or bfloat16.")] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines, one a text.")] = False,
) -> None:
    """Show how likely a model finds texts: one line a text, or with --top-k one line a token.

    Example:  stillhouse score teacher --prompt 'The capital of France is' --text ' Paris.' --top-k 3
    """
    from stillhouse.cli import score as implementation

    items = implementation.read_items(text or [], file, prompt)
    implementation.score(model, items, top_k=top_k, temperature=temperature, dtype=dtype, as_json=as_json)
