"""Models and prompts of the example: a base, and a teacher that can think before it answers and can answer at once.

The base has the skills but little care which one is asked for. A thought of the teacher says that: the task's name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from toys import models, tasks

TASKS: Final = ("copy", "digits", "sort", "upper")
"""What the teacher learns."""
ASKED: Final = ("copy", "upper")
"""What the student is asked: few tasks, so that minutes suffice."""
MODES: Final = {"thinking": True, "direct": False}
"""Name of the teacher in the job, and what its rows tell the chat template."""


def prepare(folder: Path, *, short: bool = False) -> None:
    """The base and the teacher; what exists stays."""
    base = models.base(folder / "base", short=short)
    models.train(base, folder / "thinker", lessons(), steps=60 if short else 240)


def lessons() -> list[dict[str, Any]]:
    """Prompts in both modes, with the texts that the teacher learns."""
    return [row | {"completion": text(row)} for row in rows(TASKS, 500, 9, held_out=False)]


def text(row: dict[str, Any]) -> str:
    """What the teacher writes: a thought and the answer, or the answer alone."""
    thinks = row["chat_template_kwargs"]["enable_thinking"]
    return f"<think>{row['prompt'].partition(':')[0]}</think>{row['answer']}" if thinks else row["answer"]


def rows(names: tuple[str, ...], count: int, seed: int, *, held_out: bool) -> list[dict[str, Any]]:
    """`count` prompts of each task, each prompt in both modes."""
    prompts = tasks.in_turn([tasks.rows(task, count, seed, held_out=held_out) for task in names])
    return [
        row | {"teacher": mode, "chat_template_kwargs": {"enable_thinking": thinks}}
        for row in prompts
        for mode, thinks in MODES.items()
    ]


def write_data(folder: Path) -> None:
    """Training and held-out prompts, both modes."""
    for name, count, held_out in (("prompts", 90, False), ("heldout", 24, True)):
        tasks.write(folder / f"{name}.jsonl", rows(ASKED, count, 10, held_out=held_out))


def judge(jobs: list[dict[str, Any]], *, short: bool) -> list[str]:
    """What is not as promised: each stage lowers held-out reverse KL, the first by a tenth at least."""
    kl = {point["step"]: point["reverse_kl"] for point in jobs[0]["evaluations"]}
    first, boundary, last = kl[0], kl[jobs[0]["job"]["spec"]["stages"][0]["schedule"]["steps"]], kl[max(kl)]
    if 0.9 * first > boundary > last:
        return []
    return [f"held-out reverse KL went from {first:.3f} to {boundary:.3f} and {last:.3f}: each stage should lower it"]
