"""Pulling weights from the trainer that leads a job: streamed, verified, named. For samplers and for teachers (EMA)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from stillhouse.core.blobs import xxh3
from stillhouse.core.errors import WeightsError, WireError
from stillhouse.core.queue.streams import Scope
from stillhouse.core.rpc import Peer, collect
from stillhouse.core.service import Context
from stillhouse.core.tensors import from_bytes
from stillhouse.core.weights import weights_sha256
from stillhouse.v1 import trainer_pb2, trainer_pb2_grpc, weights_pb2

PULL_TIMEOUT_S: Final = 300.0
"""A 7B bf16 student is 14 GB; at 1 GB/s a pull takes 14 s. Twenty times that means the trainer is gone."""


@dataclass(frozen=True, slots=True)
class Weights:
    """A verified set of weights."""

    ref: weights_pb2.WeightsRef
    arrays: dict[str, np.ndarray[Any, Any]]
    """By state-dict name; bfloat16 as uint16 bits. Empty if the caller has the same weights under another name."""
    dtypes: dict[str, int]
    """Wire element types."""


async def leader(ctx: Context, job_id: str) -> Peer:
    """The trainer that leads a job.

    Raises:
        NotFoundError: no such job.
        UnavailableError: nobody leads it, or the trainer is gone.
    """
    instance = (await ctx.jobs.get(job_id)).trainer
    info = await ctx.registry.find("trainer", instance)
    return ctx.peers.get(info.address, trainer_pb2_grpc.TrainerServiceStub, f"trainer {instance}")


async def fetch_weights(
    trainer: Peer,
    scope: Scope,
    exact_version: int | None = None,
    have_sha256: str = "",
    on_part: Callable[[], None] = lambda: None,
    *,
    average: bool = False,
) -> Weights:
    """The newest weights, or those of `exact_version`. If their hash is `have_sha256`, only their name is fetched.
    `average`: the moving average that teachers follow instead of the student.

    `on_part` is called whenever a part has come.

    Raises:
        WeightsError: a tensor does not match its checksum, or the set its name.
        NotFoundError: not held (yet).
        ConflictError: the trainer leads another job or epoch.
    """
    request = trainer_pb2.FetchWeightsRequest(job_id=scope.job_id, epoch=scope.epoch, average=average)
    if exact_version is not None:
        request.weights.epoch, request.weights.policy_version = scope.epoch, exact_version
    stream: Any = trainer.stream("FetchWeights", request, timeout_s=PULL_TIMEOUT_S)
    async with aclosing(stream) as parts:
        first = await anext(parts, None)
        if first is None or first.WhichOneof("part") != "index":
            raise WireError(f"{trainer.what} FetchWeights: the first part must be the index")
        index = first.index
        if have_sha256 and index.ref.sha256 == have_sha256:
            return Weights(index.ref, {}, {})
        what = f"weights {index.ref.epoch}/{index.ref.policy_version}"
        payload = await collect(_chunks(parts, on_part), _total_bytes(index, what), what)
    arrays = await asyncio.to_thread(_verified, index, memoryview(payload), what)
    return Weights(index.ref, arrays, {entry.name: entry.dtype for entry in index.tensors})


async def _chunks(parts: AsyncIterator[Any], on_part: Callable[[], None]) -> AsyncIterator[Any]:
    async for part in parts:
        on_part()
        yield part.chunk


def _total_bytes(index: weights_pb2.WeightsIndex, what: str) -> int:
    described = sum(entry.size_bytes for entry in index.tensors)
    if described != index.total_bytes:
        raise WireError(f"{what}: the tensors have {described} bytes, the index announces {index.total_bytes}")
    return described


def _verified(index: weights_pb2.WeightsIndex, payload: memoryview, what: str) -> dict[str, np.ndarray[Any, Any]]:
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    for entry in index.tensors:
        data = payload[entry.offset : entry.offset + entry.size_bytes]
        if xxh3(data) != entry.xxh3_128:
            raise WeightsError(f"{what}: {entry.name} does not match its checksum {entry.xxh3_128[:12]}")
        arrays[entry.name] = from_bytes(data, entry.dtype, entry.shape)
    actual = weights_sha256(index.tensors)
    if actual != index.ref.sha256:
        raise WeightsError(f"{what}: the tensors hash to {actual[:12]}, their name says {index.ref.sha256[:12]}")
    return arrays
