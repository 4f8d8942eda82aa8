"""The report of a job."""

from __future__ import annotations

from typing import Any, Literal

from stillhouse.core.schemas.base import Answer


class Curve(Answer):
    """A measure over the steps of a job."""

    name: str
    """Metric of the steps, or `held_out/...` of the evaluations."""
    steps: list[int]
    values: list[float | None]
    """Parallel to `steps`; of long jobs means over neighbouring steps."""


class Comparison(Answer):
    """A held-out measure before and after training."""

    measure: str
    domain: str
    """Teacher whose prompts these are; empty = all prompts."""
    before: float
    after: float


class Shown(Answer):
    """A held-out prompt and what was written of it, greedily."""

    prompt: str
    before: str
    after: str
    teacher: str


class Report(Answer):
    """What a job was asked, what it did and what came out; `Accept: text/html` answers the same as a page."""

    object: Literal["report"] = "report"
    job_id: str
    name: str
    status: str
    status_message: str
    created_at: float
    """Unix seconds, as the other times here."""
    started_at: float | None
    finished_at: float | None
    steps: int
    stop_step: int
    summary: str
    """The most important of it in a sentence."""
    asked: dict[str, str]
    """What the job is, label by label."""
    spec: dict[str, Any]
    """Without the inline rows."""
    comparisons: list[Comparison]
    curves: list[Curve]
    samples: list[Shown]
    warnings: list[str]
    preflight: list[dict[str, Any]]
    """Checks that were not ok: name, verdict, message, fix."""
    usage: dict[str, float]
    seconds: dict[str, float]
    """Wall time of the trainer by phase of its steps."""
    best_checkpoint: dict[str, Any] | None
    early_stop: dict[str, Any] | None
    load: str
    """Python that loads the student."""
