"""The loop on fakes: order, staleness, slots, interruption."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from stillhouse.core.spec import StageSpan, StageSpec
from stillhouse.trainer.loop import Collaborators, Interrupt, Interrupted, run_opd


def stage(
    steps: int, prompts_per_step: int, max_staleness: int, *, first_step: int = 0, first_group: int = 0
) -> StageSpan:
    schedule = {"steps": steps, "prompts_per_step": prompts_per_step, "max_staleness": max_staleness}
    loss = {"objective": "full_vocabulary"}
    spec = StageSpec.model_validate({"data": {"rows": [{"prompt": "a"}]}, "loss": loss, "schedule": schedule})
    return StageSpan(0, spec, first_step, first_step + steps, first_group)


@dataclass
class Group:
    number: int
    policy_version: int


class FakeRun:
    """Every collaborator in one: a sampler with random speed that honours `min_policy_version`, and a log of events."""

    def __init__(self, span: StageSpan, seed: int = 0, *, misses_hints: bool = False) -> None:
        self._span = span
        self._random = random.Random(seed)
        self._misses_hints = misses_hints
        self._published = asyncio.Condition()
        self.version = 0
        self.sampler_version = 0
        self.events: list[tuple[str, int]] = []
        self.staleness: list[int] = []
        self.in_flight = 0
        self.most_in_flight = 0
        self.fail_at: int | None = None
        self.stop_step = span.stop_step
        self.enough_at: int | None = None

    async def start(self, group: int, min_policy_version: int) -> asyncio.Task[Group]:
        self.events.append(("start", group))
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        return asyncio.create_task(self._sample(group, min_policy_version))

    async def _sample(self, group: int, min_policy_version: int) -> Group:
        if group == self.fail_at:
            raise ConnectionError("teacher crashed")
        if not self._misses_hints or self.sampler_version < min_policy_version:
            async with self._published:
                await self._published.wait_for(lambda: self.version >= min_policy_version)
            self.sampler_version = self.version
        version = self.sampler_version
        for _ in range(self._random.randrange(6)):
            await asyncio.sleep(0)
        return Group(group, version)

    async def done(self, groups: Sequence[Group]) -> None:
        self.events.append(("done", groups[0].number))
        self.in_flight -= len(groups)

    async def write(self, step: int, groups: Sequence[Group], next_group: int) -> None:
        self.events.append(("journal", step))
        assert [group.number for group in groups] == list(range(next_group - len(groups), next_group))

    async def step(self, step: int, groups: Sequence[Group]) -> None:
        assert self.version == step
        self.staleness += [step - group.policy_version for group in groups]
        self.events.append(("train", step))

    async def publish(self, step: int) -> None:
        async with self._published:
            self.version = step
            self._published.notify_all()
        self.events.append(("publish", step))

    async def commit_if_due(self, step: int) -> None:
        self.events.append(("commit", step))

    async def evaluate_if_due(self, step: int) -> None:
        self.events.append(("evaluate", step))
        if step == self.enough_at:
            self.stop_step = step + 1

    async def run(self, first_step: int = 0, interrupt: Interrupt | None = None) -> None:
        self.version = self.sampler_version = first_step
        together = Collaborators(self, self, self, self, self, self)
        await asyncio.wait_for(run_opd(self._span, first_step, together, interrupt or Interrupt()), 20)


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
@pytest.mark.parametrize("misses_hints", [False, True])
@pytest.mark.parametrize("seed", range(4))
async def test_staleness_stays_within_its_bound(max_staleness: int, misses_hints: bool, seed: int) -> None:
    run = FakeRun(stage(20, 4, max_staleness), seed, misses_hints=misses_hints)
    await run.run()
    assert max(run.staleness) <= max_staleness
    assert min(run.staleness) >= 0
    assert len(run.staleness) == 20 * 4


async def test_a_sampler_that_misses_every_hint_uses_the_whole_bound() -> None:
    """Negative control: the bound is really reached, so the test above can fail."""
    run = FakeRun(stage(20, 4, 3), misses_hints=True)
    await run.run()
    assert max(run.staleness) == 3


@pytest.mark.parametrize("max_staleness", [0, 2])
async def test_slots_bound_what_is_in_flight(max_staleness: int) -> None:
    run = FakeRun(stage(10, 4, max_staleness))
    await run.run()
    assert run.most_in_flight <= (max_staleness + 1) * 4


async def test_every_step_is_journalled_before_it_is_trained_and_published_after() -> None:
    run = FakeRun(stage(5, 2, 1))
    await run.run()
    for step in range(5):
        order = [
            run.events.index(("journal", step)),
            run.events.index(("done", 2 * step)),
            run.events.index(("train", step)),
            run.events.index(("publish", step + 1)),
            run.events.index(("commit", step + 1)),
        ]
        assert order == sorted(order)


async def test_a_slot_is_free_only_when_the_weights_are_published() -> None:
    run = FakeRun(stage(5, 2, 1))
    await run.run()
    for group in range(4, 10):
        step_that_frees = group // 2 - 1
        assert run.events.index(("publish", step_that_frees)) < run.events.index(("start", group))


async def test_a_resumed_loop_goes_on_with_the_next_group() -> None:
    run = FakeRun(stage(8, 3, 1))
    await run.run(first_step=5)
    assert [group for kind, group in run.events if kind == "start"] == list(range(15, 24))
    assert [step for kind, step in run.events if kind == "train"] == [5, 6, 7]


async def test_nothing_is_started_that_no_step_will_train() -> None:
    run = FakeRun(stage(3, 2, 5))
    await run.run()
    assert [group for kind, group in run.events if kind == "start"] == list(range(6))


async def test_a_crashed_stage_ends_the_run_with_its_own_exception() -> None:
    run = FakeRun(stage(10, 2, 1))
    run.fail_at = 7
    with pytest.raises(ConnectionError, match="teacher crashed"):
        await run.run()


async def test_an_interrupt_stops_between_steps() -> None:
    run = FakeRun(stage(10, 2, 1))
    interrupt = Interrupt()

    async def publish_and_stop(step: int) -> None:
        await FakeRun.publish(run, step)
        if step == 4:
            interrupt.set("cancelled")

    run.publish = publish_and_stop  # type: ignore[method-assign]
    with pytest.raises(Interrupted, match="cancelled"):
        await run.run(interrupt=interrupt)
    assert run.events[-1] == ("commit", 4)
    assert run.version == 4


@pytest.mark.parametrize("max_staleness", [0, 2])
async def test_a_later_stage_counts_on_and_asks_for_no_weights_from_before_it(max_staleness: int) -> None:
    run = FakeRun(stage(6, 3, max_staleness, first_step=10, first_group=7))
    await run.run(first_step=10)
    assert [group for kind, group in run.events if kind == "start"] == list(range(7, 7 + 6 * 3))
    assert [step for kind, step in run.events if kind == "train"] == list(range(10, 16))
    span = run._span
    assert [span.min_policy_version(group) for group in (7, 9, 10)] == [10, 10, 10 if max_staleness else 11]
    assert span.min_policy_version(7 + 5 * 3) == 15 - max_staleness
    assert [span.step_of(group) for group in (7, 9, 10, 24)] == [10, 10, 11, 15]


@pytest.mark.parametrize("max_staleness", [0, 2])
async def test_an_early_end_comes_after_the_step_that_is_next_and_plans_no_more(max_staleness: int) -> None:
    run = FakeRun(stage(20, 2, max_staleness))
    run.enough_at = 7
    await run.run()
    assert [step for what, step in run.events if what == "train"] == list(range(8))
    assert run.events[-1] == ("commit", 8)
    planned = [group for what, group in run.events if what == "start"]
    assert planned == list(range(2 * (7 + max(max_staleness, 1))))
