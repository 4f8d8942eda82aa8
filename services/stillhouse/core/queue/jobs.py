"""Job records in Redis: create, claim under a lease, fenced updates, events and metrics.

    queued -> validating -> starting -> running -> succeeded | failed | cancelled
                     (any non-terminal) -> cancelling -> cancelled;  stalled and back
                     (any before that) -> pausing -> paused -> resuming -> validating ...

Who moves what: the gateway writes `queued`, `pausing`, `resuming` and `cancelling`, the trainer under its lease the
rest, the sweeper `stalled`, and in the place of a trainer that is gone `paused` and `cancelled`. A change by a trainer
names its epoch and is refused when a newer claim exists; terminal states never change.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, get_args

from redis.asyncio import Redis

from stillhouse.core.blobs import Artifacts, append_jsonl
from stillhouse.core.errors import ConflictError, LeaseLostError, NotFoundError
from stillhouse.core.queue import job_scripts, keys
from stillhouse.core.queue.client import text
from stillhouse.core.queue.listing import listed
from stillhouse.core.queue.streams import Scope
from stillhouse.core.queue.turns import CLAIMABLE, ActiveJob
from stillhouse.core.schemas.jobs import Status

TERMINAL: Final = frozenset({"succeeded", "failed", "cancelled"})
STATUSES: Final = get_args(Status)
EVENTS_MAXLEN: Final = 10_000
"""Events kept in Redis for live readers; older ones are in events.jsonl."""
METRICS_MAXLEN: Final = 100_000
"""Metric points kept in Redis."""
RECORDS_PAGE: Final = 50
"""Records read at once: some milliseconds of an event loop."""
METRICS_PAGE: Final = 1000
"""Metric points read at once."""
DELETED_KEPT: Final = 10_000
"""Deleted jobs whose place in lists is known."""
IDEMPOTENCY_TTL_S: Final = 86_400
"""An Idempotency-Key is remembered for a day."""


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A job as the queue server knows it."""

    id: str
    status: str
    spec: dict[str, Any]
    """As accepted, defaults filled in."""
    created_at: float
    epoch: int = 0
    status_reason: str = ""
    status_message: str = ""
    trainer: str = ""
    """Instance that leads or led it."""
    step: int = 0
    """Optimizer steps trained."""
    committed_step: int = 0
    """Optimizer steps that a manifest covers."""
    stop_step: int = 0
    started_at: float | None = None
    finished_at: float | None = None
    weights: dict[str, Any] | None = None
    """Newest published WeightsRef."""
    progress: dict[str, Any] = field(default_factory=dict)
    usage: dict[str, Any] = field(default_factory=dict)
    error: dict[str, Any] | None = None
    result: dict[str, Any] | None = None
    owner: str = ""
    best_checkpoint: str = ""
    """Id of the best by held-out evaluation; empty = none was measured."""
    kind: str = "distillation"
    """Or "preflight": it looks at the job of its spec, reports and trains nothing."""
    priority: int = 0
    """Of its spec."""
    retry_of: str = ""
    """The job whose checkpoint this one goes on from."""
    traceparent: str = ""
    """The span that it goes on under: of the request that made it, then of its newest claim; '' = there is none."""

    @property
    def is_terminal(self) -> bool:
        return self.status in TERMINAL


FINAL_FIELDS: Final = (
    "status",
    "status_reason",
    "status_message",
    "finished_at",
    "epoch",
    "step",
    "committed_step",
    "error",
    "result",
    "usage",
)
"""Fields of a finished record that `final.json` keeps beside the artifacts, for a queue server that lost everything."""


def final_document(record: JobRecord) -> dict[str, Any]:
    """What `final.json` says of a finished job."""
    return {name: getattr(record, name) for name in FINAL_FIELDS}


