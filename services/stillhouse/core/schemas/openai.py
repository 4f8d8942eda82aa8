"""Fine-tuning jobs in OpenAI's shapes: what its official client reads. Times are Unix seconds."""

from __future__ import annotations

from typing import Any, Literal

from stillhouse.core.schemas.base import Answer


class FineTuningError(Answer):
    """Why a job failed."""

    code: str
    message: str
    param: str | None = None


class Hyperparameters(Answer):
    """The first stage, in OpenAI's words."""

    n_epochs: float
    """Passes over the training file: steps x prompts per step / rows."""
    batch_size: int
    """Prompts per step."""
    learning_rate_multiplier: float
    """Peak learning rate / the default one."""


class FineTuningJob(Answer):
    """A job."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    status: Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
    model: str
    """The student."""
    created_at: int
    finished_at: int | None
    estimated_finish: int | None
    error: FineTuningError | None
    fine_tuned_model: str | None
    """Once succeeded: a name that `POST /v1/generate` and other jobs take."""
    organization_id: str
    """Owner of the job."""
    result_files: list[str]
    """Always empty: metrics and checkpoints have routes of their own."""
    seed: int
    trained_tokens: int | None
    training_file: str
    """Of the first stage; empty if the job has its rows inline."""
    validation_file: str | None
    hyperparameters: Hyperparameters
    method: dict[str, Any]
    """type: distillation, and the job as it was accepted."""
    metadata: dict[str, str]
    integrations: list[Any]


class FineTuningEvent(Answer):
    """Something that happened to a job."""

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message"] = "message"
    data: dict[str, Any]
    """What the event says, and its own type as `event`."""


class FineTuningCheckpoint(Answer):
    """Committed weights of a job."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuning_job_id: str
    fine_tuned_model_checkpoint: str
    """A name that `POST /v1/generate` and other jobs take."""
    step_number: int
    metrics: dict[str, float]
    """step, and where the step was measured train_loss."""
