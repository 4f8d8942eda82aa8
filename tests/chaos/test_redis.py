"""The queue server dies and forgets: no acknowledged entry is lost, no prompt of a job either."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from redis.exceptions import RedisError

from stillhouse.core.queue import keys
from stillhouse.core.queue.client import connect, connect_blocking
from stillhouse.core.queue.streams import Outcome, Scope, WorkQueue
from stillhouse.core.tasks import cancel_all
from tests.chaos.harness import Chaos, job, until
from tests.conftest import start_valkey, stop_valkey
from tests.waiting import wait_until

SCOPE = Scope("job_load", 1)
PROMPTS = keys.prompts(SCOPE.job_id, SCOPE.epoch)
SCORED = keys.scored(SCOPE.job_id, SCOPE.epoch)
WRITERS, WORKERS = 8, 6
ERRORS = (RedisError, OSError)


@dataclass
class Ledger:
    """What the queue server has acknowledged."""

    added: set[str] = field(default_factory=set)
    handed_over: set[str] = field(default_factory=set)


@pytest.mark.parametrize(
    ("number", "kills"),
    [(1500, 2), pytest.param(12_000, 6, marks=[pytest.mark.full, pytest.mark.timeout(300)])],
)
async def test_a_killed_server_loses_nothing_that_it_acknowledged(tmp_path: Path, number: int, kills: int) -> None:
    process, url = start_valkey(tmp_path)
    port = urlsplit(url).port or 0
    redis, ledger = connect(url), Ledger()
    await redis.hset(keys.job(SCOPE.job_id), "epoch", "1")  # type: ignore[misc]
    queue = WorkQueue(redis, connect_blocking(url))
    for stream, group in ((PROMPTS, keys.SAMPLERS_GROUP), (SCORED, keys.TRAINERS_GROUP)):
        assert await queue.open_stream(SCOPE, stream, group) is Outcome.DONE
    writers = [asyncio.create_task(write(queue, ledger, f"{n}", number // WRITERS)) for n in range(WRITERS)]
    workers = [asyncio.create_task(work(url, ledger, f"worker-{n}")) for n in range(WORKERS)]
    try:
        for kill in range(1, kills + 1):
            await wait_until(
                lambda kill=kill: len(ledger.handed_over) > kill * number // (kills + 2), timeout_s=60, what="load"
            )
            added, handed_over = set(ledger.added), set(ledger.handed_over)
            process.send_signal(signal.SIGKILL)
            process.wait()
            process, again = start_valkey(tmp_path, port)
            assert again == url
            waiting = await content(redis, PROMPTS)  # first: entries move from here to there
            done = await content(redis, SCORED)
            assert handed_over <= done.keys(), "an acknowledged result is lost"
            assert added <= waiting.keys() | done.keys(), "an acknowledged entry is lost"
        await asyncio.wait_for(asyncio.gather(*writers), 120)
        total = WRITERS * (number // WRITERS)
        await wait_until(lambda: len(ledger.handed_over) == total, timeout_s=120, what="everything to be handed over")
        ended = await content(redis, SCORED)
        assert len(ended) == total
        assert set(ended.values()) == {1}, "a result counts twice"
        assert await queue.length(PROMPTS) == 0
        print(f"{total} entries, {kills} kills, 0 lost")
    finally:
        await cancel_all([*writers, *workers])
        await redis.aclose()
        stop_valkey(process)


async def write(queue: WorkQueue, ledger: Ledger, writer: str, number: int) -> None:
    """Add entries until each is acknowledged."""
    for count in range(number):
        name = f"{writer}-{count}"
        while name not in ledger.added:
            try:
                await queue.add(SCOPE, PROMPTS, f"plan:{name}:0", name.encode())
                ledger.added.add(name)
            except ERRORS:
                await asyncio.sleep(0.05)


async def work(url: str, ledger: Ledger, consumer: str) -> None:
    """Claim and hand over, as samplers do."""
    queue = WorkQueue(connect(url), connect_blocking(url))
    while True:
        try:
            entries = await queue.reclaim(PROMPTS, keys.SAMPLERS_GROUP, consumer, 1.0, 20)
            entries += await queue.claim([PROMPTS], keys.SAMPLERS_GROUP, consumer, 20, 100)
            for entry in entries:
                name = entry.payload.decode()
                await queue.hand_over(SCOPE, entry, SCORED, f"score:{name}:0", entry.payload)
                ledger.handed_over.add(name)
        except ERRORS:
            await asyncio.sleep(0.05)


async def content(redis, stream: str) -> Counter[str]:
    """Payloads of a stream, counted; waits for a server that reads its log."""
    entries = await redis.xrange(stream)
    return Counter(fields[b"p"].decode() for _, fields in entries)


@pytest.mark.full
@pytest.mark.timeout(300)
def test_an_emptied_server_costs_no_prompt(chaos: Chaos, chaos_seed: int) -> None:
    """Two jobs run, a third waits, when everything that the server knew is gone."""
    jobs = [chaos.submit(job(f"wiped-{chaos_seed}-{number}", steps=25)) for number in range(3)]
    until(lambda: any((record := chaos.record(name)) and record.step >= 4 for name in jobs), "a few steps")
    chaos.redis.flushall()
    for job_id in jobs:
        record = chaos.ended(job_id, 150)
        assert (record.status, record.committed_step) == ("succeeded", 25), record.error
        assert chaos.violations(job_id) == []


@pytest.mark.full
@pytest.mark.timeout(300)
def test_a_server_killed_under_running_jobs_costs_nothing(chaos: Chaos, chaos_seed: int) -> None:
    jobs = [chaos.submit(job(f"killed-{chaos_seed}-{number}", steps=25)) for number in range(2)]
    for at_step in (3, 9, 15):
        until(lambda at_step=at_step: (record := chaos.record(jobs[0])) and record.step >= at_step, f"step {at_step}")
        chaos.kill("valkey")
    for job_id in jobs:
        record = chaos.ended(job_id, 150)
        assert record.status == "succeeded", record.error
        assert chaos.violations(job_id) == []
