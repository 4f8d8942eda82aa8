"""The teachers of a job, made ready: their models loaded somewhere, their output heads fetched once."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Final

from stillhouse.core.errors import (
    DeadlineError,
    NotFoundError,
    PreflightError,
    UnavailableError,
    UnimplementedError,
    WireError,
)
from stillhouse.core.models import ModelEntry
from stillhouse.core.queue.registry import Registry
from stillhouse.core.queue.streams import Scope
from stillhouse.core.rpc import Peer, Peers, collect
from stillhouse.core.spec import TeacherSpec
from stillhouse.core.tensors import DTYPE_NAMES, dtype_name, from_bytes, itemsize
from stillhouse.trainer.batch import TeacherHead
from stillhouse.v1 import rollout_pb2, teacher_pb2, teacher_pb2_grpc

RETRY_S: Final = 0.5
"""Pause between looks for a teacher."""
LOAD_TIMEOUT_S: Final = 900.0
"""Deadline of loading a teacher: a 32B model reads 64 GB from disk."""
HEAD_TIMEOUT_S: Final = 300.0
"""Deadline of fetching a head: 1.2 GB for an 8B model takes 12 s at 100 MB/s."""
Tell = Callable[[str], Awaitable[None]]
"""Takes the reason why no teacher here can serve a job, once; and "" when one is found after all."""


def make_task(
    scope: Scope,
    name: str,
    spec: TeacherSpec,
    entry: ModelEntry,
    asks: Sequence[rollout_pb2.ScoreSpec],
    *,
    threads: int = 0,
) -> rollout_pb2.TeacherTask:
    """How teachers score the rollouts routed to `name`, which ask for `asks`; `threads` of a deterministic job."""
    return rollout_pb2.TeacherTask(
        schema_version=1,
        job_id=scope.job_id,
        epoch=scope.epoch,
        teacher=name,
        model=entry.name,
        model_sha256=entry.sha256,
        dtype=DTYPE_NAMES[spec.dtype],
        tokenizer_sha256=entry.tokenizer_sha256,
        follows_student=spec.ema_of_student is not None,
        asks=asks,
        threads=threads,
    )


async def ensure_loaded(registry: Registry, peers: Peers, task: rollout_pb2.TeacherTask, tell: Tell) -> Peer:
    """Have a teacher process load the model of `task`; returns the peer that has it.

    Waits for one as long as it takes (`tell` says why, and a user may cancel): a job with days of progress must not
    fail because a node restarts, or because other teachers were started than before.

    Raises:
        PreflightError: the job's first claim finds teachers, and none has the model and an engine that can do what it
            asks.
    """
    told = ""
    while True:
        refusals = []
        services = await registry.services("teacher")
        for info in services:
            peer = peers.get(info.address, teacher_pb2_grpc.TeacherServiceStub, f"teacher {info.instance}")
            request = teacher_pb2.EnsureModelRequest(task=task)
            try:
                await peer.unary("EnsureModel", request, timeout_s=LOAD_TIMEOUT_S)
                if told:
                    await tell("")
                return peer
            except (UnavailableError, DeadlineError):
                continue  # it died just now; its successor announces itself within seconds
            except (UnimplementedError, NotFoundError) as error:  # teachers may have registries of their own
                refusals.append(error.message)
        if refusals and len(refusals) == len(services):
            reason = f"no teacher here can serve teacher '{task.teacher}': {refusals[0]}"
            if task.epoch == 1:
                raise PreflightError(reason)
            if reason != told:
                await tell(reason)
            told = reason
        await asyncio.sleep(RETRY_S)


async def fetch_head(registry: Registry, peers: Peers, task: rollout_pb2.TeacherTask, tell: Tell) -> TeacherHead:
    """The output head of a teacher's model, verified against its hash."""
    while True:
        peer = await ensure_loaded(registry, peers, task, tell)
        try:
            return await _fetch(peer, task)
        except (UnavailableError, DeadlineError):
            await asyncio.sleep(RETRY_S)


async def _fetch(peer: Peer, task: rollout_pb2.TeacherTask) -> TeacherHead:
    request = teacher_pb2.FetchHeadRequest(model=task.model, model_sha256=task.model_sha256, dtype=task.dtype)
    parts = peer.stream("FetchHead", request, timeout_s=HEAD_TIMEOUT_S)
    first = await anext(parts)
    if first.WhichOneof("part") != "info":
        raise WireError(f"{peer.what} FetchHead: the first part must describe the head")
    info = first.info
    data = await collect(_chunks(parts), info.size_bytes, f"head of {task.model}")
    digest = await asyncio.to_thread(lambda: hashlib.sha256(data).hexdigest())
    if digest != info.sha256:
        raise WireError(f"head of {task.model}: sha256 {digest[:12]}, announced {info.sha256[:12]}")
    rows, width = info.shape
    weight_bytes = rows * width * itemsize(info.dtype)
    bias = from_bytes(memoryview(data)[weight_bytes:], info.dtype, [rows]) if info.has_bias else None
    return TeacherHead(
        sha256=info.sha256,
        weight=from_bytes(memoryview(data)[:weight_bytes], info.dtype, [rows, width]),
        dtype=dtype_name(info.dtype),
        bias=bias,
        vocab_size=info.vocab_size,
        logit_scale=info.logit_scale,
        logit_soft_cap=info.logit_soft_cap,
    )


async def _chunks(parts: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for part in parts:
        yield part.chunk
