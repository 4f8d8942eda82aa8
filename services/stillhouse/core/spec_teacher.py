"""The part of a job's format about teachers that come of its own student: its moving average, or an earlier stage."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import Field

from stillhouse.core.spec_base import STAGE_PREFIX, Closed
from stillhouse.core.spec_stages import START

if TYPE_CHECKING:
    from stillhouse.core.spec import JobSpec


class EmaSpec(Closed):
    """Exponential moving average of the student's own weights, which a teacher has instead of registered ones."""

    decay: float = Field(ge=0, lt=1)
    """average = decay * average + (1 - decay) * weights; 0 = the student itself, `every` steps ago at most."""
    every: int = Field(default=1, ge=1, le=1_000_000)
    """The average moves, and teachers get it, every so many steps."""


def check_followers(spec: JobSpec) -> None:
    """Refuse what a job with a teacher that follows the student cannot have.

    Raises:
        ValueError: names the field, the reason and what to do.
    """
    followers = {name: teacher for name, teacher in spec.teachers.items() if teacher.ema_of_student is not None}
    for name, teacher in followers.items():
        for field in ("model", "dtype"):
            mine, students = getattr(teacher, field), getattr(spec.student, field)
            if mine != students:
                raise ValueError(
                    f"teachers.{name}.{field} is {mine}, student.{field} is {students}: a teacher with "
                    "'ema_of_student' is the student's average; name the same"
                )
    if len({str(teacher.ema_of_student) for teacher in followers.values()}) > 1:
        raise ValueError(
            f"the teachers {sorted(followers)} follow one average of the student: give all the same 'ema_of_student'"
        )
    for problem in _problems(spec) if followers else ():
        raise ValueError(f"teacher '{next(iter(followers))}' has 'ema_of_student': {problem}")


def check_stage_references(spec: JobSpec) -> None:
    """Refuse a teacher that is the student at the end of a stage which the job does not have.

    Raises:
        ValueError: names the field, what the job has and what to do.
    """
    stages = [stage.name for stage in spec.stages]
    for name, teacher in spec.teachers.items():
        stage = teacher.model.removeprefix(STAGE_PREFIX)
        if teacher.model.startswith(STAGE_PREFIX) and stage not in (START, *stages):
            ends = ", ".join(f"{STAGE_PREFIX}{end}" for end in (START, *stages[:-1]))
            raise ValueError(
                f"teachers.{name}.model: the job has no stage '{stage}'; name one that ends before another begins, or "
                f"what the job began with: {ends}"
            )


def _problems(spec: JobSpec) -> Iterator[str]:
    if spec.deterministic:
        yield "which average scores a sample is decided by the clock; remove 'deterministic'"
    if spec.evaluation.data is not None:
        yield "held-out evaluation measures the KL to a teacher that stays the same; remove 'evaluation.data'"
    for stage in spec.stages:
        if stage.loss.payload() == "hidden":
            yield (
                f"{stage.loss.objective} here applies the teacher's output head, fetched once, to its hidden states, "
                "and this teacher's head changes with every update; use top_k or policy_gradient, with a baseline of "
                "none or top_k"
            )
        if stage.off_policy_source == "teacher":
            yield "samplers write a teacher's texts with its registered weights; set 'off_policy_source' to data"
