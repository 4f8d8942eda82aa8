"""What the replica that looks after the jobs measures on the queue server and the disk, for /metrics."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

from redis.exceptions import ResponseError

from stillhouse.core import metrics
from stillhouse.core.queue import keys
from stillhouse.core.queue.jobs import STATUSES, TERMINAL, JobRecord
from stillhouse.core.schemas import Service
from stillhouse.core.service import Context
from stillhouse.gateway.queues import by_role, read_queues
from stillhouse.gateway.views import service_view

STAGES: Final = ("prompts", "rollouts", "scored", "dead")
ACTIVE: Final = tuple(status for status in STATUSES if status not in TERMINAL)
HEALTHS: Final = Service.model_fields["health"].annotation.__args__  # type: ignore[union-attr]
_MEASURED: Final = (
    metrics.QUEUE_ENTRIES,
    metrics.QUEUE_AGE,
    metrics.WORK_WAITING,
    metrics.WORK_IN_PROGRESS,
    metrics.JOBS,
    metrics.SERVICES,
)


def forget() -> None:
    """Nothing is known now: no series is better than an old one, and another replica has them."""
    for gauge in _MEASURED:
        gauge.clear()


async def measure(ctx: Context, active: Sequence[JobRecord]) -> None:
    """Set the gauges of queues, jobs and services; zeros are told, so that a dashboard shows them."""
    await _stages(ctx, active)
    for queue in by_role(await read_queues(ctx, active)):
        metrics.WORK_WAITING.labels(queue.role).set(queue.waiting)
        metrics.WORK_IN_PROGRESS.labels(queue.role).set(queue.in_work)
    statuses = Counter(record.status for record in active)
    for status in ACTIVE:
        metrics.JOBS.labels(status).set(statuses[status])
    views = [service_view(info, None) for info in await ctx.registry.services()]
    counted = Counter((view.role, view.health) for view in views)
    for role in metrics.BY_ROLE:
        for health in HEALTHS:
            metrics.SERVICES.labels(role, health).set(counted[role, health])
    metrics.LAST_SWEEP.set_to_current_time()


def measure_disk(ctx: Context) -> None:
    """Room where the artifacts lie; may block where that is a network disk."""
    usage = shutil.disk_usage(ctx.artifacts.root)
    metrics.STORAGE_SIZE.set(usage.total)
    metrics.STORAGE_FREE.set(usage.free)


async def _stages(ctx: Context, active: Sequence[JobRecord]) -> None:
    """Length and oldest entry of every work stream of jobs that a trainer has had, in two round trips."""
    epochs = [(record.id, record.epoch) for record in active if record.epoch]
    pipeline = ctx.redis.pipeline(transaction=False)
    for job_id, epoch in epochs:
        pipeline.smembers(keys.streams(job_id, epoch))
    found: list[tuple[str, str]] = []
    for (job_id, epoch), members in zip(epochs, await pipeline.execute(), strict=True):
        prefix = f"{keys.job(job_id)}:{epoch}:"
        streams = {member.decode() for member in members} | {keys.dead(job_id, epoch)}
        found += [(stream.removeprefix(prefix).partition(":")[0], stream) for stream in streams]
    for _, stream in found:
        pipeline.xlen(stream)
        pipeline.xrange(stream, count=1)
    answers: list[Any] = await pipeline.execute(raise_on_error=False)
    entries, oldest = dict.fromkeys(STAGES, 0), dict.fromkeys(STAGES, time.time())
    for (stage, _), length, first in zip(found, answers[::2], answers[1::2], strict=True):
        if isinstance(length, ResponseError) or stage not in entries:
            continue
        if isinstance(length, Exception):
            raise length
        entries[stage] += length
        times = [int(entry_id.partition(b"-")[0]) / 1000 for entry_id, _ in first]
        oldest[stage] = min(oldest[stage], *times) if times else oldest[stage]
    for stage in STAGES:
        metrics.QUEUE_ENTRIES.labels(stage).set(entries[stage])
        metrics.QUEUE_AGE.labels(stage).set(max(0.0, time.time() - oldest[stage]))
