"""What a worker's claims cost an entry when the worker ends: a crash counts, everything that is expected does not."""

from __future__ import annotations

import asyncio

import pytest
import structlog
from redis.exceptions import ConnectionError as RedisConnectionError

from stillhouse.core.errors import StaleWeightsError
from stillhouse.core.queue import keys
from stillhouse.core.queue.claims import Claims
from stillhouse.core.queue.client import connect, connect_blocking
from stillhouse.core.queue.streams import MAX_DELIVERIES, Outcome, Scope, WorkQueue

SCOPE = Scope("job_claims", 1)
STREAM = keys.prompts(SCOPE.job_id, SCOPE.epoch)
EXPECTED = (StaleWeightsError("no weights"), RedisConnectionError("gone"), OSError("gone"))


async def deliveries_after(redis_url: str, *ends: BaseException | None) -> int:
    """How often an entry counts as delivered to the worker that comes after workers which ended so."""
    redis, blocking = connect(redis_url), connect_blocking(redis_url)
    queue = WorkQueue(redis, blocking)
    await redis.hset(keys.job(SCOPE.job_id), "epoch", "1")  # type: ignore[misc]
    await queue.open_stream(SCOPE, STREAM, keys.SAMPLERS_GROUP)
    assert await queue.add(SCOPE, STREAM, "plan:0:0", b"group") is Outcome.DONE
    try:
        for number, end in enumerate(ends):
            try:
                async with Claims(queue, f"sampler-{number}", 60.0, structlog.get_logger()) as claims:
                    taken = await claims.take_over(STREAM, keys.SAMPLERS_GROUP, 1)
                    assert taken or await claims.take([STREAM], keys.SAMPLERS_GROUP, 1)
                    if end is not None:
                        raise end
            except BaseException as error:
                if error is not end:
                    raise
        [entry] = await queue.reclaim(STREAM, keys.SAMPLERS_GROUP, "last", 60.0, 1)
        return entry.deliveries
    finally:
        await redis.aclose()
        await blocking.aclose()


async def test_who_stops_or_loses_a_service_hands_back_for_free(redis_url: str) -> None:
    assert await deliveries_after(redis_url, None, *EXPECTED) == 1


@pytest.mark.parametrize("end", [AttributeError("a bug"), asyncio.CancelledError()], ids=["crash", "hang"])
async def test_a_crash_or_hang_counts_so_that_a_poisoned_entry_is_given_up(redis_url: str, end: BaseException) -> None:
    assert await deliveries_after(redis_url, *[end] * MAX_DELIVERIES) > MAX_DELIVERIES


@pytest.mark.parametrize("crashes", [1, 2])
async def test_crashes_are_remembered_through_a_drain(redis_url: str, crashes: int) -> None:
    assert await deliveries_after(redis_url, *[ValueError("a bug")] * crashes, None) == 1 + crashes
