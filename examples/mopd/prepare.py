"""Models and prompts of the example: one base, and an expert for each of three tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from toys import models, tasks

DOMAINS: Final = ("reverse", "sort", "next")


def prepare(folder: Path, *, short: bool = False) -> None:
    """The base and three experts; what exists stays."""
    base = models.base(folder / "base", short=short)
    for task in DOMAINS:
        models.expert(base, folder / f"expert-{task}", task, short=short)


def write_data(folder: Path) -> None:
    """Training and held-out prompts, the domains in turn."""
    for name, count, held_out in (("prompts", 120, False), ("heldout", 40, True)):
        groups = [tasks.rows(task, count, 2, held_out=held_out, teacher=task) for task in DOMAINS]
        tasks.write(folder / f"{name}.jsonl", tasks.in_turn(groups))
