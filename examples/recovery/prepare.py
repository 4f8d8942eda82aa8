"""Models and prompts of the example: a model that does one task well and will learn another."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from toys import models, tasks

OLD, NEW = "reverse", "digits"
SHORT: Final = {"steps": 16}


def prepare(folder: Path, *, short: bool = False) -> None:
    """The base, and the model before fine-tuning; what exists stays."""
    base = models.base(folder / "base", short=short)
    models.expert(base, folder / f"expert-{OLD}", OLD, short=short)


def write_data(folder: Path) -> None:
    """Texts of the new task, prompts of the old one, and held-out prompts of both."""
    texts = [row | {"completion": row["answer"]} for row in tasks.rows(NEW, 320, 8, teacher="new")]
    tasks.write(folder / "new.jsonl", texts)
    tasks.write(folder / "old.jsonl", tasks.rows(OLD, 320, 8, teacher="old"))
    both = (("old", OLD), ("new", NEW))
    groups = [tasks.rows(task, 64, 8, held_out=True, teacher=name) for name, task in both]
    tasks.write(folder / "heldout.jsonl", tasks.in_turn(groups))


def judge(jobs: list[dict[str, Any]], *, short: bool) -> list[str]:
    """What is not as promised: at least 2/3 of what fine-tuning lost comes back, and the new task keeps its score.

    A short run is too short for that: it has to learn the new task, and to come nearer to the model before on
    the old one.
    """
    boundary = jobs[0]["job"]["spec"]["stages"][0]["schedule"]["steps"]
    at = {point["step"]: point["by_teacher"] for point in jobs[0]["evaluations"]}
    before, tuned, after = at[0], at[boundary], at[max(at)]
    if short:
        is_learned = after["new"]["accuracy"] > before["new"]["accuracy"]
        is_nearer = after["old"]["reverse_kl"] < tuned["old"]["reverse_kl"]
        return [] if is_learned and is_nearer else [f"before {before}, fine-tuned {tuned}, at the end {after}"]
    lost = before["old"]["accuracy"] - tuned["old"]["accuracy"]
    back = after["old"]["accuracy"] - tuned["old"]["accuracy"]
    kept = after["new"]["accuracy"] - tuned["new"]["accuracy"]
    complaints = []
    if lost <= 0 or back < 2 / 3 * lost:
        complaints.append(f"{back:.2f} of the {lost:.2f} that were lost came back on the old task")
    if kept < 0:
        complaints.append(f"the new task lost {-kept:.2f}")
    return complaints
