"""Models and prompts of the example: one base, and an expert for each of the ten tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from toys import models, tasks

ROOM: Final = 2
"""The teacher has memory for so many of the ten experts at once."""


def prepare(folder: Path, *, short: bool = False) -> None:
    """The base and ten experts; what exists stays."""
    base = models.base(folder / "base", short=short)
    for task in tasks.TASKS:
        models.expert(base, folder / f"expert-{task}", task, short=short)


def write_data(folder: Path) -> None:
    """Training and held-out prompts, the tasks in turn, each routed to the expert for it."""
    for name, count, held_out in (("prompts", 40, False), ("heldout", 12, True)):
        groups = [tasks.rows(task, count, 1, held_out=held_out, teacher=task) for task in tasks.TASKS]
        tasks.write(folder / f"{name}.jsonl", tasks.in_turn(groups))
