"""The on-policy distillation loop of one stage: sample, score, train, publish. Start reading the trainer here.

Every collaborator is a Protocol, so this file runs on fakes, on loopback and on a cluster. It imports no torch.

A group's life:  planned -> in flight (sampled, scored) -> journalled -> trained -> published (its slot is free again)

* Groups are trained in the order they were started, so what is consumed is a prefix: P groups belong to each step.
  Training in order of completion would let stale groups pile up beyond the bound.
* Slots are the only admission control: (max_staleness + 1) * P groups are in flight at most. A step's slots are free
  once the reference to its weights is durable, that is after `publish`; freed earlier, the next groups would ask for a
  version that nobody can fetch.
* The bound on staleness itself is checked by the sampler at the claim (`min_policy_version` of each group), because
  slots alone say nothing about a sampler that missed the news.

Left out on purpose: no second epoch over a batch, no PPO ratio, no reference model: the advantage depends on the
weights, so every batch is used for one optimizer step.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Final, Generic, Protocol, TypeVar

from stillhouse.core import tracing
from stillhouse.core.spec import StageSpan

GroupT = TypeVar("GroupT")
"""What a sampled and scored group is; the loop only carries it."""
TakenT = TypeVar("TakenT", contravariant=True)


class Rollouts(Protocol[GroupT]):
    """Samples and scores prompt groups somewhere else."""

    async def start(self, group: int, min_policy_version: int) -> Awaitable[GroupT]:
        """Plan a group; the answer completes when each of its samples is scored or failed."""
        ...

    async def done(self, groups: Sequence[GroupT]) -> None:
        """The groups are journalled: their queue entries may go."""
        ...


class Journal(Protocol[TakenT]):
    """The ledger of what each step trains on."""

    async def write(self, step: int, groups: Sequence[TakenT], next_group: int) -> None:
        """Durable before it returns."""
        ...


class Learner(Protocol[TakenT]):
    """Student, optimizer and loss."""

    async def step(self, step: int, groups: Sequence[TakenT]) -> None:
        """One optimizer step on all samples of the groups."""
        ...


class Weights(Protocol):
    """Hands new weights to the samplers."""

    async def publish(self, step: int) -> None:
        """Name the weights after `step` steps; returns once the reference is durable and fetchable."""
        ...


class Checkpoints(Protocol):
    """Makes training durable."""

    async def commit_if_due(self, step: int) -> None:
        """Commit after `step` steps if the policy of the job says so; always after a stage's last."""
        ...


class Evaluator(Protocol):
    """Measures held-out quality, and may end the job early for it."""

    @property
    def stop_step(self) -> int:
        """Optimizer steps of the job; what is measured may lower it to the step that is next, and no further."""
        ...

    async def evaluate_if_due(self, step: int) -> None:
        """Begin to measure the weights of `step` steps, once; training may go on meanwhile."""
        ...


class Interrupted(Exception):
    """The loop was asked to stop between steps; `reason` is "cancelled", "paused" or "draining"."""

    is_a_stop: Final = True

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Interrupt:
    """A request to stop, raised at the next point where nothing is half done."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self.reason = ""

    def set(self, reason: str) -> None:
        """Ask the loop to stop; the first reason counts."""
        self.reason = self.reason or reason
        self._event.set()

    def check(self) -> None:
        """Raise `Interrupted` if asked to stop."""
        if self._event.is_set():
            raise Interrupted(self.reason)

    async def race(self, awaitable: Awaitable[GroupT]) -> GroupT:
        """The awaitable's result, or `Interrupted` if that comes first."""
        work = asyncio.ensure_future(awaitable)
        stop = asyncio.ensure_future(self._event.wait())
        try:
            await asyncio.wait({work, stop}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return work.result()
            raise Interrupted(self.reason)
        finally:
            stop.cancel()
            if not work.done():
                work.cancel()


@dataclass(frozen=True)
class Collaborators(Generic[GroupT]):
    """Everything the loop works with."""

    rollouts: Rollouts[GroupT]
    journal: Journal[GroupT]
    learner: Learner[GroupT]
    weights: Weights
    checkpoints: Checkpoints
    evaluator: Evaluator


async def run_opd(span: StageSpan, first_step: int, with_: Collaborators[GroupT], interrupt: Interrupt) -> None:
    """Train the steps of a stage from `first_step` on. At its end nothing is in flight, unless it ends early.

    consumes:     scored groups, in the order they were started
    waits for:    the oldest group in flight
    produces:     one journalled optimizer step, its published weights, now and then a checkpoint
    unblocked by: the teacher's hand-over of the group's last sample, or `interrupt`

    Raises:
        Interrupted: between steps; everything trained is journalled and published.
    """
    in_flight: deque[Awaitable[GroupT]] = deque()
    next_group = span.first_group_of(first_step)
    for step in range(first_step, span.stop_step):
        if step >= with_.evaluator.stop_step:
            break
        interrupt.check()
        with tracing.span("step", step=step):
            await with_.evaluator.evaluate_if_due(step)

            last_step = min(step + span.max_staleness + 1, span.stop_step, with_.evaluator.stop_step)
            while next_group < span.first_group_of(last_step):
                in_flight.append(await with_.rollouts.start(next_group, span.min_policy_version(next_group)))
                next_group += 1

            with tracing.span("wait"):
                groups = [await interrupt.race(in_flight.popleft()) for _ in range(span.prompts_per_step)]
            await with_.journal.write(step, groups, next_group=span.first_group_of(step + 1))
            await with_.rollouts.done(groups)
            await with_.learner.step(step, groups)
            await with_.weights.publish(step + 1)
            await with_.checkpoints.commit_if_due(step + 1)
