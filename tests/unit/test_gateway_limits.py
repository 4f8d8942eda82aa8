"""Rates and quotas of keys: who is stopped, by how much, what the refusal says, what gives room again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis.asyncio import Redis

from stillhouse.core.keys import create_key
from stillhouse.core.queue import keys
from stillhouse.core.queue.quotas import WINDOW_MS, Quotas
from stillhouse.gateway.routes import deadline
from tests.gateway_kit import Gateway, make_spec, open_gateway, problem

TOKENS = 3 * 2 * 1 * 8
"""Of a job of the kit: steps x prompts x group size x max_tokens."""


@pytest.fixture
async def gateway(redis_url: str, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with open_gateway(redis_url, tmp_path) as opened:
        yield opened


def client(gateway: Gateway, name: str, **limits: float) -> httpx.AsyncClient:
    """The gateway, called with a new key that has limits of its own."""
    options: dict[str, Any] = {"owner": "alice", "limits": limits}
    key = create_key(gateway.ctx.settings.keys_path(), name, **options)
    return httpx.AsyncClient(
        transport=gateway.http._transport, base_url="http://gateway", headers={"Authorization": f"Bearer {key}"}
    )


async def submit(http: httpx.AsyncClient, **headers: str) -> httpx.Response:
    return await http.post("/v1/jobs", json=make_spec(), headers=headers)


@pytest.mark.parametrize("rate", [1, 7, 30])
async def test_a_bucket_lets_a_minutes_worth_through_and_then_the_rate(redis_url: str, rate: int) -> None:
    """The slow oracle: after a burst, request n passes when n/rate minutes went by since the bucket was full."""
    async with Redis.from_url(redis_url) as redis:
        quotas = Quotas(redis)
        answers = await asyncio.gather(*(quotas.take("k", {"requests": rate}) for _ in range(min(rate, 60))))
        assert {name for name, _ in answers} == {""}
        bucket = keys.rate("k", "requests")
        seconds, microseconds = await redis.time()
        now = seconds * 1000 + microseconds / 1000
        await redis.set(bucket, now + WINDOW_MS)  # as after a whole minute's worth
        name, wait_s = await quotas.take("k", {"requests": rate})
        assert name == "requests"
        assert 0 < wait_s <= 60 / rate + 0.001
        await redis.set(bucket, now + WINDOW_MS - 60_000 / rate)  # one came back
        assert (await quotas.take("k", {"requests": rate}))[0] == ""
        assert 0 < await redis.pttl(bucket) <= WINDOW_MS + 1
        await redis.delete(bucket)


async def test_a_request_that_one_rate_refuses_costs_nothing_of_the_other(redis_url: str) -> None:
    async with Redis.from_url(redis_url) as redis:
        quotas = Quotas(redis)
        rates = {"requests": 100.0, "writes": 1.0}
        assert (await quotas.take("k", rates))[0] == ""
        before = await redis.get(keys.rate("k", "requests"))
        assert (await quotas.take("k", rates))[0] == "writes"
        assert await redis.get(keys.rate("k", "requests")) == before
        assert (await quotas.take("other", rates))[0] == ""


async def test_too_many_requests_are_told_when_to_go_on(gateway: Gateway) -> None:
    async with client(gateway, "slow", requests_per_minute=3, writes_per_minute=1) as http:
        assert (await submit(http)).status_code == 201
        refused = await submit(http)
        assert problem(refused, 429)["code"] == "rate_limited"
        assert "'slow' sent more than its 1 writes per minute" in refused.json()["detail"]
        assert 50 < int(refused.headers["retry-after"]) <= 60
        assert [(await http.get("/v1/jobs")).status_code for _ in range(3)] == [200, 200, 429]
        assert (await http.get("/healthz")).status_code == 200
    assert (await gateway.http.get("/v1/jobs")).status_code == 200  # another key


async def test_replicas_share_the_counters(gateway: Gateway, redis_url: str, tmp_path: Path) -> None:
    limits = {"requests_per_minute": 2}
    async with client(gateway, "slow", **limits) as http, open_gateway(redis_url, tmp_path / "second") as other:
        twin = create_key(other.ctx.settings.keys_path(), "slow", limits=limits)  # a key is counted by its name
        headers = {"Authorization": f"Bearer {twin}"}
        assert (await http.get("/v1/models")).status_code == 200
        assert (await other.http.get("/v1/models", headers=headers)).status_code == 200
        assert (await http.get("/v1/models")).status_code == 429
        assert (await other.http.get("/v1/models", headers=headers)).status_code == 429


async def test_at_most_so_many_jobs_are_active_also_when_all_come_at_once(gateway: Gateway) -> None:
    async with client(gateway, "few", active_jobs=2) as http, client(gateway, "second", active_jobs=2) as second:
        answers = await asyncio.gather(*(submit(http) for _ in range(6)))
        assert sorted(answer.status_code for answer in answers) == [201, 201, *[403] * 4]
        refused = problem(await submit(second), 403)  # one owner, another key
        assert refused["code"] == "quota_exceeded"
        assert "'alice' has 2 jobs that have not ended, and may have 2" in refused["detail"]
        job = next(answer for answer in answers if answer.status_code == 201).json()["id"]
        assert (await http.get("/v1/keys/me")).json()["usage"]["active_jobs"] == 2
        await http.post(f"/v1/jobs/{job}/cancel")
        assert (await submit(second)).status_code == 201


async def test_tokens_are_limited_per_job_and_per_day(gateway: Gateway) -> None:
    async with client(gateway, "small", job_tokens=TOKENS - 1) as http:
        refused = problem(await submit(http), 403)
        assert refused["code"] == "quota_exceeded"
        assert f"asks for {TOKENS} completion tokens" in refused["detail"]
        assert f"may ask for {TOKENS - 1}" in refused["detail"]
    async with client(gateway, "daily", job_tokens=TOKENS, daily_tokens=2 * TOKENS) as http:
        assert (
            await http.post("/v1/jobs", json=make_spec(student={"model": "none"}))
        ).status_code == 422  # costs nothing
        first = await submit(http, **{"Idempotency-Key": "a"})
        again = await submit(http, **{"Idempotency-Key": "a"})  # a replay costs nothing either
        assert (first.status_code, again.json()["id"]) == (201, first.json()["id"])
        assert (await http.get("/v1/keys/me")).json()["usage"]["daily_tokens"] == TOKENS
        assert (await submit(http)).status_code == 201
        assert f"has asked for {2 * TOKENS} today" in problem(await submit(http), 403)["detail"]


async def test_one_idempotency_key_takes_one_place(gateway: Gateway) -> None:
    async with client(gateway, "few", active_jobs=20) as http:
        answers = await asyncio.gather(*(submit(http, **{"Idempotency-Key": "same"}) for _ in range(8)))
        assert len({answer.json()["id"] for answer in answers}) == 1
        usage = (await http.get("/v1/keys/me")).json()["usage"]
        assert (usage["active_jobs"], usage["daily_tokens"]) == (1, TOKENS)


async def test_a_job_that_is_recorded_after_its_deadline_counts(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a slow queue server would give jobs for nothing."""
    create, answers = gateway.ctx.jobs.create, asyncio.Event()

    async def create_slowly(*args: Any, **options: Any) -> str:
        made = await create(*args, **options)
        await answers.wait()
        return made

    monkeypatch.setattr(gateway.ctx.jobs, "create", create_slowly)
    async with client(gateway, "daily", daily_tokens=2 * TOKENS) as http:
        with monkeypatch.context() as hurried:
            hurried.setattr(deadline, "REQUEST_TIMEOUT_S", 0.3)
            assert "may be done all the same" in problem(await submit(http, **{"Idempotency-Key": "a"}), 503)["detail"]
        answers.set()
        again = await submit(http, **{"Idempotency-Key": "a"})
        assert again.status_code == 201
        assert [job["id"] for job in (await http.get("/v1/jobs")).json()["data"]] == [again.json()["id"]]
        usage = (await http.get("/v1/keys/me")).json()["usage"]
        assert (usage["active_jobs"], usage["daily_tokens"]) == (1, TOKENS)


