"""Leases of samplers: two jobs that each hold what the other waits for must not wait for ever."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import structlog

from stillhouse.core.queue.registry import ServiceInfo
from stillhouse.core.queue.shares import Want
from stillhouse.core.queue.streams import Scope
from stillhouse.core.spec import SamplersSpec
from stillhouse.trainer import samplers
from stillhouse.trainer.samplers import SamplerPool

LEASE_S = 15.0


class Registry:
    """Samplers and who holds them."""

    def __init__(self, *names: str) -> None:
        self.names = list(names)
        self.holders: dict[str, Scope] = {}
        self.wants: dict[str, Want] = {}

    async def services(self, _: str) -> list[ServiceInfo]:
        return [ServiceInfo("sampler", name, "a:1", 1, 0.0, 0.0) for name in self.names]

    async def ask_for_samplers(self, scope: Scope, want: Want, _: float) -> list[Want]:
        self.wants[scope.job_id] = want
        return list(self.wants.values())

    async def ask_no_more(self, scope: Scope) -> None:
        self.wants.pop(scope.job_id, None)

    async def lease_sampler(self, name: str, scope: Scope, _: float) -> bool:
        return self.holders.setdefault(name, scope) == scope

    async def release_sampler(self, name: str, scope: Scope) -> None:
        if self.holders.get(name) == scope:
            del self.holders[name]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(samplers.time, "monotonic", lambda: clock.now)
    return clock


async def pool(registry: Any, job_id: str, at_least: int, *, priority: int = 0) -> SamplerPool:
    peers: Any = None
    made = SamplerPool(
        Scope(job_id, 1),
        SamplersSpec(min=at_least, max=4),
        registry=registry,
        peers=peers,
        lease_s=LEASE_S,
        log=structlog.get_logger(),
        priority=priority,
    )
    await made.use(True)
    return made


@pytest.mark.parametrize("seed", range(20))
async def test_two_jobs_that_hold_one_each_and_want_two_both_get_their_turn(clock: Any, seed: int) -> None:
    random.seed(seed)
    registry = Registry("s0", "s1")
    jobs = [await pool(registry, "job_a", 2), await pool(registry, "job_b", 2)]
    registry.holders = {"s0": Scope("job_a", 1), "s1": Scope("job_b", 1)}  # both asked at the same moment
    for _ in range(300):  # seconds
        clock.now += 1.0
        for job in jobs:
            await job._refresh()
        if any(job.size == 2 for job in jobs):
            break
    assert sorted(job.size for job in jobs) == [0, 2]


async def test_a_job_that_runs_keeps_what_is_left_to_it(clock: Any) -> None:
    registry = Registry("s0", "s1")
    job = await pool(registry, "job_a", 2)
    await job._refresh()
    assert job.size == 2
    registry.names.remove("s1")
    for _ in range(100):
        clock.now += 1.0
        await job._refresh()
        assert job.size == 1


async def test_what_is_held_in_vain_is_given_back(clock: Any) -> None:
    """Another job does not give back what it should: a sampler whose job hangs, say."""
    registry = Registry("s0", "s1")
    wants_two = await pool(registry, "job_a", 2)
    registry.holders = {"s1": Scope("job_hangs", 1)}
    await wants_two._refresh()
    held_for = 0
    while registry.holders.get("s0") == Scope("job_a", 1):
        clock.now += 1.0
        held_for += 1
        await wants_two._refresh()
    assert LEASE_S < held_for <= LEASE_S + 2


async def sizes(*jobs: SamplerPool) -> list[int]:
    """After everybody has looked twice: who has too many gives back, who has too few takes."""
    for _ in range(2):
        for job in jobs:
            await job._refresh()
    return [job.size for job in jobs]


async def test_a_running_job_gives_back_what_is_beyond_its_share_and_gets_it_again(clock: Any) -> None:
    registry = Registry("s0", "s1", "s2", "s3")
    first, second = await pool(registry, "job_a", 1), await pool(registry, "job_b", 1)
    assert await sizes(first) == [4], "alone it takes all"
    warm = set(registry.holders)
    assert await sizes(first, second) == [2, 2]
    assert {name for name in warm if registry.holders[name].job_id == "job_a"} == {"s0", "s1"}
    urgent = await pool(registry, "job_c", 1, priority=5)
    assert await sizes(first, second, urgent) == [1, 1, 2], "what is above min goes to the higher priority"
    await urgent.use(False)
    await second.use(False)
    assert await sizes(first) == [4]


async def test_an_odd_sampler_stays_where_it_is_until_a_job_ends(clock: Any) -> None:
    registry = Registry("s0", "s1", "s2")
    first, second = await pool(registry, "job_a", 1), await pool(registry, "job_b", 1)
    assert await sizes(first) == [3]
    assert sorted(await sizes(first, second)) == [1, 2]
    settled = dict(registry.holders)
    for _ in range(20):
        for job in (second, first):
            await job._refresh()
            assert registry.holders == settled
    await first.use(False)
    assert await sizes(second) == [3]


async def test_a_job_that_waits_for_more_than_is_free_holds_nothing(clock: Any) -> None:
    registry = Registry("s0", "s1", "s2")
    first = await pool(registry, "job_a", 1)
    await first._refresh()
    wants_three, small = await pool(registry, "job_b", 3), await pool(registry, "job_c", 1)
    assert await sizes(first, wants_three, small) == [3, 0, 0], "nobody overtakes who waits for many"
    await first.use(False)
    assert await sizes(wants_three, small) == [3, 0]
