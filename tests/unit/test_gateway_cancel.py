"""Cancelling a job whose trainer is faster than the gateway that passes the wish on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from stillhouse.core import failpoints
from stillhouse.core.queue import keys
from stillhouse.core.queue.streams import Scope
from tests.gateway_kit import Gateway, open_gateway


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    failpoints.install(None)


async def cancelled(gateway: Gateway) -> list[str]:
    """Statuses that the events tell of a running job that was cancelled."""
    job_id = (await gateway.submit()).json()["id"]
    scope = Scope(job_id, await gateway.ctx.jobs.claim(job_id, "trainer-a", 5.0, 0))
    await gateway.ctx.jobs.update(scope, status="running")
    assert (await gateway.http.post(f"/v1/jobs/{job_id}/cancel")).status_code == 202
    events = await gateway.ctx.jobs.events(job_id)
    return [event["data"]["status"] for event in events if event["type"] == "job.status"]


async def test_a_wish_is_told_once(redis_url: str, tmp_path: Path) -> None:
    async with open_gateway(redis_url, tmp_path) as gateway:
        assert await cancelled(gateway) == ["queued", "cancelling"]


async def test_an_end_that_the_trainer_has_told_is_not_told_again(redis_url: str, tmp_path: Path) -> None:
    def end_it(point: str, detail: str) -> None:
        if point == "gateway.cancel_requested":
            with Redis.from_url(redis_url) as redis:
                job_ids: Any = redis.zrange(keys.JOBS, 0, -1)
                redis.hset(keys.job(job_ids[0].decode()), "status", "cancelled")

    failpoints.install(end_it)
    async with open_gateway(redis_url, tmp_path) as gateway:
        assert await cancelled(gateway) == ["queued"]
