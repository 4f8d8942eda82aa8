"""Job records: created once, claimed by one, fenced by epoch. On a real server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from stillhouse.core.blobs import Artifacts, read_jsonl
from stillhouse.core.errors import ConflictError, LeaseLostError, NotFoundError
from stillhouse.core.queue import keys
from stillhouse.core.queue.client import connect
from stillhouse.core.queue.jobs import JobRecord, JobStore
from stillhouse.core.queue.registry import Registry
from stillhouse.core.queue.streams import Scope


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Any]:
    client = connect(redis_url)
    yield client
    await client.aclose()


@pytest.fixture
async def jobs(redis: Any, tmp_path: Path) -> JobStore:
    store = JobStore(redis, Artifacts(tmp_path))
    await store.create(record("job_a"))
    return store


def record(job_id: str, **fields: Any) -> JobRecord:
    return JobRecord(id=job_id, status="queued", spec={"name": "x"}, created_at=1.0, stop_step=4, **fields)


async def test_a_record_reads_back(jobs: JobStore) -> None:
    assert await jobs.get("job_a") == record("job_a")
    with pytest.raises(NotFoundError, match="job_b"):
        await jobs.get("job_b")


async def test_concurrent_retries_of_a_key_make_one_job(jobs: JobStore) -> None:
    answers = await asyncio.gather(
        *(jobs.create(record(f"job_{n}"), idempotency_key="k", body_sha256="h") for n in range(50))
    )
    assert answers.count("") == 1
    assert len({answer for answer in answers if answer}) == 1
    assert len(await jobs.list(limit=100)) == 2


async def test_one_of_many_trainers_gets_the_job(jobs: JobStore) -> None:
    epochs = await asyncio.gather(*(jobs.claim("job_a", f"trainer-{n}", 30, 0) for n in range(20)))
    assert sorted(epochs) == [0] * 19 + [1]


async def test_an_epoch_is_higher_than_any_before_it_in_redis_or_artifacts(jobs: JobStore, redis: Any) -> None:
    assert await jobs.claim("job_a", "a", 30, artifact_epoch=6) == 7
    await redis.delete(keys.lease("job_a"))
    assert await jobs.claim("job_a", "b", 30, artifact_epoch=2) == 8


async def test_a_lost_lease_is_noticed(jobs: JobStore, redis: Any) -> None:
    first = Scope("job_a", await jobs.claim("job_a", "a", 30, 0))
    await jobs.renew(first, "a", 30)
    await redis.delete(keys.lease("job_a"))
    await jobs.claim("job_a", "b", 30, 0)
    with pytest.raises(LeaseLostError):
        await jobs.renew(first, "a", 30)
    with pytest.raises(LeaseLostError):
        await jobs.update(first, step=3)
    assert (await jobs.get("job_a")).step == 0


async def test_a_terminal_job_never_changes_and_is_not_claimed(jobs: JobStore) -> None:
    scope = Scope("job_a", await jobs.claim("job_a", "a", 30, 0))
    await jobs.update(scope, release=True, status="succeeded")
    assert await jobs.active_ids() == []
    assert await jobs.claim("job_a", "b", 30, 0) == 0
    with pytest.raises(ConflictError, match="succeeded"):
        await jobs.request("job_a", allowed=("queued", "running"), status="cancelling")


async def test_events_and_metrics_are_kept_twice_and_the_last_of_a_step_wins(jobs: JobStore, redis: Any) -> None:
    await jobs.event("job_a", "step", "first", step=1)
    await jobs.event("job_a", "step", "second", step=2)
    first, second = await jobs.events("job_a")
    assert await jobs.events("job_a", after=first["id"]) == [second]
    first_claim = Scope("job_a", await jobs.claim("job_a", "a", 30, 0))
    await jobs.metric(first_claim, 3, {"loss": 9.0})
    await redis.delete(keys.lease("job_a"))
    await jobs.metric(Scope("job_a", await jobs.claim("job_a", "b", 30, 0)), 3, {"loss": 1.0})
    with pytest.raises(LeaseLostError):
        await jobs.metric(first_claim, 3, {"loss": 8.0})
    assert [(point["epoch"], point["values"]["loss"]) for point in await jobs.metrics("job_a")] == [(2, 1.0)]
    assert [event["id"] for event in read_jsonl(jobs.artifacts.job("job_a").events)] == [first["id"], second["id"]]


async def test_a_sampler_serves_one_job_and_the_newest_claim_of_it(redis: Any) -> None:
    registry = Registry(redis)
    assert await registry.lease_sampler("s", Scope("job_a", 1), 30)
    assert not await registry.lease_sampler("s", Scope("job_b", 1), 30)
    assert await registry.lease_sampler("s", Scope("job_a", 2), 30)
    assert not await registry.lease_sampler("s", Scope("job_a", 1), 30)
    await registry.release_sampler("s", Scope("job_a", 1))
    assert await registry.assignment("s") == Scope("job_a", 2)
    await registry.release_sampler("s", Scope("job_a", 2))
    assert await registry.assignment("s") is None
