"""What happened in a job, and what it made."""

from __future__ import annotations

from typing import Any, Final, Literal

from stillhouse.core.schemas.base import Answer

TERMINAL: Final = frozenset({"succeeded", "failed", "cancelled"})
"""Statuses that do not change any more; core/queue/jobs.py's TERMINAL, where the client may not look."""


class Event(Answer):
    """Something that happened to a job."""

    id: str
    """Position in the job's history; give it as `after` or Last-Event-ID to continue."""
    object: Literal["event"] = "event"
    type: str
    level: str
    message: str
    data: dict[str, Any]
    created_at: str

    @property
    def is_last(self) -> bool:
        """It tells how the job ended: no other follows."""
        return self.data.get("status") in TERMINAL


class MetricPoint(Answer):
    """The metrics of one optimizer step, or with `resolution` of several neighbours."""

    object: Literal["metrics"] = "metrics"
    epoch: int
    first_step: int = 0
    """First step of the point; the same as `step` unless the point is a mean over several."""
    step: int
    """Last step of the point."""
    stage: str = ""
    """Name of the stage that trained the step."""
    created_at: str
    values: dict[str, float | None]
    """null = not a finite number; of several steps the mean of those that are."""


class Checkpoint(Answer):
    """Committed weights of a job."""

    id: str
    object: Literal["checkpoint"] = "checkpoint"
    job_id: str
    kind: Literal["checkpoint", "export"]
    """checkpoint: state to continue from. export: the finished student as a model folder."""
    step: int
    stage: str = ""
    """Name of the stage that trained its last step."""
    epoch: int
    policy_version: int
    created_at: str
    size_bytes: int
    sha256: str
    """sha256 of its manifest; empty for the export."""
    is_best: bool = False
    """The best by held-out evaluation, or the one that was marked as best."""
    is_pinned: bool = False
    """Marked as best by somebody: it stays until the mark is taken back."""


class DeadLetter(Answer):
    """A sample that could not be sampled or scored."""

    id: str
    """The sample: group/index."""
    object: Literal["dead_letter"] = "dead_letter"
    step: int | None
    """Optimizer step that goes on without it; the first is 1. Null for samples of an evaluation."""
    epoch: int
    row: int
    """Row of the data, from 0."""
    teacher: str
    reason: str
    """Short code, for programs."""
    message: str
    service: str
    """Who gave up: sampler, teacher or trainer."""
    attempts: int
    is_journalled: bool
    """For good; else its step is still being collected."""
