"""Models and prompts of the example: the base, and an expert for one task."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from toys import models, tasks

TASK: Final = "sort"


def prepare(folder: Path, *, short: bool = False) -> None:
    """The base and the expert; what exists stays."""
    base = models.base(folder / "base", short=short)
    models.expert(base, folder / f"expert-{TASK}", TASK, short=short)


def write_data(folder: Path) -> None:
    """Training and held-out prompts."""
    for name, count, held_out in (("prompts", 320, False), ("heldout", 64, True)):
        tasks.write(folder / f"{name}.jsonl", tasks.rows(TASK, count, 4, held_out=held_out))
