"""Models and prompts of the example: the base is student and one of its teachers; two tasks have an expert."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from toys import models, tasks

EXPERTS: Final = ("reverse", "upper")
SELF: Final = "digits"
"""The task for which there is no better model than the student."""


def prepare(folder: Path, *, short: bool = False) -> None:
    """The base and two experts; what exists stays."""
    base = models.base(folder / "base", short=short)
    for task in EXPERTS:
        models.expert(base, folder / f"expert-{task}", task, short=short)


def write_data(folder: Path) -> None:
    """Training and held-out prompts, the domains in turn."""
    for name, count, held_out in (("prompts", 120, False), ("heldout", 40, True)):
        groups = [tasks.rows(task, count, 3, held_out=held_out, teacher=task) for task in EXPERTS]
        groups.append(tasks.rows(SELF, count, 3, held_out=held_out, teacher="self"))
        tasks.write(folder / f"{name}.jsonl", tasks.in_turn(groups))
