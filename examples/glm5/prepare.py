"""Models and prompts of the example: one base, and a task for each stage of its training."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from toys import models, tasks

STAGES: Final = {"sft": "sort", "reasoning": "left", "general": "digits"}
"""Stages of 1-train.yaml in their order, and the task that each trains."""


def prepare(folder: Path, *, short: bool = False) -> None:
    """The base; what exists stays. The teachers are made by the first job."""
    models.base(folder / "base", short=short)


def write_data(folder: Path) -> None:
    """Texts of each stage, the prompts of all stages together, and held-out prompts."""
    for stage, task in STAGES.items():
        texts = [row | {"completion": row["answer"]} for row in tasks.rows(task, 320, 11, teacher=stage)]
        tasks.write(folder / f"{stage}.jsonl", texts)
    for name, count, held_out in (("prompts", 120, False), ("heldout", 32, True)):
        groups = [tasks.rows(task, count, 12, held_out=held_out, teacher=stage) for stage, task in STAGES.items()]
        tasks.write(folder / f"{name}.jsonl", tasks.in_turn(groups))


def probes() -> dict[str, list[dict[str, Any]]]:
    """The held-out rows by stage, for jobs without a held-out evaluation of their own."""
    return {stage: tasks.rows(task, 32, 12, held_out=True) for stage, task in STAGES.items()}


def judge(jobs: list[dict[str, Any]], *, short: bool) -> list[str]:
    """What is not as promised: training forgets, and its own checkpoints bring back two thirds of what it lost.

    A short run hardly forgets: its student has to come nearer to the checkpoints.
    """
    train, merge, one_job = jobs
    first, last = merge["evaluations"][0]["reverse_kl"], merge["evaluations"][-1]["reverse_kl"]
    complaints = [] if last < 0.9 * first else [f"2-merge: held-out reverse KL went from {first:.3f} to {last:.3f}"]
    kls = [point["values"]["loss/reverse_kl/mean"] for point in one_job["metrics"] if point["stage"] == "merge"]
    if sum(kls[-2:]) >= sum(kls[:2]):
        complaints.append(f"3-one-job: reverse KL of its merging steps: {kls}")
    ends = [point["by_teacher"] for point in train["evaluations"]]
    for number, stage in enumerate(() if short else STAGES, start=1):
        best, left = ends[number][stage]["accuracy"], ends[-1][stage]["accuracy"]
        if number < len(STAGES) and left >= best:
            complaints.append(f"training forgot nothing of {stage}: {best:.2f} to {left:.2f}")
        for name, share in (("2-merge", merge["accuracy"]), ("3-one-job", one_job["accuracy"])):
            missing = best - share[stage]["after"]
            if missing > max((best - left) / 3, 0.05):
                complaints.append(f"{name}: {stage} is at {share[stage]['after']:.2f}, its teacher was at {best:.2f}")
    return complaints
