"""What users see of a full disk and of a queue server that takes no writes: what is wrong, what helps, no half job."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from redis import Redis

from stillhouse.core import blobs, failpoints
from stillhouse.core.blobs import append_jsonl, read_jsonl
from stillhouse.core.queue import keys
from stillhouse.core.queue.client import connect, connect_blocking
from stillhouse.core.queue.streams import Outcome, Scope, WorkQueue
from stillhouse.gateway.sweeper import Sweeper
from tests.conftest import start_valkey, stop_valkey
from tests.gateway_kit import Gateway, open_gateway, problem


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[str]:
    folder = tmp_path / "valkey"
    folder.mkdir()
    process, url = start_valkey(folder)
    yield url
    stop_valkey(process)


@pytest.fixture
async def gateway(valkey: str, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with open_gateway(valkey, tmp_path / "home") as opened:
        yield opened


@pytest.fixture
def full_disk(gateway: Gateway) -> Iterator[None]:
    def full(name: str, detail: str) -> None:
        if name == "disk.written":
            raise OSError(errno.ENOSPC, "no space left on device")

    failpoints.install(full)
    yield
    failpoints.install(None)


@pytest.mark.usefixtures("full_disk")
async def test_a_job_that_finds_no_room_is_refused_and_leaves_nothing(gateway: Gateway) -> None:
    refused = problem(await gateway.submit(key="k"), 507)
    assert (refused["code"], "free some" in refused["detail"]) == ("no_space", True)
    assert not list((gateway.ctx.artifacts.root / "jobs").glob("*"))
    assert await gateway.ctx.jobs.list() == []
    failpoints.install(None)
    again = await gateway.submit(key="k")
    assert again.status_code == 201
    assert [record.id for record in await gateway.ctx.jobs.list()] == [again.json()["id"]]


@pytest.mark.usefixtures("full_disk")
async def test_an_upload_that_finds_no_room_is_refused_and_leaves_nothing(gateway: Gateway) -> None:
    headers = {"Content-Type": "application/jsonl"}
    answer = await gateway.http.post("/v1/files", content=b'{"prompt": "tea"}\n', headers=headers)
    assert problem(answer, 507)["code"] == "no_space"
    assert not list((gateway.ctx.artifacts.root / "files").glob("*"))


@pytest.mark.parametrize("trouble", ["out of memory", "read-only"])
async def test_writes_are_refused_with_the_fix_and_reads_go_on(gateway: Gateway, valkey: str, trouble: str) -> None:
    admin = Redis.from_url(valkey)
    job = (await gateway.submit()).json()["id"]
    if trouble == "out of memory":
        admin.config_set("maxmemory", "1")
    else:
        admin.execute_command("REPLICAOF", "127.0.0.1", "1")
    answer = await gateway.submit(key="k")
    refused = problem(answer, 503)
    assert refused["code"] == "unavailable"
    assert trouble in refused["detail"]
    assert ("maxmemory" if trouble == "out of memory" else "redis_url") in refused["detail"]
    assert answer.headers["Retry-After"].isdigit()
    assert (await gateway.http.get(f"/v1/jobs/{job}")).json()["status"] == "queued"
    assert len((await gateway.http.get("/v1/jobs")).json()["data"]) == 1
    assert gateway.ctx.artifacts.job_ids() == [job], "a refused job is not brought back by the sweeper"
    cancelled = await gateway.http.post(f"/v1/jobs/{job}/cancel")
    assert cancelled.status_code == (202 if trouble == "out of memory" else 503), "cancelling is what frees memory"
    admin.config_set("maxmemory", "0")
    admin.execute_command("REPLICAOF", "NO", "ONE")
    await Sweeper(gateway.ctx).sweep()
    assert (await gateway.submit(key="k")).status_code == 201
    assert len(await gateway.ctx.jobs.list()) == 2


@pytest.mark.parametrize("trouble", ["memory", "replica"])
async def test_a_hand_over_is_whole_or_not_at_all(valkey: str, trouble: str) -> None:
    """On a server that refuses it: no result, no mark, and the source is still there and still ours."""
    scope, admin = Scope("job_trouble", 1), Redis.from_url(valkey)
    redis, blocking = connect(valkey, waits_for_room=False), connect_blocking(valkey)
    queue = WorkQueue(redis, blocking)
    prompts, rollouts = keys.prompts(scope.job_id, 1), keys.rollouts(scope.job_id, 1, "main")
    admin.hset(keys.job(scope.job_id), "epoch", "1")
    await queue.open_stream(scope, prompts, keys.SAMPLERS_GROUP)
    await queue.open_stream(scope, rollouts, keys.TEACHERS_GROUP)
    await queue.add(scope, prompts, "plan:0:0", b"prompt")
    (entry,) = await queue.claim([prompts], keys.SAMPLERS_GROUP, "a", 1, 10)
    if trouble == "memory":
        admin.config_set("maxmemory", "1")
    else:
        admin.execute_command("REPLICAOF", "127.0.0.1", "1")
    for _ in range(3):
        with pytest.raises(Exception, match=r"maxmemory|read only"):
            await queue.hand_over(scope, entry, rollouts, "rollout:0/0:0", b"rollout", dead=b"why")
        with pytest.raises(Exception, match=r"maxmemory|read only"):
            await queue.add(scope, rollouts, "rollout:1/0:0", b"rollout")
    assert (await queue.length(prompts), await queue.length(rollouts)) == (1, 0)
    assert await queue.length(keys.dead(scope.job_id, 1)) == 0
    assert await queue.marked(scope, ["rollout:0/0:0", "rollout:1/0:0"]) == set()
    if trouble == "memory":
        assert await queue.renew([entry], "a") == [], "claims are kept alive meanwhile"
    admin.config_set("maxmemory", "0")
    admin.execute_command("REPLICAOF", "NO", "ONE")
    assert await queue.hand_over(scope, entry, rollouts, "rollout:0/0:0", b"rollout") is Outcome.DONE
    assert (await queue.length(prompts), await queue.length(rollouts)) == (0, 1)
    await redis.aclose()
    await blocking.aclose()


async def test_a_service_outwaits_a_short_trouble(valkey: str) -> None:
    """What a worker holds goes nowhere else, so its client tries again."""
    admin, redis = Redis.from_url(valkey), connect(valkey)
    admin.config_set("maxmemory", "1")
    write = asyncio.ensure_future(redis.set("key", "value"))
    done, _ = await asyncio.wait({write}, timeout=0.3)
    assert not done
    admin.config_set("maxmemory", "0")
    assert await asyncio.wait_for(write, 5)
    await redis.aclose()


def test_history_keeps_the_newest_lines_for_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk with room for some bytes only: no line twice, none torn, the rest when there is room, in order."""
    append, room = blobs.append_lines, 0

    def limited(path: Path, data: bytes) -> int:
        nonlocal room
        if room == 0:
            raise OSError(errno.ENOSPC, "no space left on device")
        part, room = data[:room], max(0, room - len(data))
        return append(path, part)

    monkeypatch.setattr(blobs, "append_lines", limited)
    monkeypatch.setattr(blobs, "UNWRITTEN_LINES", 20)
    path = tmp_path / "events.jsonl"
    for number in range(40):
        room += (0, 7, 25)[number % 3]
        append_jsonl(path, [{"n": number, "text": "x" * 10}])
    room = 10_000
    append_jsonl(path, [])
    seen = [line["n"] for line in read_jsonl(path)]
    assert seen == sorted(set(seen))
    assert seen[-20:] == list(range(20, 40))
    room = 0
    other = tmp_path / "metrics.jsonl"
    for number in range(50):
        append_jsonl(other, [{"n": number}])
    assert not other.exists()
    room = 10_000
    append_jsonl(other, [{"n": 50}])
    assert [line["n"] for line in read_jsonl(other)] == list(range(30, 51))