async def test_files_of_an_owner_are_limited_together(gateway: Gateway) -> None:
    row = b'{"prompt": "%s"}\n' % (b"x" * 600)
    jsonl = {"Content-Type": "application/jsonl"}
    async with client(gateway, "small", file_mib=1000 / (1 << 20)) as http:
        first = await http.post("/v1/files", content=row, headers=jsonl)
        assert first.status_code == 201
        assert (await http.post("/v1/files", content=row, headers=jsonl)).status_code == 201  # the same file
        other = row.replace(b"x", b"y")
        assert problem(await http.post("/v1/files", content=other, headers=jsonl), 403)["code"] == "quota_exceeded"
        assert (await http.delete(f"/v1/files/{first.json()['id']}")).status_code == 200
        assert (await http.post("/v1/files", content=other, headers=jsonl)).status_code == 201
    assert not list((gateway.ctx.artifacts.root / "files").glob(".upload.*"))


async def test_administrators_have_only_the_limits_of_their_key(redis_url: str, tmp_path: Path) -> None:
    async with open_gateway(redis_url, tmp_path, limit_requests_per_minute=2) as gateway:
        path = gateway.ctx.settings.keys_path()
        for name, limits, passes in (("boss", {}, 4), ("careful", {"requests_per_minute": 3}, 3)):
            headers = {"Authorization": f"Bearer {create_key(path, name, scopes=['admin'], limits=limits)}"}
            statuses = [(await gateway.http.get("/v1/models", headers=headers)).status_code for _ in range(4)]
            assert statuses == [*[200] * passes, *[429] * (4 - passes)], name
        me = {"Authorization": f"Bearer {create_key(path, 'user', limits={'active_jobs': 7})}"}
        limits = (await gateway.http.get("/v1/keys/me", headers=me)).json()["limits"]
        assert (limits["requests_per_minute"], limits["active_jobs"], limits["writes_per_minute"]) == (2, 7, 600)


async def test_without_the_queue_server_files_are_still_read(redis_url: str, tmp_path: Path) -> None:
    async with open_gateway("redis://127.0.0.1:1/0", tmp_path) as gateway:
        gateway.ctx.redis.get_retry().update_retries(0)  # type: ignore[union-attr]
        for _ in range(3):
            assert (await gateway.http.get("/v1/files")).status_code == 200
        problem(await gateway.submit(), 503)
