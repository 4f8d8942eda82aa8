"""From records, registry entries and files to what REST answers."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, Literal

from stillhouse.core.models import ModelEntry
from stillhouse.core.queue.jobs import JobRecord
from stillhouse.core.queue.registry import HEARTBEAT_S, ServiceInfo
from stillhouse.core.report.facts import without_rows
from stillhouse.core.schemas import Event, Job, MetricPoint, Model, Progress, Queue, Service, Verifier
from stillhouse.core.verifiers import VerifierInfo


def timestamp(seconds: float) -> str:
    """RFC 3339, UTC, milliseconds."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def job_view(record: JobRecord, *, with_rows: bool = True) -> Job:
    """A job; without its inline rows where many jobs are listed."""
    total = record.stop_step
    progress = {
        "percent": round(100 * record.step / total, 2) if total else 0.0,
        **_finite(record.progress),
        "step": record.step,
        "total_steps": total,
    }
    return Job(
        id=record.id,
        kind=record.kind,
        name=str(record.spec.get("name", "")),
        owner=record.owner,
        priority=record.priority,
        retry_of=record.retry_of,
        status=record.status,
        is_terminal=record.is_terminal,
        status_reason=record.status_reason,
        status_message=record.status_message,
        spec=record.spec if with_rows else without_rows(record.spec),
        created_at=timestamp(record.created_at),
        started_at=timestamp(record.started_at) if record.started_at else None,
        finished_at=timestamp(record.finished_at) if record.finished_at else None,
        progress=Progress.model_validate(progress),
        usage=_finite(record.usage),
        error=record.error,
        result=_finite(record.result) if record.result is not None else None,
        epoch=record.epoch,
        policy_version=int((record.weights or {}).get("policy_version", 0)),
        trainer=record.trainer,
        metadata=record.spec.get("metadata", {}),
    )


def event_view(event: Mapping[str, Any]) -> Event:
    """An event."""
    return Event(
        id=event["id"],
        type=event["type"],
        level=event["level"],
        message=event["message"],
        data=_finite(event["data"]),
        created_at=timestamp(event["created_at"]),
    )


def metric_view(point: Mapping[str, Any], names: set[str]) -> MetricPoint:
    """A metric point, reduced to `names` unless that is empty."""
    values = {name: value for name, value in point["values"].items() if not names or name in names}
    return MetricPoint(
        epoch=point["epoch"],
        first_step=point.get("first_step", point["step"]),
        step=point["step"],
        stage=point.get("stage", ""),
        created_at=timestamp(point["created_at"]),
        values=_finite(values),
    )


def model_view(entry: ModelEntry, loaded_by: Sequence[str] = (), used_by: Sequence[str] = ()) -> Model:
    """A registered model, without where it lies."""
    fields = {name: getattr(entry, name) for name in Model.model_fields if name in _MODEL_FIELDS}
    return Model(id=entry.name, loaded_by=list(loaded_by), used_by=list(used_by), **fields)


_MODEL_FIELDS = frozenset(ModelEntry.model_fields)


def verifier_view(info: VerifierInfo) -> Verifier:
    """A verifier."""
    fields = ("about", "needs_answer", "source", "problem")
    return Verifier(id=info.name, **{name: getattr(info, name) for name in fields})


def service_view(info: ServiceInfo, queue: Queue | None = None) -> Service:
    """A live service, and the work for its kind."""
    age_s = max(0.0, time.time() - info.seen_at)
    health: Literal["ok", "late", "problem", "draining"] = "ok"
    if info.extra.get("draining"):
        health = "draining"
    elif age_s > LATE_S:
        health = "late"
    elif info.extra.get("problem"):
        health = "problem"
    return Service(
        **{name: getattr(info, name) for name in _SERVICE_FIELDS},
        started_at=timestamp(info.started_at),
        seen_at=timestamp(info.seen_at),
        health=health,
        heartbeat_age_s=round(age_s, 1),
        queue=queue,
    )


LATE_S: Final = 2 * HEARTBEAT_S + 1.0
"""A service whose heartbeat is this old missed one or two."""
_SERVICE_FIELDS: Final = (
    "role",
    "instance",
    "address",
    "metrics_address",
    "pid",
    "version",
    "state",
    "job_id",
    "extra",
)


def _finite(value: Any) -> Any:
    """NaN and infinities as null: they are no JSON, and one of them must not make an answer unreadable."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
