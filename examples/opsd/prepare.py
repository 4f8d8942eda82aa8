"""Models and prompts of the example: one model, which has learned to use a hint where it is given one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from toys import models, tasks

TASK: Final = "left"


def prepare(folder: Path, *, short: bool = False) -> None:
    """The base, and the base after it read hints; what exists stays."""
    base = models.base(folder / "base", short=short)
    models.train(base, folder / "reader", lessons(), steps=60 if short else 200)


def lessons() -> list[dict[str, Any]]:
    """Rows of all tasks with a hint, and as many without, answered as carelessly as the base does.

    So the model can read a hint, but does no task better without one.
    """
    hinted = [with_hint(row) for task in tasks.TASKS for row in tasks.rows(task, 400, 6)]
    return hinted + tasks.careless_rows(len(hinted), 6, care=models.CARE)


def with_hint(row: dict[str, Any]) -> dict[str, Any]:
    """The row with what only the teacher reads: the right answer, as a system message."""
    messages = [{"role": "system", "content": row["answer"]}, {"role": "user", "content": row["prompt"]}]
    return row | {"teacher_prompt": messages}


def write_data(folder: Path) -> None:
    """Training and held-out prompts."""
    for name, count, held_out in (("prompts", 320, False), ("heldout", 64, True)):
        rows = [with_hint(row) for row in tasks.rows(TASK, count, 7, held_out=held_out)]
        tasks.write(folder / f"{name}.jsonl", rows)
