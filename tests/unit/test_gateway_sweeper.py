"""The sweeper: stalled jobs, cancelled jobs without a trainer, records that the queue server lost."""

from __future__ import annotations

import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from stillhouse.core.blobs import read_json, sealed, unsealed, write_json
from stillhouse.core.errors import LeaseLostError
from stillhouse.core.metrics import GATEWAY
from stillhouse.core.queue import keys
from stillhouse.core.queue.jobs import IDEMPOTENCY_TTL_S
from stillhouse.core.queue.registry import ServiceInfo
from stillhouse.core.queue.streams import Scope
from stillhouse.gateway import sweeper as sweeper_module
from stillhouse.gateway.sweeper import Sweeper
from tests.gateway_kit import Gateway, make_spec, open_gateway
from tests.waiting import wait_until


@pytest.fixture
async def gateway(redis_url: str, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with open_gateway(redis_url, tmp_path) as opened:
        yield opened


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patience as in the real thing in proportion, not in length."""
    monkeypatch.setattr(sweeper_module, "GONE_S", 0.2)
    monkeypatch.setattr(sweeper_module, "TAKEOVER_S", 0.8)


async def beat(gateway: Gateway, instance: str, job_id: str = "") -> None:
    """A trainer's heartbeat."""
    await gateway.ctx.registry.beat(ServiceInfo("trainer", instance, "a:1", 1, 0.0, 0.0, job_id=job_id))


async def led(gateway: Gateway, status: str) -> Scope:
    """A job whose trainer vanished a moment ago."""
    job = (await gateway.submit()).json()["id"]
    scope = Scope(job, await gateway.ctx.jobs.claim(job, "trainer-a", 5.0, 0))
    await gateway.ctx.jobs.update(scope, status=status)
    await gateway.ctx.redis.delete(keys.lease(job))
    return scope


async def swept_until(gateway: Gateway, sweeper: Sweeper, job_id: str, status: str, reason: str) -> None:
    async def has_status() -> bool:
        await sweeper.sweep()
        record = await gateway.ctx.jobs.get(job_id)
        return (record.status, record.status_reason) == (status, reason)

    await wait_until(has_status, timeout_s=10, what=f"the sweeper to make the job {status} ({reason})")


@pytest.mark.parametrize("status", ["validating", "starting", "running", "stalled"])
@pytest.mark.parametrize("lease", ["has run out", "is there for a minute"])
async def test_a_job_whose_trainer_is_gone_is_stalled(gateway: Gateway, status: str, lease: str) -> None:
    scope = await led(gateway, status)
    if status == "stalled":  # by its trainer, for another reason
        await gateway.ctx.jobs.update(scope, status_reason="no_teacher")
    if lease == "is there for a minute":
        await gateway.ctx.jobs.renew(scope, "trainer-a", 60.0)
    sweeper = Sweeper(gateway.ctx)
    await sweeper.sweep()
    assert (await gateway.ctx.jobs.get(scope.job_id)).status_reason != "no_trainer", "not at the first look"
    await swept_until(gateway, sweeper, scope.job_id, "stalled", "no_trainer")
    job = (await gateway.http.get(f"/v1/jobs/{scope.job_id}")).json()
    assert "trainer-a" in job["status_message"]
    last = (await gateway.ctx.jobs.events(scope.job_id))[-1]
    assert (last["type"], last["level"], last["data"]["status"]) == ("job.status", "warning", "stalled")
    await sweeper.sweep()
    assert (await gateway.ctx.jobs.events(scope.job_id))[-1] == last, "said once"


@pytest.mark.parametrize("why", ["its lease is gone", "it is a new process of that name", "it leads another job"])
async def test_a_job_that_its_living_trainer_does_not_lead_is_stalled(gateway: Gateway, why: str) -> None:
    scope = await led(gateway, "running")
    if why != "its lease is gone":
        await gateway.ctx.jobs.renew(scope, "trainer-a", 60.0)
    serves = {"its lease is gone": scope.job_id, "it is a new process of that name": ""}.get(why, "job_b")
    await beat(gateway, "trainer-a", serves)
    started = time.monotonic()
    await swept_until(gateway, Sweeper(gateway.ctx), scope.job_id, "stalled", "no_trainer")
    assert time.monotonic() - started > sweeper_module.TAKEOVER_S, "a claim comes before its heartbeat"


async def test_a_job_that_is_led_is_left_alone(gateway: Gateway) -> None:
    scope = await led(gateway, "running")
    await gateway.ctx.jobs.renew(scope, "trainer-a", 60.0)
    await beat(gateway, "trainer-a", scope.job_id)
    gone = Scope((await gateway.submit()).json()["id"], 1)
    await gateway.ctx.jobs.claim(gone.job_id, "trainer-b", 60.0, 0)
    await gateway.ctx.jobs.update(gone, status="running")
    await swept_until(gateway, Sweeper(gateway.ctx), gone.job_id, "stalled", "no_trainer")
    record = await gateway.ctx.jobs.get(scope.job_id)
    assert (record.status, record.status_reason) == ("running", "")


async def test_a_queued_job_says_that_no_trainer_is_there_and_stays_queued(gateway: Gateway) -> None:
    job = (await gateway.submit()).json()["id"]
    sweeper = Sweeper(gateway.ctx)
    await swept_until(gateway, sweeper, job, "queued", "no_trainer")
    assert "no trainer" in (await gateway.http.get(f"/v1/jobs/{job}")).json()["status_message"]
    await beat(gateway, "trainer-a", "job_b")
    await swept_until(gateway, sweeper, job, "queued", "")
    assert (await gateway.ctx.jobs.get(job)).status_message == "", "it waits for its turn"


async def test_a_frozen_trainer_keeps_a_cancelled_job_until_its_lease_has_run_out(gateway: Gateway) -> None:
    scope = await led(gateway, "running")
    await gateway.ctx.jobs.renew(scope, "trainer-a", 1.5)
    await gateway.http.post(f"/v1/jobs/{scope.job_id}/cancel")
    started = time.monotonic()
    await swept_until(gateway, Sweeper(gateway.ctx), scope.job_id, "cancelled", "user")
    assert time.monotonic() - started > 1.4, "while it holds the lease it may still be committing"


async def test_a_new_claim_starts_the_clock_again(gateway: Gateway) -> None:
    scope = await led(gateway, "running")
    sweeper = Sweeper(gateway.ctx)
    await sweeper.sweep()
    orphan = sweeper._orphans[scope.job_id]
    await gateway.ctx.jobs.claim(scope.job_id, "trainer-b", 5.0, 0)
    await gateway.ctx.redis.delete(keys.lease(scope.job_id))
    await sweeper.sweep()
    assert sweeper._orphans[scope.job_id].epoch == orphan.epoch + 1
    assert sweeper._orphans[scope.job_id].since > orphan.since


async def test_a_cancelled_job_without_trainer_ends_and_fences_the_old_one(gateway: Gateway) -> None:
    scope = await led(gateway, "running")
    await gateway.http.post(f"/v1/jobs/{scope.job_id}/cancel")
    prompts = keys.prompts(scope.job_id, scope.epoch)
    await gateway.ctx.queue.open_stream(scope, prompts, keys.SAMPLERS_GROUP)
    index = keys.teacher("0" * 64)
    await gateway.ctx.redis.sadd(keys.TEACHERS, "0" * 64)
    await gateway.ctx.redis.hset(index, keys.rollouts(scope.job_id, scope.epoch, "main"), b"task")
    await swept_until(gateway, Sweeper(gateway.ctx), scope.job_id, "cancelled", "user")
    assert not await gateway.ctx.redis.exists(prompts, index), "nothing of its epochs stays behind"
    assert read_json(gateway.ctx.artifacts.job(scope.job_id).root / "final.json")["status"] == "cancelled"
    with pytest.raises(LeaseLostError):
        await gateway.ctx.jobs.update(scope, status="running")
    assert await gateway.ctx.jobs.active_ids() == []


async def test_records_come_back_after_the_queue_server_lost_everything(gateway: Gateway) -> None:
    open_job = (await gateway.submit(make_spec(seed=1), key="k")).json()
    done_job = (await gateway.submit(make_spec(seed=2))).json()
    final = {"status": "succeeded", "step": 3, "finished_at": 5.0, "result": {"steps": 3}, "error": None}
    write_json(gateway.ctx.artifacts.job(done_job["id"]).root / "final.json", sealed(final))
    await gateway.ctx.redis.flushall()
    sweeper = Sweeper(gateway.ctx)
    await sweeper.sweep()
    assert (await gateway.http.get(f"/v1/jobs/{open_job['id']}")).json() == open_job
    done = (await gateway.http.get(f"/v1/jobs/{done_job['id']}")).json()
    assert (done["status"], done["progress"]["percent"], done["result"]) == ("succeeded", 100.0, {"steps": 3})
    assert await gateway.ctx.jobs.active_ids() == [open_job["id"]]
    again = await gateway.submit(make_spec(seed=1), key="k")
    assert again.json()["id"] == open_job["id"], "its key is known again too"
    before = await gateway.ctx.redis.dbsize()
    await sweeper.sweep()
    assert await gateway.ctx.redis.dbsize() == before


async def test_a_record_that_comes_back_knows_its_early_end_and_its_best_checkpoint(gateway: Gateway) -> None:
    job_id = (await gateway.submit()).json()["id"]
    job = gateway.ctx.artifacts.job(job_id)
    write_json(job.final, sealed({"status": "succeeded", "step": 2, "finished_at": 5.0, "result": {"steps": 2}}))
    write_json(job.stop, sealed({"stop_step": 2, "step": 1}))
    write_json(job.best_checkpoint, sealed({"checkpoint": "ckpt_1-00000001-0123abcd", "step": 1}))
    await gateway.ctx.redis.flushdb()
    await Sweeper(gateway.ctx).sweep()
    record = await gateway.ctx.jobs.get(job_id)
    assert (record.stop_step, record.best_checkpoint) == (2, "ckpt_1-00000001-0123abcd")
    assert (await gateway.http.get(f"/v1/jobs/{job_id}")).json()["progress"]["percent"] == 100


async def test_a_job_that_was_written_but_never_recorded_does_not_become_a_second_one(gateway: Gateway) -> None:
    job = (await gateway.submit(key="k")).json()["id"]
    root = gateway.ctx.artifacts.root / "jobs"
    twin = "job_00000000000000000000"  # its request died between job.json and the record; the client sent it again
    write_json(root / twin / "job.json", sealed({**unsealed(root / job / "job.json"), "id": twin}))
    await Sweeper(gateway.ctx).sweep()
    assert gateway.ctx.artifacts.job_ids() == [job]
    assert not (root / twin).exists()
    assert [record.id for record in await gateway.ctx.jobs.list()] == [job]


@pytest.mark.parametrize("why", ["it has a history", "its key is forgotten", "the key is of nobody"])
async def test_a_job_whose_key_another_one_has_is_never_deleted(gateway: Gateway, why: str) -> None:
    job = (await gateway.submit(key="k")).json()["id"]
    root = gateway.ctx.artifacts.root / "jobs"
    lost = "job_00000000000000000000"
    document = {**unsealed(root / job / "job.json"), "id": lost}
    if why == "its key is forgotten":
        document["created_at"] = time.time() - IDEMPOTENCY_TTL_S - 1
    write_json(root / lost / "job.json", sealed(document))
    if why == "it has a history":
        (root / lost / "events.jsonl").write_text("")
    if why == "the key is of nobody":
        shutil.rmtree(root / job)
    await Sweeper(gateway.ctx).sweep()
    assert (root / lost / "job.json").is_file()
    assert {record.id for record in await gateway.ctx.jobs.list()} == {job, lost}


async def test_a_damaged_job_does_not_stop_the_sweep(gateway: Gateway) -> None:
    folder = gateway.ctx.artifacts.root / "jobs" / "job_00000000000000000000"
    folder.mkdir(parents=True)
    (folder / "job.json").write_text("{")
    job = (await gateway.submit()).json()["id"]
    await gateway.ctx.redis.flushall()
    await Sweeper(gateway.ctx).sweep()
    assert [record.id for record in await gateway.ctx.jobs.list()] == [job]


@pytest.mark.parametrize(
    ("damage", "has_export", "status"),
    [("flip", True, "succeeded"), ("flip", False, "failed"), ("empty", True, "succeeded"), ("cut", False, "failed")],
)
async def test_a_damaged_end_never_starts_the_job_again(
    gateway: Gateway, damage: str, has_export: bool, status: str
) -> None:
    job = (await gateway.submit()).json()["id"]
    artifacts = gateway.ctx.artifacts.job(job)
    artifacts.epoch(1).mkdir(parents=True)
    if has_export:
        artifacts.export(1).mkdir()
        checkpoint = artifacts.manifests(1) / "00000003-01234567"
        checkpoint.mkdir(parents=True)
        (checkpoint / "manifest.json").write_text("{}")
    write_json(artifacts.root / "final.json", sealed({"status": "succeeded", "step": 3, "finished_at": 5.0}))
    data = (artifacts.root / "final.json").read_bytes()
    damaged = {"flip": data.replace(b"5.0", b"6.0"), "empty": b"", "cut": data[: len(data) // 2]}[damage]
    (artifacts.root / "final.json").write_bytes(damaged)
    await gateway.ctx.redis.flushall()
    await Sweeper(gateway.ctx).sweep()
    found = (await gateway.http.get(f"/v1/jobs/{job}")).json()
    assert (found["status"], found["status_reason"]) == (status, "corrupt")
    assert await gateway.ctx.jobs.active_ids() == []


async def test_an_altered_job_json_is_not_run(gateway: Gateway) -> None:
    job = (await gateway.submit()).json()["id"]
    path = gateway.ctx.artifacts.job(job).job_json
    path.write_bytes(path.read_bytes().replace(b'"max_tokens": 8', b'"max_tokens": 9'))
    await gateway.ctx.redis.flushall()
    await Sweeper(gateway.ctx).sweep()
    assert await gateway.ctx.jobs.list() == []


async def test_an_end_that_found_no_room_is_written_later(gateway: Gateway) -> None:
    job = (await gateway.submit()).json()["id"]
    await gateway.ctx.jobs.request(job, allowed=("queued",), status="cancelled")
    await Sweeper(gateway.ctx).sweep()
    assert unsealed(gateway.ctx.artifacts.job(job).root / "final.json")["status"] == "cancelled"


async def test_one_replica_sweeps(gateway: Gateway) -> None:
    first, second = Sweeper(gateway.ctx), Sweeper(gateway.ctx)
    gateway.ctx.instance = "gateway-1"
    assert await first.hold()
    gateway.ctx.instance = "gateway-2"
    assert not await second.hold()
    await second.release()
    assert not await second.hold(), "only the holder can release"
    gateway.ctx.instance = "gateway-1"
    assert await first.hold()
    await first.release()
    gateway.ctx.instance = "gateway-2"
    assert await second.hold()


async def test_queue_gauges(gateway: Gateway) -> None:
    scope = await led(gateway, "running")
    queue = gateway.ctx.queue
    prompts, rollouts = keys.prompts(scope.job_id, 1), keys.rollouts(scope.job_id, 1, "main")
    await queue.open_stream(scope, prompts, keys.SAMPLERS_GROUP)
    await queue.open_stream(scope, rollouts, keys.TEACHERS_GROUP)
    for number in range(3):
        await queue.add(scope, prompts, f"p{number}", b"x")
    await queue.add(scope, rollouts, "r", b"x")
    await Sweeper(gateway.ctx).sweep()
    values = {
        stage: GATEWAY.get_sample_value("stillhouse_queue_entries", {"stage": stage})
        for stage in ("prompts", "rollouts", "scored")
    }
    assert values == {"prompts": 3, "rollouts": 1, "scored": 0}