class JobStore:
    """Job records, their events and their metrics. Every history line also goes to the job's artifacts."""

    def __init__(self, redis: Redis, artifacts: Artifacts) -> None:
        self._redis = redis
        self.artifacts = artifacts
        self._create = redis.register_script(job_scripts.CREATE)
        self._claim = redis.register_script(job_scripts.CLAIM)
        self._renew = redis.register_script(job_scripts.RENEW)
        self._update = redis.register_script(job_scripts.UPDATE)
        self._request = redis.register_script(job_scripts.REQUEST)
        self._tell = redis.register_script(job_scripts.TELL)
        self._active = redis.register_script(job_scripts.ACTIVE)
        self._measure = redis.register_script(job_scripts.MEASURE)

    async def create(
        self, record: JobRecord, *, idempotency_key: str = "", body_sha256: str = "", message: str = ""
    ) -> str:
        """Store a new record, once per idempotency key; returns '' or "id:body hash" of the job made under that key.

        With a `message` the job's history begins with it, in the same step.
        """
        value = f"{record.id}:{body_sha256}" if idempotency_key else ""
        event = _event("job.status", message, "info", {"status": record.status}, record.created_at) if message else None
        event_id = f"{int(record.created_at * 1000)}-0"  # the stream is new, so that we may choose
        made = text(
            await self._create(
                keys=[
                    keys.job(record.id),
                    keys.JOBS,
                    keys.JOBS_ACTIVE,
                    keys.idempotency(idempotency_key),
                    keys.events(record.id),
                ],
                args=[
                    record.id,
                    record.created_at,
                    value,
                    IDEMPOTENCY_TTL_S,
                    event_id,
                    json.dumps(event) if event else "",
                    *_flatten({name: getattr(record, name) for name in _FIELDS}),
                ],
            )
        )
        if event and made in ("", value):
            append_jsonl(self.artifacts.job(record.id).events, [{"id": event_id, **event}])
        return made

    async def get(self, job_id: str) -> JobRecord:
        """The record.

        Raises:
            NotFoundError: no such job.
        """
        raw: Any = await self._redis.hgetall(keys.job(job_id))
        if not raw:
            raise NotFoundError(f"no job '{job_id}'")
        return _record({text(key): text(value) for key, value in raw.items()})

    async def get_many(self, job_ids: Sequence[str]) -> list[JobRecord]:
        """The records of those of the jobs that exist, in this order, without their specs, which may be large."""
        found = []
        names = [name for name in _FIELDS if name != "spec"]
        for start in range(0, len(job_ids), RECORDS_PAGE):
            async with self._redis.pipeline(transaction=False) as at_once:
                for job_id in job_ids[start : start + RECORDS_PAGE]:
                    at_once.hmget(keys.job(job_id), names)
                answers: Any = await at_once.execute()
            for values in answers:
                raw = {name: text(value) for name, value in zip(names, values, strict=True) if value is not None}
                found += [_record({**raw, "spec": "{}"})] if raw else []
        return found

    async def list(
        self,
        *,
        limit: int = 20,
        after: str = "",
        newest_first: bool = True,
        status: str = "",
        owner: str | None = None,
    ) -> list[JobRecord]:
        """A page of jobs by creation time; `after` is the last id of the page before, which may be deleted by now.

        `owner` = only theirs. Reads the records of the page, and of the jobs before them status and owner.

        Raises:
            NotFoundError: no job has or had the id `after`.
        """
        found: list[JobRecord] = []
        async for job_id in listed(self._redis, after, limit, newest_first, status, owner):
            with suppress(NotFoundError):  # deleted in this moment
                found.append(await self.get(job_id))
            if len(found) == limit:
                break
        return found

    async def forget(self, job_id: str) -> None:
        """Remove all that the queue server has of a deleted job; its place in lists is known for a while."""
        score = await self._redis.zscore(keys.JOBS, job_id)
        if score is not None:
            await self._redis.zadd(keys.JOBS_DELETED, {job_id: float(score)})
            await self._redis.zremrangebyrank(keys.JOBS_DELETED, 0, -DELETED_KEPT - 1)
        await self._redis.delete(keys.job(job_id), keys.lease(job_id), keys.events(job_id), keys.metrics(job_id))
        await self._redis.zrem(keys.JOBS_ACTIVE, job_id)
        await self._redis.zrem(keys.JOBS, job_id)  # last: an id that is still listed is forgotten again

    async def active_ids(self) -> list[str]:
        """Jobs that are not finished, oldest first."""
        return [text(item) for item in await self._redis.zrange(keys.JOBS_ACTIVE, 0, -1)]

    async def active(self) -> list[ActiveJob]:
        """Of every job that is not finished what decides whose turn it is, oldest first. One round trip."""
        found: Any = await self._active(keys=[keys.JOBS_ACTIVE, keys.TURNS], args=[keys.job("")])
        rows = [found[first : first + 6] for first in range(0, len(found), 6)]
        return [
            ActiveJob(text(job_id), text(status), text(owner), int(priority or 0), int(is_led) == 1, int(turn))
            for job_id, status, owner, priority, is_led, turn in rows
        ]

    async def claim(
        self,
        job_id: str,
        instance: str,
        lease_s: float,
        artifact_epoch: int,
        *,
        allowed: tuple[str, ...] = CLAIMABLE,
    ) -> int:
        """Take the lease of a job; returns the new epoch, or 0 if it is led by another or in none of the statuses."""
        return int(
            await self._claim(
                keys=[keys.job(job_id), keys.lease(job_id), keys.JOBS_ACTIVE, keys.TURN, keys.TURNS],
                args=[instance, int(lease_s * 1000), artifact_epoch, job_id, _set(allowed)],
            )
        )

    async def renew(self, scope: Scope, instance: str, lease_s: float) -> None:
        """Keep the lease.

        Raises:
            LeaseLostError: another process holds it.
        """
        holder = f"{instance}:{scope.epoch}"
        renewed = await self._renew(
            keys=[keys.lease(scope.job_id), keys.job(scope.job_id)], args=[holder, int(lease_s * 1000), scope.epoch]
        )
        if int(renewed) == 0:
            raise LeaseLostError(f"job {scope.job_id}: the claim of epoch {scope.epoch} is no longer valid")

    async def update(
        self, scope: Scope, *, allowed: tuple[str, ...] = (), release: bool = False, **fields: Any
    ) -> None:
        """Change fields of the record under a claim; `release` gives up the lease too.

        Raises:
            LeaseLostError: a newer claim exists.
            ConflictError: the status is not one of `allowed`.
        """
        answer = text(
            await self._update(
                keys=[keys.job(scope.job_id), keys.lease(scope.job_id), keys.JOBS_ACTIVE],
                args=[scope.epoch, scope.job_id, _set(allowed), "1" if release else "", *_flatten(fields)],
            )
        )
        if answer == "EPOCH":
            raise LeaseLostError(f"job {scope.job_id}: epoch {scope.epoch} is closed by a newer claim")
        if answer != "DONE":
            raise ConflictError(f"job {scope.job_id} is '{answer}', expected one of {', '.join(allowed)}")

    async def request(
        self, job_id: str, *, allowed: tuple[str, ...], only_epoch: int | None = None, **fields: Any
    ) -> None:
        """Change fields on a user's behalf, if the status allows it and, with `only_epoch`, nobody claimed it since.

        Raises:
            NotFoundError: no such job.
            ConflictError: says which status it has and which would allow it.
        """
        answer = text(
            await self._request(
                keys=[keys.job(job_id), keys.JOBS_ACTIVE],
                args=[job_id, _set(allowed), "" if only_epoch is None else only_epoch, *_flatten(fields)],
            )
        )
        if answer == "MISSING":
            raise NotFoundError(f"no job '{job_id}'")
        if answer == "EPOCH":
            raise ConflictError(f"job {job_id} was claimed by a trainer after epoch {only_epoch}")
        if answer != "DONE":
            raise ConflictError(f"job {job_id} is '{answer}'; this works only while it is {', '.join(allowed)}")

    async def event(self, job_id: str, kind: str, message: str, *, level: str = "info", **data: Any) -> None:
        """Tell readers that something happened."""
        event = _event(kind, message, level, data, round(time.time(), 3))
        event_id = text(await self._tell(keys=[keys.events(job_id)], args=[EVENTS_MAXLEN, "event", json.dumps(event)]))
        append_jsonl(self.artifacts.job(job_id).events, [{"id": event_id, **event}])

    async def events(self, job_id: str, *, after: str = "", limit: int = 100) -> list[dict[str, Any]]:
        """Events after the one with id `after`, oldest first."""
        low = f"({after}" if after else "-"
        listed: Any = await self._redis.xrange(keys.events(job_id), min=low, count=limit)
        return [{"id": text(entry_id), **json.loads(fields[b"event"])} for entry_id, fields in listed]

    async def metric(self, scope: Scope, step: int, values: Mapping[str, float], *, stage: str = "") -> None:
        """Record the metrics of a step. After a takeover it may come again: keyed (epoch, step), last wins.

        Raises:
            LeaseLostError: a newer claim exists.
        """
        point: dict[str, Any] = {"epoch": scope.epoch, "step": step, "stage": stage}
        point |= {"created_at": round(time.time(), 3), "values": dict(values)}
        measured = await self._measure(
            keys=[keys.metrics(scope.job_id), keys.job(scope.job_id)],
            args=[scope.epoch, METRICS_MAXLEN, json.dumps(point)],
        )
        if int(measured) == 0:
            raise LeaseLostError(f"job {scope.job_id}: epoch {scope.epoch} is closed by a newer claim")
        append_jsonl(self.artifacts.job(scope.job_id).metrics, [point])

    async def metrics(self, job_id: str, *, step_from: int = 0, step_to: int | None = None) -> list[dict[str, Any]]:
        """Metric points by step; of repeated steps the newest.

        Read from the newest back to `step_from`, so that who follows a job does not read all of it every time.
        """
        points: dict[int, dict[str, Any]] = {}
        before, is_done = "+", False
        while not is_done:
            listed: Any = await self._redis.xrevrange(keys.metrics(job_id), max=before, count=METRICS_PAGE)
            is_done = len(listed) < METRICS_PAGE
            for entry_id, fields in listed:
                before = f"({text(entry_id)}"
                point = json.loads(fields[b"point"])
                if point["step"] < step_from:  # older points are of earlier steps, or of steps that were undone
                    is_done = True
                    break
                if step_to is None or point["step"] <= step_to:
                    points.setdefault(point["step"], point)
        return [points[step] for step in sorted(points)]


