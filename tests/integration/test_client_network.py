"""The client over a network that breaks: a real gateway on a socket behind a proxy that cuts connections anywhere."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from stillhouse.client import calls
from stillhouse.client.aio import AsyncClient
from stillhouse.client.client import Client
from stillhouse.client.download import part_file
from stillhouse.core.queue.streams import Scope
from tests.cutting import at_random, cutting
from tests.gateway_kit import Gateway, make_spec, open_gateway
from tests.serving import serving

EVENTS = 150


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "pause_s", lambda *_: 0.001)


@pytest.fixture
async def served(redis_url: str, tmp_path: Path) -> AsyncIterator[tuple[Gateway, str]]:
    """A gateway and its address."""
    async with open_gateway(redis_url, tmp_path) as gateway, serving(gateway.ctx) as url:
        yield gateway, url


async def start(gateway: Gateway) -> Scope:
    """A job that a trainer leads: this test."""
    job_id = (await gateway.submit()).json()["id"]
    scope = Scope(job_id, await gateway.ctx.jobs.claim(job_id, "trainer-test", 60.0, 0))
    await gateway.ctx.jobs.update(scope, status="running")
    return scope


async def end(gateway: Gateway, scope: Scope) -> None:
    await gateway.ctx.jobs.update(scope, status="succeeded", release=True)
    await gateway.ctx.jobs.event(scope.job_id, "job.status", "succeeded", status="succeeded")


async def tell_story(gateway: Gateway, scope: Scope) -> None:
    for number in range(EVENTS):
        await gateway.ctx.jobs.event(scope.job_id, "log", f"event {number}")
    await end(gateway, scope)


@pytest.mark.parametrize("seed", range(3))
async def test_events_over_cut_connections_come_once_each(served: tuple[Gateway, str], seed: int) -> None:
    gateway, url = served
    scope = await start(gateway)
    expected = ["queued", *(f"event {number}" for number in range(EVENTS)), "succeeded"]

    def follow() -> list[str]:
        with Client(proxy.url, gateway.key, retries=10**6) as client:
            return [event.message for event in client.jobs.stream_events(scope.job_id)]

    async def follow_too() -> list[str]:
        async with AsyncClient(proxy.url, gateway.key, retries=10**6) as client:
            return [event.message async for event in client.jobs.stream_events(scope.job_id)]

    with cutting(url, at_random(seed, 6000)) as proxy:
        both = asyncio.gather(asyncio.to_thread(follow), follow_too(), tell_story(gateway, scope))
        ours, theirs, _ = await asyncio.wait_for(both, 50)
        assert proxy.cuts > 5, "the proxy must cut, or nothing was tried"
    assert ours == expected
    assert theirs == expected


async def test_a_create_whose_answer_is_lost_makes_one_job(served: tuple[Gateway, str]) -> None:
    gateway, url = served
    lives = iter([0, 30, 90, 10**9])  # before the answer, in its head, in its head, whole

    def create() -> str:
        with Client(proxy.url, gateway.key) as client:
            job = client.jobs.create(make_spec())
            assert [one.id for one in client.jobs.iter()] == [job.id]
            return job.id

    with cutting(url, lambda: next(lives)) as proxy:
        assert (await asyncio.to_thread(create)).startswith("job_")
        assert proxy.cuts == 3


async def exported(gateway: Gateway, content: bytes) -> str:
    """A finished job whose student has `content`."""
    scope = await start(gateway)
    folder = gateway.ctx.artifacts.job(scope.job_id).export(scope.epoch)
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(content)
    await end(gateway, scope)
    return scope.job_id


async def test_a_download_goes_on_where_it_was_cut(served: tuple[Gateway, str], tmp_path: Path) -> None:
    gateway, url = served
    content = os.urandom(1 << 20)
    job_id = await exported(gateway, content)
    seen: list[tuple[int, int | None]] = []

    def fetch() -> Path:
        with Client(proxy.url, gateway.key) as client:
            return client.jobs.download(
                job_id, tmp_path / "student", on_progress=lambda *progress: seen.append(progress)
            )

    with cutting(url, at_random(1, 1 << 18)) as proxy:
        folder = await asyncio.to_thread(fetch)
        assert proxy.cuts > 3
        assert proxy.bytes < 1.5 * len(content), "it began anew instead of going on"
    assert (folder / "model.safetensors").read_bytes() == content
    done = [number for number, _ in seen]
    assert done == sorted(done)
    assert seen[-1][0] == seen[-1][1]
    assert sorted(path.name for path in tmp_path.glob(".student*")) == [], "nothing temporary is left"


async def test_a_new_process_goes_on_with_a_download(served: tuple[Gateway, str], tmp_path: Path) -> None:
    """The first is killed in the middle; a second one, here, asks for the rest only."""
    gateway, url = served
    content = os.urandom(1 << 20)
    job_id = await exported(gateway, content)
    target = tmp_path / "student"
    code = (
        "import os, sys; from stillhouse import Client\n"
        "def progress(done, total):\n"
        "    if done > 300_000: os._exit(9)\n"
        "Client(sys.argv[1], sys.argv[2]).jobs.download(sys.argv[3], sys.argv[4], on_progress=progress)\n"
    )
    command = [sys.executable, "-c", code, url, gateway.key, job_id, str(target)]
    killed = await asyncio.to_thread(subprocess.run, command, check=False, timeout=40)
    assert killed.returncode == 9
    assert not target.exists()
    come = part_file(target).stat().st_size
    assert come > 200_000
    begun: list[int] = []
    async with AsyncClient(url, gateway.key) as client:
        await client.jobs.download(job_id, target, on_progress=lambda done, _: begun.append(done))
    assert begun[0] > come
    assert (target / "model.safetensors").read_bytes() == content


async def test_what_has_changed_meanwhile_comes_anew(served: tuple[Gateway, str], tmp_path: Path) -> None:
    gateway, url = served
    job_id = await exported(gateway, os.urandom(1 << 20))
    target = tmp_path / "student"

    def interrupt(done: int, _: int | None) -> None:
        if done > 1 << 19:
            raise KeyboardInterrupt

    def interrupted() -> None:
        with Client(url, gateway.key) as client, pytest.raises(KeyboardInterrupt):
            client.jobs.download(job_id, target, on_progress=interrupt)

    await asyncio.to_thread(interrupted)
    assert part_file(target).stat().st_size > 1 << 18, "what came stays for the next time"
    content = os.urandom(1 << 20)
    record = await gateway.ctx.jobs.get(job_id)
    (gateway.ctx.artifacts.job(job_id).export(record.epoch) / "model.safetensors").write_bytes(content)
    async with AsyncClient(url, gateway.key) as client:
        await client.jobs.download(job_id, target)
    assert (target / "model.safetensors").read_bytes() == content


async def test_threads_share_a_client(served: tuple[Gateway, str]) -> None:
    gateway, url = served

    with Client(url, gateway.key) as client:
        one = await asyncio.to_thread(client.jobs.create, make_spec())
        found = await asyncio.gather(*(asyncio.to_thread(client.jobs.get, one.id) for _ in range(16)))
    assert {job.id for job in found} == {one.id}
