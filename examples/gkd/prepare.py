"""Models and prompts of the example: the base, and an expert for one task; prompts come with their right answers."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from toys import models, tasks

TASK: Final = "next"


def prepare(folder: Path, *, short: bool = False) -> None:
    """The base and the expert; what exists stays."""
    base = models.base(folder / "base", short=short)
    models.expert(base, folder / f"expert-{TASK}", TASK, short=short)


def write_data(folder: Path) -> None:
    """Training and held-out prompts; training rows have a `completion`, which off-policy steps are taken on."""
    for name, count, held_out in (("prompts", 320, False), ("heldout", 64, True)):
        rows = tasks.rows(TASK, count, 5, held_out=held_out)
        if not held_out:
            rows = [row | {"completion": row["answer"]} for row in rows]
        tasks.write(folder / f"{name}.jsonl", rows)
