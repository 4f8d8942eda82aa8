"""DELETE of jobs, and pages of jobs while they come and go."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from stillhouse.core import failpoints
from stillhouse.core.blobs import new_id
from stillhouse.core.checkpoints import Settled, settle
from stillhouse.core.errors import NotFoundError
from stillhouse.core.failpoints import InjectedError
from stillhouse.core.queue.jobs import JobRecord
from stillhouse.core.queue.streams import Scope
from stillhouse.gateway.sweeper import Sweeper
from tests.gateway_kit import Gateway, open_gateway, problem


@pytest.fixture
async def gateway(redis_url: str, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with open_gateway(redis_url, tmp_path, auth="none") as opened:
        yield opened


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    failpoints.install(None)


async def finished(gateway: Gateway, key: str = "") -> str:
    job_id = (await gateway.submit(key=key)).json()["id"]
    scope = Scope(job_id, await gateway.ctx.jobs.claim(job_id, "trainer-a", 60.0, 0))
    await gateway.ctx.jobs.update(scope, status="failed", release=True, error={"code": "x", "message": "y"})
    await Sweeper(gateway.ctx).sweep()
    return job_id


async def names_left(gateway: Gateway, job_id: str) -> list[str]:
    found = [key.decode() async for key in gateway.ctx.redis.scan_iter(f"*{job_id}*")]
    return found + [str(path) for path in gateway.ctx.artifacts.root.rglob(f"*{job_id}*")]


async def test_nothing_is_left_of_a_deleted_job(gateway: Gateway) -> None:
    job_id = await finished(gateway, key="k")
    assert (await gateway.http.delete(f"/v1/jobs/{job_id}")).status_code == 204
    assert await names_left(gateway, job_id) == []
    problem(await gateway.http.get(f"/v1/jobs/{job_id}"), 404)
    problem(await gateway.http.delete(f"/v1/jobs/{job_id}"), 404)
    await Sweeper(gateway.ctx).sweep()
    assert await gateway.ctx.jobs.list() == []
    again = await gateway.submit(key="k")
    assert (again.status_code, again.json()["id"] == job_id) == (201, False), "its idempotency key is free again"


@pytest.mark.parametrize("status", ["queued", "running", "paused", "cancelling"])
async def test_a_job_that_has_not_ended_is_not_deleted(gateway: Gateway, status: str) -> None:
    job_id = (await gateway.submit()).json()["id"]
    await gateway.ctx.jobs.request(job_id, allowed=("queued",), status=status)
    assert status in problem(await gateway.http.delete(f"/v1/jobs/{job_id}"), 409)["detail"]
    assert gateway.ctx.artifacts.job(job_id).job_json.exists()


async def test_a_job_whose_checkpoint_another_one_needs_is_not_deleted(gateway: Gateway) -> None:
    job_id, other = await finished(gateway), (await gateway.submit()).json()["id"]
    checkpoint = f"{job_id}/ckpt_1-00000002-0123abcd"
    settle(gateway.ctx.artifacts.job(other), {checkpoint: Settled(checkpoint)})
    assert checkpoint in problem(await gateway.http.delete(f"/v1/jobs/{job_id}"), 409)["detail"]
    assert (await gateway.http.get(f"/v1/jobs/{job_id}")).status_code == 200
    await gateway.http.post(f"/v1/jobs/{other}/cancel")
    assert (await gateway.http.delete(f"/v1/jobs/{job_id}")).status_code == 204, "nobody needs it any more"


async def test_the_sweeper_keeps_a_job_that_is_needed_while_its_deletion_is_looked_at(gateway: Gateway) -> None:
    job_id, other = await finished(gateway), (await gateway.submit()).json()["id"]
    checkpoint, artifacts = f"{job_id}/ckpt_1-00000002-0123abcd", gateway.ctx.artifacts
    artifacts.deleted.mkdir()
    artifacts.job(job_id).root.rename(artifacts.deleted / job_id)  # as its deletion does before it looks again
    settle(artifacts.job(other), {checkpoint: Settled(checkpoint)})
    await Sweeper(gateway.ctx).sweep()
    assert artifacts.job(job_id).job_json.exists()
    assert (await gateway.http.get(f"/v1/jobs/{job_id}")).status_code == 200


async def test_a_half_deleted_job_does_not_come_back(gateway: Gateway) -> None:
    job_id = await finished(gateway)

    def die(point: str, detail: str) -> None:
        if point == "gateway.job_put_aside":
            raise InjectedError(point)

    failpoints.install(die)
    assert (await gateway.http.delete(f"/v1/jobs/{job_id}")).status_code == 500
    failpoints.install(None)
    await gateway.ctx.redis.flushdb()
    await Sweeper(gateway.ctx).sweep()
    with pytest.raises(NotFoundError):
        await gateway.ctx.jobs.get(job_id)
    assert await names_left(gateway, job_id) == []


# -- lists -----------------------------------------------------------------------------------------------------------


async def stored(gateway: Gateway, number: int, **fields: Any) -> list[str]:
    """Jobs of two moments and two owners, oldest first."""
    records = [
        JobRecord(new_id("job"), "queued", {}, created_at=float(1000 + index // 4), owner="ab"[index % 2], **fields)
        for index in range(number)
    ]
    for record in records:
        await gateway.ctx.jobs.create(record)
    return [record.id for record in sorted(records, key=lambda record: (record.created_at, record.id))]


async def pages(gateway: Gateway, size: int, **query: Any) -> list[list[str]]:
    found: list[list[str]] = []
    after = ""
    while True:
        answer = await gateway.http.get("/v1/jobs", params={"limit": size, "after": after, **query})
        page = answer.json()
        found.append([job["id"] for job in page["data"]])
        if not page["has_more"]:
            return found
        after = found[-1][-1]


@pytest.mark.parametrize("size", [1, 3, 4, 20])
@pytest.mark.parametrize("order", ["asc", "desc"])
async def test_pages_make_up_the_list(gateway: Gateway, size: int, order: str) -> None:
    """Many jobs of the same millisecond among them."""
    expected = await stored(gateway, 11)
    found = [job_id for page in await pages(gateway, size, order=order) for job_id in page]
    assert found == (expected if order == "asc" else expected[::-1])


async def test_pages_stay_in_place_while_jobs_come_and_go(gateway: Gateway) -> None:
    ids = await stored(gateway, 9)
    first = [record.id for record in await gateway.ctx.jobs.list(limit=3)]
    assert first == ids[:-4:-1]
    for job_id in (first[-1], first[0], ids[2]):
        await gateway.ctx.jobs.forget(job_id)
    await stored(gateway, 2)
    rest = (await gateway.http.get("/v1/jobs", params={"after": first[-1], "limit": 100})).json()["data"]
    begun = [job["id"] for job in rest]
    assert [job_id for job_id in begun if job_id in ids] == [each for each in ids[-4::-1] if each != ids[2]]


async def test_lists_by_status_and_owner(gateway: Gateway) -> None:
    ids = await stored(gateway, 8)
    await gateway.ctx.jobs.request(ids[1], allowed=("queued",), status="failed")
    owners = {job_id: (await gateway.ctx.jobs.get(job_id)).owner for job_id in ids}
    for query, expected in (
        ({"status": "failed"}, [ids[1]]),
        ({"owner": "a"}, [job_id for job_id in ids if owners[job_id] == "a"]),
        ({"owner": "b", "status": "queued"}, [j for j in ids if owners[j] == "b" and j != ids[1]]),
    ):
        found = [job_id for page in await pages(gateway, 2, order="asc", **query) for job_id in page]
        assert found == expected, query
