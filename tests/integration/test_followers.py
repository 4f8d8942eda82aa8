"""Many at once on a real gateway process: one key for a hundred posts; streams that are cut wherever it hurts."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import httpx

from stillhouse.client.aio import AsyncClient
from stillhouse.core.blobs import append_jsonl
from stillhouse.core.queue import keys
from stillhouse.core.service import Context
from stillhouse.gateway.events import events_on_disk
from tests.gateway_kit import make_spec
from tests.integration.test_gateway import Process, ctx, gateway, led, succeed  # noqa: F401
from tests.waiting import wait_until

EVENTS = 400


async def test_a_hundred_posts_with_one_key_make_one_job(gateway: Process, ctx: Context) -> None:  # noqa: F811
    headers = {"Authorization": f"Bearer {gateway.key}", "Idempotency-Key": "one"}
    limits = httpx.Limits(max_connections=100)
    async with httpx.AsyncClient(base_url=gateway.url, headers=headers, limits=limits, timeout=60) as http:
        answers = await asyncio.gather(*(http.post("/v1/jobs", json=make_spec()) for _ in range(100)))
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.content for answer in answers}) == 1
    assert [answer.headers.get("idempotent-replayed") for answer in answers].count(None) == 1
    assert len(await ctx.jobs.list(limit=100)) == 1
    assert len(list((gateway.home / "artifacts" / "jobs").iterdir())) == 1, "nothing of the others is left"


class Scissors:
    """A TCP proxy that cuts each connection after a random number of bytes of the answer."""

    def __init__(self, port: int, seed: int) -> None:
        self._port = port
        self._random = random.Random(seed)
        self.cuts = 0
        self.is_sharp = True

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        left = self._random.randint(300, 12_000) if self.is_sharp else 1 << 30
        try:
            from_gateway, to_gateway = await asyncio.open_connection("127.0.0.1", self._port)
        except OSError:  # it is down just now
            writer.transport.abort()
            return
        asking = asyncio.create_task(self._pass_on(reader, to_gateway))
        with suppress(OSError):
            while left > 0 and (block := await from_gateway.read(left)):
                left -= len(block)
                writer.write(block)
                await writer.drain()
        self.cuts += left <= 0
        asking.cancel()
        writer.transport.abort()
        to_gateway.transport.abort()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while block := await reader.read(4096):
                writer.write(block)
                await writer.drain()


@asynccontextmanager
async def cutting(port: int, seed: int) -> AsyncIterator[tuple[Scissors, str]]:
    scissors = Scissors(port, seed)
    server = await asyncio.start_server(scissors.connected, "127.0.0.1", 0)
    try:
        yield scissors, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


async def test_streams_cut_anywhere_lose_and_double_nothing(gateway: Process, ctx: Context) -> None:  # noqa: F811
    """While events are written, the gateway is killed, and the queue server's history is trimmed to its last few."""
    async with AsyncClient(gateway.url, gateway.key) as direct:
        job = await direct.jobs.create(make_spec())
    scope = await led(ctx, job.id)
    got: list[list[int]] = [[], [], []]

    async def follow(number: int, url: str) -> None:
        async with AsyncClient(url, gateway.key, retries=60) as client:
            async for event in client.jobs.stream_events(job.id):
                if event.type == "log":
                    got[number].append(event.data["number"])

    async with cutting(gateway.port, seed=7) as (scissors, url):
        followers = [asyncio.create_task(follow(number, url)) for number in range(len(got))]
        for number in range(EVENTS):
            await ctx.jobs.event(job.id, "log", "x" * (number % 97), number=number)
            if number % 50 == 49:
                await ctx.redis.xtrim(keys.events(job.id), maxlen=5, approximate=False)
                seen = min(map(len, got))
                await wait_until(lambda s=seen: min(map(len, got)) > s, timeout_s=30, what="the followers to go on")
            if number == EVENTS // 2:
                await asyncio.to_thread(gateway.end, signal.SIGKILL)
                gateway.start()
        await succeed(ctx, scope)
        scissors.is_sharp = False
        await asyncio.wait_for(asyncio.gather(*followers), 60)
    assert got == [list(range(EVENTS))] * len(got)
    assert scissors.cuts >= 3, "else nothing was tested"


def test_history_on_disk_is_what_a_plain_reading_gives(tmp_path: Path) -> None:
    """Lines of several writers, a little out of order, torn ones between: for every id the same as the slow way."""
    path, draw = tmp_path / "events.jsonl", random.Random(3)
    numbers = list(range(3000))
    for start in range(0, 3000, 20):
        block = numbers[start : start + 20]
        draw.shuffle(block)
        numbers[start : start + 20] = block
    ids = [f"{1000 + n // 3}-{n % 3}" for n in range(3000)]
    for start in range(0, 3000, 500):
        block = numbers[start : start + 500]
        append_jsonl(path, [{"id": ids[n], "text": "y" * draw.randint(0, 120)} for n in block])
        with path.open("ab") as stream:
            stream.write(b'{"id": "torn')
    append_jsonl(path, [{"id": "9000-0"}])
    for _ in range(150):
        low, size = draw.randrange(3000), draw.randrange(1, 40)
        high = draw.randrange(low, 3000)
        found = events_on_disk(path, ids[low], ids[high], size)
        assert [event["id"] for event in found] == ids[low + 1 : high][:size]
    assert [event["id"] for event in events_on_disk(path, "", "", 5000)] == [*ids, "9000-0"]
    assert events_on_disk(path, "9000-0", "", 5) == []
    assert events_on_disk(tmp_path / "none", "", "", 5) == []
