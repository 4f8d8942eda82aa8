"""Pause and resume: what the gateway and the sweeper do, on a real queue server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from stillhouse.core.errors import LeaseLostError
from stillhouse.core.queue import keys
from stillhouse.core.queue.streams import Scope
from stillhouse.core.queue.turns import CLAIMABLE
from stillhouse.gateway import sweeper as sweeper_module
from stillhouse.gateway.sweeper import Sweeper
from tests.gateway_kit import Gateway, open_gateway, problem
from tests.waiting import wait_until


@pytest.fixture
async def gateway(redis_url: str, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with open_gateway(redis_url, tmp_path) as opened:
        yield opened


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeper_module, "GONE_S", 0.1)
    monkeypatch.setattr(sweeper_module, "TAKEOVER_S", 0.2)


async def submitted(gateway: Gateway) -> str:
    return (await gateway.submit()).json()["id"]


async def running(gateway: Gateway) -> Scope:
    """A job that a trainer leads."""
    job_id = await submitted(gateway)
    scope = Scope(job_id, await gateway.ctx.jobs.claim(job_id, "trainer-a", 60.0, 0))
    await gateway.ctx.jobs.update(scope, status="running", step=2)
    return scope


async def told(gateway: Gateway, job_id: str, verb: str) -> str:
    """The status that a verb answers with."""
    answer = await gateway.http.post(f"/v1/jobs/{job_id}/{verb}")
    assert answer.status_code == 202, answer.text
    return answer.json()["status"]


def is_wished(gateway: Gateway, job_id: str) -> bool:
    return gateway.ctx.artifacts.job(job_id).paused.exists()


async def statuses(gateway: Gateway, job_id: str) -> list[str]:
    events = await gateway.ctx.jobs.events(job_id)
    return [event["data"]["status"] for event in events if event["type"] == "job.status"]


async def test_a_queued_job_pauses_at_once_and_has_no_turn_until_it_is_resumed(gateway: Gateway) -> None:
    job_id = await submitted(gateway)
    assert [await told(gateway, job_id, "pause") for _ in range(2)] == ["paused", "paused"]
    assert is_wished(gateway, job_id)
    assert await gateway.ctx.jobs.claim(job_id, "trainer-a", 60.0, 0) == 0
    assert [await told(gateway, job_id, "resume") for _ in range(2)] == ["resuming", "resuming"]
    assert not is_wished(gateway, job_id)
    assert await gateway.ctx.jobs.claim(job_id, "trainer-a", 60.0, 0) == 1
    assert await statuses(gateway, job_id) == ["queued", "paused", "resuming"], "each is told once"


async def test_a_running_job_is_asked_to_pause(gateway: Gateway) -> None:
    scope = await running(gateway)
    assert [await told(gateway, scope.job_id, "pause") for _ in range(2)] == ["pausing", "pausing"]
    job = (await gateway.http.get(f"/v1/jobs/{scope.job_id}")).json()
    assert (job["status_reason"], job["is_terminal"]) == ("user", False)
    assert "trainer" in job["status_message"]
    assert await told(gateway, scope.job_id, "resume") == "resuming", "before the trainer has stopped"


@pytest.mark.parametrize("verb", ["pause", "resume"])
@pytest.mark.parametrize("status", ["succeeded", "failed", "cancelled", "cancelling"])
async def test_what_ends_or_has_ended_is_neither_paused_nor_resumed(gateway: Gateway, verb: str, status: str) -> None:
    scope = await running(gateway)
    await gateway.ctx.jobs.update(scope, status=status)
    body = problem(await gateway.http.post(f"/v1/jobs/{scope.job_id}/{verb}"), 409)
    assert status in body["detail"]
    assert not is_wished(gateway, scope.job_id)


@pytest.mark.parametrize(
    ("before", "after"), [("pausing", "cancelling"), ("paused", "cancelled"), ("resuming", "cancelling")]
)
async def test_cancel_works_in_every_state(gateway: Gateway, before: str, after: str) -> None:
    scope = await running(gateway)
    await gateway.ctx.jobs.update(scope, status=before, release=before != "pausing")
    assert await told(gateway, scope.job_id, "cancel") == after
    assert gateway.ctx.artifacts.job(scope.job_id).final.exists() == (after == "cancelled")


async def test_a_trainer_that_dies_while_pausing_leaves_a_paused_job(gateway: Gateway) -> None:
    scope = await running(gateway)
    await told(gateway, scope.job_id, "pause")
    sweeper = Sweeper(gateway.ctx)
    await sweeper.sweep()
    await sweeper.sweep()
    assert (await gateway.ctx.jobs.get(scope.job_id)).status == "pausing", "its lease has not run out"
    await gateway.ctx.redis.delete(keys.lease(scope.job_id))

    async def is_paused() -> bool:
        await sweeper.sweep()
        return (await gateway.ctx.jobs.get(scope.job_id)).status == "paused"

    await wait_until(is_paused, timeout_s=10, what="the sweeper to pause the job")
    with pytest.raises(LeaseLostError):  # it was only frozen
        await gateway.ctx.jobs.renew(scope, "trainer-a", 60.0)
    assert (await gateway.ctx.jobs.get(scope.job_id)).step == 2


async def test_a_paused_job_stays_paused_when_the_queue_server_loses_everything(gateway: Gateway) -> None:
    scope = await running(gateway)
    gateway.ctx.artifacts.job(scope.job_id).epoch(scope.epoch).mkdir(parents=True)
    await told(gateway, scope.job_id, "pause")
    await gateway.ctx.redis.flushdb()
    await Sweeper(gateway.ctx).sweep()
    record = await gateway.ctx.jobs.get(scope.job_id)
    assert (record.status, record.status_reason) == ("paused", "user")
    with pytest.raises(LeaseLostError):  # the trainer that leads it goes on no more
        await gateway.ctx.jobs.renew(scope, "trainer-a", 60.0)
    assert await told(gateway, scope.job_id, "resume") == "resuming"
    assert await gateway.ctx.jobs.claim(scope.job_id, "trainer-a", 60.0, scope.epoch) > scope.epoch


@pytest.mark.parametrize("status", ["paused", "resuming"])
async def test_the_sweeper_keeps_the_wish_as_the_record_says(gateway: Gateway, status: str) -> None:
    """The gateway died between the record and the file."""
    job_id = await submitted(gateway)
    if status == "resuming":
        await told(gateway, job_id, "pause")
    await gateway.ctx.redis.hset(keys.job(job_id), "status", status)
    await Sweeper(gateway.ctx).sweep()
    assert is_wished(gateway, job_id) == (status == "paused")


def test_a_job_that_rests_is_not_claimable() -> None:
    assert not {"pausing", "paused"} & set(CLAIMABLE)