def _event(kind: str, message: str, level: str, data: dict[str, Any], created_at: float) -> dict[str, Any]:
    return {"type": kind, "level": level, "message": message, "data": data, "created_at": created_at}


_JSON_FIELDS: Final = frozenset({"spec", "weights", "progress", "usage", "error", "result"})
_INT_FIELDS: Final = frozenset({"epoch", "step", "committed_step", "stop_step", "priority"})
_FLOAT_FIELDS: Final = frozenset({"created_at", "started_at", "finished_at"})
_FIELDS: Final = tuple(JobRecord.__dataclass_fields__)


def _flatten(fields: Mapping[str, Any]) -> list[str]:
    """Hash fields as redis takes them: None becomes empty."""
    flat: list[str] = []
    for name, value in fields.items():
        if name not in _FIELDS:
            raise AssertionError(f"the job record has no field '{name}'")
        flat.append(name)
        flat.append("" if value is None else json.dumps(value) if name in _JSON_FIELDS else str(value))
    return flat


def _record(raw: Mapping[str, str]) -> JobRecord:
    values: dict[str, Any] = {}
    for name in _FIELDS:
        text = raw.get(name, "")
        if text == "":
            continue
        if name in _JSON_FIELDS:
            values[name] = json.loads(text)
        elif name in _INT_FIELDS:
            values[name] = int(text)
        elif name in _FLOAT_FIELDS:
            values[name] = float(text)
        else:
            values[name] = text
    return JobRecord(**values)


def _set(statuses: tuple[str, ...]) -> str:
    return f",{','.join(statuses)}," if statuses else ""
