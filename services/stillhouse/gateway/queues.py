"""How much work waits for which services, and who uses which model."""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any, Final

from google.protobuf.message import DecodeError
from redis.exceptions import ResponseError

from stillhouse.core.errors import NotFoundError
from stillhouse.core.models import ModelEntry
from stillhouse.core.queue import keys
from stillhouse.core.queue.jobs import JobRecord
from stillhouse.core.queue.registry import ServiceInfo
from stillhouse.core.schemas import Model, Queue, Services
from stillhouse.core.service import Context
from stillhouse.gateway.deps import Caller
from stillhouse.gateway.files import active_jobs
from stillhouse.gateway.views import model_view, service_view
from stillhouse.v1 import rollout_pb2

ROLES: Final = ("trainer", "sampler", "teacher")
"""Those that take work from queues."""
_JOB_ID: Final = re.compile(r"job_[a-z0-9]{8,40}")


async def services(ctx: Context, caller: Caller) -> Services:
    """Live processes and all queues; jobs that the caller may not see are not named."""
    records = await active_jobs(ctx)
    hidden = {record.id for record in records if not caller.may_see(record.owner)}
    queues = await read_queues(ctx, records)
    of_role = {queue.role: queue for queue in by_role(queues)}
    infos = [await _shown(ctx, each, caller, hidden) for each in await ctx.registry.services()]
    return Services(data=[service_view(info, of_role.get(info.role)) for info in infos], queues=queues)


async def _shown(ctx: Context, info: ServiceInfo, caller: Caller, hidden: Collection[str]) -> ServiceInfo:
    """A service without what names jobs that the caller may not see: the one it works for, checkpoints that it has
    loaded, its problem.
    """
    extra = dict(info.extra)
    named = set(_JOB_ID.findall(f"{extra.get('models', '')} {extra.get('problem', '')}"))
    secret = {job_id for job_id in named if not await _may_see(ctx, job_id, caller)}
    if secret:
        models = extra.get("models", "").split()
        extra["models"] = " ".join(name for name in models if name.partition("/")[0] not in secret)
        if secret.intersection(_JOB_ID.findall(extra.get("problem", ""))):
            extra["problem"] = "it concerns another owner's job"
    return replace(info, job_id="" if info.job_id in hidden else info.job_id, extra=extra)


async def _may_see(ctx: Context, job_id: str, caller: Caller) -> bool:
    try:
        return caller.may_see((await ctx.jobs.get(job_id)).owner)
    except NotFoundError:
        return "admin" in caller.scopes


async def read_queues(ctx: Context, records: Sequence[JobRecord]) -> list[Queue]:
    """Of the jobs that have not ended: jobs for trainers, groups for samplers, samples for teachers by model."""
    prompts = [keys.prompts(record.id, record.epoch) for record in records if record.epoch]
    found = [
        _jobs(records),
        await _streams(ctx, "sampler", "", prompts, keys.SAMPLERS_GROUP),
        *[
            await _streams(ctx, "teacher", model, streams, keys.TEACHERS_GROUP)
            for model, streams in sorted((await _rollouts(ctx)).items())
        ],
    ]
    return found if found[-1].role == "teacher" else [*found, Queue(role="teacher", waiting=0, in_work=0)]


def by_role(queues: Iterable[Queue]) -> list[Queue]:
    """All models together."""
    found = []
    for role in ROLES:
        mine = [queue for queue in queues if queue.role == role]
        ages = [queue.oldest_s for queue in mine if queue.oldest_s is not None]
        waiting, in_work = sum(queue.waiting for queue in mine), sum(queue.in_work for queue in mine)
        found.append(Queue(role=role, waiting=waiting, in_work=in_work, oldest_s=max(ages, default=None)))
    return found


def _jobs(records: Sequence[JobRecord]) -> Queue:
    waiting = [record.created_at for record in records if record.status == "queued"]
    oldest_s = round(time.time() - min(record.created_at for record in records), 1) if records else None
    return Queue(role="trainer", waiting=len(waiting), in_work=len(records) - len(waiting), oldest_s=oldest_s)


async def _rollouts(ctx: Context) -> dict[str, list[str]]:
    """Model -> the streams that are scored with it."""
    redis: Any = ctx.redis
    found: dict[str, list[str]] = {}
    for member in await redis.smembers(keys.TEACHERS):
        for stream, task in (await redis.hgetall(keys.teacher(member.decode()))).items():
            found.setdefault(_model_of(task), []).append(stream.decode())
    return found


def _model_of(task: bytes) -> str:
    try:
        return rollout_pb2.TeacherTask.FromString(task).model
    except DecodeError:  # no teacher can read it either; its entries wait all the same
        return ""


async def _streams(ctx: Context, role: str, model: str, streams: Sequence[str], group: str) -> Queue:
    """All entries of some streams: an entry leaves its stream when it is done."""
    pipeline = ctx.redis.pipeline(transaction=False)
    for stream in streams:
        pipeline.xlen(stream)
        pipeline.xpending(stream, group)
        pipeline.xrange(stream, count=1)
    answers: list[Any] = await pipeline.execute(raise_on_error=False) if streams else []
    total = in_work = 0
    oldest: list[float] = []
    for length, pending, first in zip(answers[::3], answers[1::3], answers[2::3], strict=True):
        for answer in (length, pending, first):
            if isinstance(answer, Exception) and not isinstance(answer, ResponseError):
                raise answer
        if isinstance(pending, ResponseError):  # the epoch has just closed
            continue
        total, in_work = total + int(length), in_work + int(pending["pending"])
        oldest += [int(entry_id.partition(b"-")[0]) / 1000 for entry_id, _ in first]
    oldest_s = round(max(0.0, time.time() - min(oldest)), 1) if oldest else None
    return Queue(role=role, model=model, waiting=max(0, total - in_work), in_work=in_work, oldest_s=oldest_s)


async def models(ctx: Context, caller: Caller, entries: Sequence[ModelEntry]) -> list[Model]:
    """Models with the services that have them in memory and the caller's jobs that use them."""
    loaded: dict[str, list[str]] = {}
    for info in await ctx.registry.services():
        for name in info.extra.get("models", "").split():
            loaded.setdefault(name, []).append(f"{info.role}/{info.instance}")
    used: dict[str, list[str]] = {}
    for record in await active_jobs(ctx):
        if caller.may_see(record.owner):
            for name in models_of(record):
                used.setdefault(name, []).append(record.id)
    return [model_view(entry, loaded.get(entry.name, ()), used.get(entry.name, ())) for entry in entries]


def models_of(record: JobRecord) -> set[str]:
    """Names of the models that a job uses."""
    spec = record.spec
    found = {spec.get("student", {}).get("model"), spec.get("init_from")}
    found |= {teacher.get("model") for teacher in spec.get("teachers", {}).values()}
    return {str(name) for name in found if name}
