"""From our records to what OpenAI's client reads."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final

from stillhouse.core.queue.jobs import JobRecord
from stillhouse.core.schemas import Checkpoint
from stillhouse.core.schemas.openai import (
    FineTuningCheckpoint,
    FineTuningError,
    FineTuningEvent,
    FineTuningJob,
    Hyperparameters,
)
from stillhouse.gateway.openai.request import DEFAULT_LR
from stillhouse.gateway.views import event_view, job_view

_STATUS: Final[dict[str, Any]] = {
    "queued": "queued",
    "validating": "validating_files",
    "paused": "paused",
    "resuming": "queued",
    "succeeded": "succeeded",
    "failed": "failed",
    "cancelled": "cancelled",
}
"""Every other status is one of a job at work: running."""
_LEVELS: Final[dict[str, Any]] = {"warning": "warn", "error": "error"}


def fine_tuning_view(record: JobRecord, num_rows: int = 0) -> FineTuningJob:
    """A job; `num_rows` of its training file, 0 = not known."""
    job = job_view(record, with_rows=False)
    stage, evaluation = record.spec["stages"][0], record.spec.get("evaluation") or {}
    eta_s = job.progress.eta_s if record.status == "running" else None
    error = record.error or {}
    return FineTuningJob(
        id=record.id,
        status=_STATUS.get(record.status, "running"),
        model=record.spec["student"]["model"],
        created_at=int(record.created_at),
        finished_at=int(record.finished_at) if record.finished_at else None,
        estimated_finish=None if eta_s is None else int(time.time() + eta_s),
        error=FineTuningError(code=str(error.get("code", "failed")), message=str(error.get("message", "")))
        if error
        else None,
        fine_tuned_model=record.id if record.status == "succeeded" and record.kind == "distillation" else None,
        organization_id=record.owner,
        result_files=[],
        seed=record.spec.get("seed", 0),
        trained_tokens=int(record.usage.get("trained_tokens", 0)) if record.is_terminal else None,
        training_file=stage["data"].get("file") or "",
        validation_file=(evaluation.get("data") or {}).get("file"),
        hyperparameters=_hyperparameters(stage, num_rows),
        method={"type": "distillation", "distillation": {"job": job.spec}},
        metadata=record.spec.get("metadata", {}),
        integrations=[],
    )


def _hyperparameters(stage: Mapping[str, Any], num_rows: int) -> Hyperparameters:
    schedule = stage["schedule"]
    rows = num_rows or len(stage["data"].get("rows") or ())
    return Hyperparameters(
        n_epochs=round(schedule["steps"] * schedule["prompts_per_step"] / rows, 2) if rows else 0,
        batch_size=schedule["prompts_per_step"],
        learning_rate_multiplier=round(stage["optimizer"]["lr"] / DEFAULT_LR, 6),
    )


def fine_tuning_event(event: Mapping[str, Any]) -> FineTuningEvent:
    """An event."""
    ours = event_view(event)
    return FineTuningEvent(
        id=ours.id,
        created_at=int(event["created_at"]),
        level=_LEVELS.get(ours.level, "info"),
        message=ours.message,
        data={**ours.data, "event": ours.type},
    )


def fine_tuning_checkpoint(checkpoint: Checkpoint, points: Mapping[int, Mapping[str, Any]]) -> FineTuningCheckpoint:
    """A checkpoint; `points`: metrics by step."""
    loss = points.get(checkpoint.step, {}).get("values", {}).get("loss/total")
    measured = {"train_loss": loss} if loss is not None and math.isfinite(loss) else {}
    return FineTuningCheckpoint(
        id=checkpoint.id,
        created_at=int(datetime.fromisoformat(checkpoint.created_at).timestamp()),
        fine_tuning_job_id=checkpoint.job_id,
        fine_tuned_model_checkpoint=f"{checkpoint.job_id}/{checkpoint.id}",
        step_number=checkpoint.step,
        metrics={"step": checkpoint.step, **measured},
    )
