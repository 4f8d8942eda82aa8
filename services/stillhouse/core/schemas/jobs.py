"""Jobs."""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import ConfigDict, Field

from stillhouse.core.schemas.base import Answer

Status = Literal[
    "queued",
    "validating",
    "starting",
    "running",
    "stalled",
    "pausing",
    "paused",
    "resuming",
    "cancelling",
    "succeeded",
    "failed",
    "cancelled",
]
"""Of a job; core/queue/jobs.py says how one leads to the other."""


Kind = Literal["distillation", "preflight"]
"""preflight = looks at a job, live, and trains nothing."""


class Progress(Answer):
    """How far a job is. The trainer may add fields."""

    model_config = ConfigDict(extra="allow")

    step: int
    """Optimizer steps trained."""
    total_steps: int
    percent: float
    eta_s: float | None = None
    """Expected time to the end, seconds."""
    phase: str = ""
    """What it is doing: sampling, scoring, training ..."""
    stage: str = ""
    """Name of the stage that is on."""
    bottleneck: str = ""
    """The service that the others wait for."""


class Job(Answer):
    """A job."""

    id: str
    object: Literal["job"] = "job"
    kind: str = Field(default="distillation", json_schema_extra={"enum": list(get_args(Kind))})
    """What it does: distil, or look at a job and report (`result.preflight`)."""
    name: str
    owner: str = ""
    """Whose job it is; empty where authentication is off."""
    priority: int = 0
    """Of waiting jobs those with a higher one begin first."""
    retry_of: str = ""
    """The job whose checkpoint this one goes on from; empty = none."""
    status: str = Field(json_schema_extra={"enum": list(get_args(Status))})
    is_terminal: bool
    """The status will not change any more."""
    status_reason: str
    """Why it has this status, for programs; may be empty."""
    status_message: str
    """Why it has this status, for people; may be empty."""
    spec: dict[str, Any]
    """As accepted, defaults filled in. In lists without the inline rows."""
    created_at: str
    started_at: str | None
    finished_at: str | None
    progress: Progress
    usage: dict[str, Any]
    error: dict[str, Any] | None
    """code, message and where it happened, when the job failed."""
    result: dict[str, Any] | None
    epoch: int
    """Claims so far: more than 1 means that a trainer took the job over from another."""
    policy_version: int
    """Optimizer steps behind the newest published weights."""
    trainer: str
    """Process that leads or led the job."""
    metadata: dict[str, str]
