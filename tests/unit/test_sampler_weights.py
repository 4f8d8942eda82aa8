"""Pulled weights are what their name says, or they are refused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from stillhouse.core.blobs import xxh3
from stillhouse.core.errors import WeightsError, WireError
from stillhouse.core.pulls import fetch_weights
from stillhouse.core.queue.streams import Scope
from stillhouse.core.rpc import chunks
from stillhouse.core.tasks import cancel_all
from stillhouse.core.tensors import DTYPE_NAMES
from stillhouse.core.weights import weights_sha256
from stillhouse.core.worker import ComputeThread
from stillhouse.sampler.student import Student
from stillhouse.v1 import tensor_pb2, trainer_pb2, weights_pb2

SCOPE = Scope("job_weights", 3)
ARRAYS = {
    "b.weight": np.arange(600_000, dtype=np.float32).reshape(2, -1),
    "a.weight": np.arange(5, dtype=np.float32),
    "scalar": np.float32(3).reshape(()),
}


class FakeTrainer:
    """A peer that streams ARRAYS; `change` spoils the message it is given."""

    what = "trainer"

    def __init__(self, change: Callable[[int, Any], None] = lambda number, part: None) -> None:
        self._change = change
        self.num_parts = 0
        self.request: trainer_pb2.FetchWeightsRequest | None = None

    async def stream(self, method: str, request: Any, *, timeout_s: float) -> AsyncIterator[Any]:
        assert method == "FetchWeights"
        self.request = request
        for number, part in enumerate(_parts()):
            self._change(number, part)
            self.num_parts += 1
            yield part


def _parts() -> list[Any]:
    entries, payload = [], b""
    for name, array in ARRAYS.items():
        data = array.tobytes()
        entries.append(
            weights_pb2.TensorEntry(
                name=name,
                dtype=DTYPE_NAMES["float32"],
                shape=array.shape,
                offset=len(payload),
                size_bytes=len(data),
                xxh3_128=xxh3(data),
            )
        )
        payload += data
    ref = weights_pb2.WeightsRef(epoch=3, policy_version=7, sha256=weights_sha256(entries))
    index = weights_pb2.WeightsIndex(ref=ref, tensors=entries, total_bytes=len(payload))
    parts: list[Any] = [trainer_pb2.FetchWeightsResponse(index=index)]
    for offset, data in chunks(payload):
        parts.append(trainer_pb2.FetchWeightsResponse(chunk=tensor_pb2.Chunk(offset=offset, data=data)))
    return parts


async def fetch(trainer: Any, **options: Any) -> Any:
    return await fetch_weights(trainer, SCOPE, **options)


async def test_weights_arrive_as_they_were_sent() -> None:
    trainer = FakeTrainer()
    weights = await fetch(trainer, exact_version=7)
    assert trainer.request is not None
    assert (trainer.request.job_id, trainer.request.epoch, trainer.request.weights.policy_version) == (
        "job_weights",
        3,
        7,
    )
    assert weights.ref.policy_version == 7
    assert set(weights.arrays) == set(ARRAYS)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(weights.arrays[name], array)


async def test_only_the_name_is_fetched_of_weights_at_hand() -> None:
    trainer = FakeTrainer()
    sha256 = _parts()[0].index.ref.sha256
    weights = await fetch(trainer, have_sha256=sha256)
    assert weights.ref.policy_version == 7
    assert not weights.arrays
    assert trainer.num_parts == 1


def _flip_a_bit(number: int, part: Any) -> None:
    if number == 2:
        data = bytearray(part.chunk.data)
        data[17] ^= 1
        part.chunk.data = bytes(data)


def _lose_a_part(number: int, part: Any) -> None:
    if number == 2:
        part.chunk.data = b""


def _rename(number: int, part: Any) -> None:
    if number == 0:
        part.index.tensors[0].name = "c.weight"


def _claim_too_much(number: int, part: Any) -> None:
    if number == 0:
        part.index.total_bytes += 1 << 40


def _start_with_a_chunk(number: int, part: Any) -> None:
    if number == 0:
        part.chunk.offset = 0


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (_flip_a_bit, WeightsError),
        (_lose_a_part, WireError),
        (_rename, WeightsError),
        (_claim_too_much, WireError),
        (_start_with_a_chunk, WireError),
    ],
)
async def test_damaged_weights_are_refused(fault: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        await fetch(FakeTrainer(fault))


async def test_an_exact_version_is_not_replaced_by_a_pull_that_was_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Version 0 is in the engine, a hint of version 1 is being followed: a group that needs exactly 0 waits."""
    ctx: Any = SimpleNamespace()
    student, arrived = Student(ctx, ComputeThread("test"), ctx), asyncio.Event()
    student.weights, student.weights_job = weights_pb2.WeightsRef(epoch=3, policy_version=0), SCOPE.job_id
    student.hint = weights_pb2.WeightsRef(epoch=3, policy_version=1)

    async def pull(scope: Scope, exact_version: int | None) -> None:
        if exact_version is None:
            await arrived.wait()
        student.weights = weights_pb2.WeightsRef(epoch=3, policy_version=1 if exact_version is None else exact_version)

    monkeypatch.setattr(student, "_pull", pull)
    following = asyncio.create_task(student.follow(SCOPE))
    await asyncio.sleep(0)
    student.is_pinned = True
    ready = asyncio.create_task(student.ensure(SCOPE, exactly=0))
    await asyncio.wait([ready], timeout=0.05)
    assert not ready.done()
    arrived.set()
    await asyncio.gather(following, ready)
    assert student.version(SCOPE) == 0
    await student.follow(SCOPE)
    assert student.version(SCOPE) == 0, "pinned"


async def test_an_engine_goes_on_if_its_pause_is_given_up() -> None:
    """A shift that is halted gives up the pull that it waits for, wherever that is."""
    ctx: Any = SimpleNamespace()
    student, asked, goes_on = Student(ctx, ComputeThread("test"), ctx), asyncio.Event(), asyncio.Event()

    async def pause() -> None:
        asked.set()
        await asyncio.Event().wait()

    async def resume() -> None:
        goes_on.set()

    engine: Any = SimpleNamespace(pause=pause, resume=resume)
    student.engine = engine
    replacing = asyncio.create_task(student._replace(await fetch(FakeTrainer())))
    await asked.wait()
    await cancel_all([replacing])
    assert goes_on.is_set()
    assert student.weights is None
