"""Queue, journal, checkpoints and claims as one machine that Hypothesis drives, on the real classes and real files.

One job of STEPS steps, a group of two samples each. Trainers claim it, plan, take scores, journal, train, commit and
clean up; workers claim groups and hand them over; all of them die, sleep past their lease, and wake up as zombies. What
a sample holds names the epoch that planned it, so that work of two lineages can be told apart.
"""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import tempfile
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from unittest import mock

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from stillhouse.core.blobs import JobArtifacts
from stillhouse.core.errors import LeaseLostError
from stillhouse.core.oracle.lineage import lineage_of, working_epochs
from stillhouse.core.oracle.read import read_epochs, read_journal
from stillhouse.core.queue import keys
from stillhouse.core.queue.streams import Entry, Outcome, Scope, WorkQueue
from stillhouse.core.tensors import ids_tensor
from stillhouse.trainer import manifests
from stillhouse.trainer.journal import StepJournal, read_step
from stillhouse.trainer.manifests import ManifestRef, Opening, open_epoch
from stillhouse.trainer.retention import Policy, retain
from stillhouse.v1 import rollout_pb2
from tests.chaos.sim.clock import Clock, SimLoop
from tests.chaos.sim.redis_client import Line, SimRedis
from tests.chaos.sim.redis_server import RedisServer
from tests.fakes import MemoryQueue

JOB: Final = "job_machine"
STEPS: Final = 6
AHEAD: Final = 2
"""Steps that are planned ahead."""
LEASE_S: Final = 5.0
Sample = tuple[str, int]
"""(sample id, epoch that planned it)."""


@dataclass
class Trainer:
    """A claim of the job. All but the newest are zombies."""

    scope: Scope
    opening: Opening
    trained: list[Sample]
    """In the weights."""
    journalled: list[Sample] = field(default_factory=list)
    """What the journals of its lineage hold."""
    planned: int = 0
    scores: dict[str, tuple[Sample, Entry]] = field(default_factory=dict)
    last_commit: ManifestRef | None = None
    is_dead: bool = False

    @property
    def step(self) -> int:
        return len(self.trained) // 2


@dataclass
class Worker:
    """Turns a group into two scored samples."""

    name: str
    scope: Scope | None = None
    entry: Entry | None = None
    done: int = 0
    """Samples handed over."""


class Machine(RuleBasedStateMachine):
    """The rules; subclasses choose the queue."""

    def make_queue(self) -> Any:
        raise NotImplementedError

    async def set_epoch(self, epoch: int) -> None:
        raise NotImplementedError

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.draw = random.Random(0)
        self.root = Path(tempfile.mkdtemp(prefix="stillhouse-machine-"))
        self.artifacts = JobArtifacts(self.root / JOB)
        self.artifacts.root.mkdir()
        self.loop = SimLoop(self.clock, self.draw)
        self.queue = self.make_queue()
        self.trainers: list[Trainer] = []
        self.workers = [Worker("a"), Worker("b"), Worker("c")]
        self.is_damaged = False

    def run(self, coro: Coroutine[Any, Any, Any]) -> Any:
        """Do something, in virtual time. Hypothesis looks at the clock, too: outside it is the real one."""
        with (
            mock.patch.object(time, "time", self.clock.time),
            mock.patch.object(time, "monotonic", self.clock.monotonic),
        ):
            return self.loop.run_until_complete(coro)

    def teardown(self) -> None:
        try:
            if self.trainers:
                self.finish()
        finally:
            self.loop.close()
            shutil.rmtree(self.root)

    @property
    def live(self) -> Trainer:
        return self.trainers[-1]

    # -- claims ------------------------------------------------------------------------------------------------------

    @initialize()
    def first_claim(self) -> None:
        self.claim()

    @rule(chance=st.integers(0, 2))
    def takeover(self, chance: int) -> None:
        if chance == 0 or self.live.is_dead:
            self.claim()

    def claim(self) -> None:
        """Somebody takes the job over; who had it may not know yet."""
        before = self.live if self.trainers else None
        epoch = self.artifacts.highest_epoch() + 1
        damage: list[str] = []
        opening = open_epoch(self.artifacts, epoch, "trainer", damage.append)
        trained = self._restore(opening)
        _check_prefix(trained)
        if before is not None and not self.is_damaged:
            assert not damage
            assert trained == before.journalled, "what was journalled is there again, and nothing else"
        trainer = Trainer(Scope(JOB, epoch), opening, trained, list(trained), planned=len(trained) // 2)
        self.run(self._open(trainer))
        self.trainers.append(trainer)

    async def _open(self, trainer: Trainer) -> None:
        await self.set_epoch(trainer.scope.epoch)
        for epoch in range(1, trainer.scope.epoch):
            await self.queue.close_epoch(Scope(JOB, epoch))
        for stream, group in (_prompts(trainer.scope), keys.SAMPLERS_GROUP), (_scored(trainer.scope), "trainers"):
            assert await self.queue.open_stream(trainer.scope, stream, group) is Outcome.DONE

    def _restore(self, opening: Opening) -> list[Sample]:
        trained: list[Sample] = []
        if opening.base is not None:
            manifests.verify(self.artifacts, opening.base)
            state = json.loads((opening.base.folder(self.artifacts) / "state.json").read_text())
            trained = [(name, epoch) for name, epoch in state]
        for ref in opening.replay:
            assert ref.step == len(trained) // 2, "the replay goes on where the weights end"
            trained += _samples(read_step(self.artifacts.journal(ref.epoch, ref.step)).scores)
        return trained

    @rule()
    def claim_an_epoch_that_is_there(self) -> None:
        with pytest.raises(LeaseLostError):
            open_epoch(self.artifacts, self.live.scope.epoch, "late")

    @rule(chance=st.integers(0, 3))
    def trainer_dies(self, chance: int) -> None:
        self.live.is_dead |= chance == 0

    @rule(number=st.integers(0, 2), count=st.integers(1, 16))
    def work_on(self, number: int, count: int) -> None:
        """A worker and the newest claim do what comes next, some actions long: they may be left in the middle."""
        for _ in range(count):
            self._next_action(self.workers[number])

    def _next_action(self, worker: Worker) -> None:
        trainer = self.live
        if worker.entry is not None:
            self._hand_over(worker)
        elif not trainer.is_dead and trainer.planned < min(STEPS, trainer.step + AHEAD):
            self._plan(trainer)
        elif self.run(self.queue.length(_prompts(trainer.scope))):
            self._claim(worker)
        elif not trainer.is_dead:
            self._take_scores(trainer)
            self._train(trainer)

    def _pick(self, number: int) -> Trainer:
        """The live trainer, or one of the two newest zombies."""
        return self.trainers[-1 - number] if number < min(3, len(self.trainers)) else self.live

    # -- what trainers do --------------------------------------------------------------------------------------------

    @rule(number=st.integers(0, 5))
    def plan(self, number: int) -> None:
        trainer = self._pick(number)
        if trainer.is_dead or trainer.planned >= min(STEPS, trainer.step + AHEAD):
            return
        outcome = self._plan(trainer)
        assert outcome is (Outcome.DONE if trainer is self.live else Outcome.CLOSED)

    def _plan(self, trainer: Trainer) -> Outcome:
        group, scope = trainer.planned, trainer.scope
        trainer.planned += 1
        return self.run(self.queue.add(scope, _prompts(scope), f"plan:{group}:0", str(group).encode()))

    @rule(number=st.integers(0, 5))
    def take_scores(self, number: int) -> None:
        trainer = self._pick(number)
        if not trainer.is_dead:
            self._take_scores(trainer)

    def _take_scores(self, trainer: Trainer) -> None:
        entries = self.run(self.queue.claim([_scored(trainer.scope)], "trainers", "trainer", 64, 1))
        for entry in entries:
            name, epoch = json.loads(entry.payload)
            assert name not in trainer.scores, f"{name} was handed over twice"
            assert epoch == trainer.scope.epoch, "work of another claim"
            trainer.scores[name] = ((name, epoch), entry)

    @rule(number=st.integers(0, 5), dies=st.sampled_from(("", "", "", "journalled", "acknowledged", "trained")))
    def train(self, number: int, dies: str) -> None:
        trainer = self._pick(number)
        if not trainer.is_dead:
            self._train(trainer, dies)

    def _train(self, trainer: Trainer, dies: str = "") -> None:
        """One step, if its group is complete; the trainer may die in the middle."""
        names = [f"{trainer.step}/{index}" for index in range(2)]
        if any(name not in trainer.scores for name in names):
            return
        samples, entries = zip(*[trainer.scores[name] for name in names], strict=True)
        scores = [_score(sample) for sample in samples]
        journal = StepJournal(self.artifacts, trainer.scope)
        header: dict[str, Any] = {"groups": [trainer.step], "next_group": trainer.step + 1, "micro_batches": []}
        self.run(journal.write(trainer.step, scores, **header))
        trainer.journalled += samples
        if dies != "journalled":
            self.run(self.queue.ack_delete(list(entries)))
        if dies in ("journalled", "acknowledged"):
            trainer.is_dead = True
            return
        trainer.trained += samples
        trainer.is_dead = dies == "trained"

    @rule(number=st.integers(0, 5), keep_last=st.integers(1, 3))
    def commit(self, number: int, keep_last: int) -> None:
        trainer = self._pick(number)
        base = trainer.last_commit or trainer.opening.base
        if trainer.is_dead or trainer.step == 0 or (base is not None and base.step == trainer.step):
            return
        facts = {"next_group": trainer.step, "parent": base.as_json() if base else None}

        def write(folder: Path) -> None:
            (folder / "state.json").write_text(json.dumps(trainer.trained))

        trainer.last_commit = manifests.commit(self.artifacts, trainer.scope.epoch, trainer.step, facts, write)
        if trainer is self.live:  # a zombie is stopped by the fence of the record, which comes before
            retain(self.artifacts, Policy(keep_last), trainer.opening.base)

    # -- what workers do ---------------------------------------------------------------------------------------------

    @rule(number=st.integers(0, 2))
    def worker_claims(self, number: int) -> None:
        worker = self.workers[number]
        if worker.entry is None:
            self._claim(worker)

    def _claim(self, worker: Worker) -> None:
        scope = self.live.scope
        claim = (_prompts(scope), keys.SAMPLERS_GROUP, worker.name)
        entries = self.run(self.queue.reclaim(*claim, LEASE_S, 1))
        entries = entries or self.run(self.queue.claim([claim[0]], *claim[1:], 1, 1))
        if entries:
            worker.entry, worker.scope, worker.done = entries[0], scope, 0

    @rule(number=st.integers(0, 2), is_answer_lost=st.booleans())
    def worker_hands_over(self, number: int, is_answer_lost: bool) -> None:
        worker = self.workers[number]
        if worker.entry is not None:
            self._hand_over(worker)
            if is_answer_lost and worker.entry is not None:  # the client sends the script again
                worker.done -= 1
                assert self._hand_over(worker) is not Outcome.DONE

    def _hand_over(self, worker: Worker) -> Outcome:
        """The next sample of the group it holds."""
        assert worker.entry is not None and worker.scope is not None  # noqa: PT018
        scope, name = worker.scope, f"{worker.entry.payload.decode()}/{worker.done}"
        payload = json.dumps([name, scope.epoch]).encode()
        worker.done += 1
        is_last = worker.done == 2
        outcome: Outcome = self.run(
            self.queue.hand_over(scope, worker.entry, _scored(scope), f"score:{name}:0", payload, last=is_last)
        )
        assert (outcome is Outcome.CLOSED) == (scope != self.live.scope), "only the newest claim gets work"
        if is_last or outcome is Outcome.CLOSED:
            worker.entry = None
        return outcome

    @rule(number=st.integers(0, 2))
    def worker_dies(self, number: int) -> None:
        self.workers[number].entry = None

    @rule(number=st.integers(0, 2))
    def worker_hands_back(self, number: int) -> None:
        worker = self.workers[number]
        if worker.entry is not None:
            self.run(self.queue.hand_back([worker.entry], worker.name))
            worker.entry = None

    @rule(seconds=st.sampled_from((1.0, LEASE_S, 3 * LEASE_S)), renewed=st.sets(st.integers(0, 2)))
    def time_passes(self, seconds: float, renewed: set[int]) -> None:
        """Who does not renew may lose its claims, and does not know."""
        self.run(asyncio.sleep(seconds))
        for worker in (self.workers[number] for number in renewed):
            if worker.entry is not None:
                self.run(self.queue.renew([worker.entry], worker.name))

    # -- damage ------------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.live.step >= 2)
    @rule(chance=st.integers(0, 5), number=st.integers(0, 1000), keep=st.floats(0, 0.99))
    def damage_a_file(self, chance: int, number: int, keep: float) -> None:
        if chance:
            return
        files = sorted(path for path in self.artifacts.epochs.rglob("*") if path.is_file())
        path = files[number % len(files)]
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * keep)])
        self.is_damaged = True

    # -- what always holds -------------------------------------------------------------------------------------------

    @invariant()
    def one_lineage(self) -> None:
        """The oracle, walking by its own code, finds exactly what the newest claim rests on."""
        if not self.trainers or self.is_damaged:
            return
        epochs = read_epochs(self.artifacts)
        lineage = lineage_of(epochs, working_epochs(epochs)[0])
        found: list[Sample] = []
        for step in sorted(lineage.steps):
            _, scores = read_journal(self.artifacts.journal(lineage.steps[step], step))
            found += _samples(scores)
        assert found == self.live.journalled
        for checkpoint in lineage.checkpoints:
            state = json.loads((checkpoint.folder / "state.json").read_text())
            assert [tuple(sample) for sample in state] == found[: 2 * checkpoint.step]

    def finish(self) -> None:
        """Whatever happened: a new claim brings the job to its end, with each sample trained once and in order."""
        self.claim()
        worker = Worker("last")
        while self.live.step < STEPS:
            before = self.live.step
            if self.live.planned < STEPS:
                self._plan(self.live)
            self._claim(worker)
            while worker.entry is not None:
                self._hand_over(worker)
            self._take_scores(self.live)
            self._train(self.live)
            assert self.live.step == before + 1, "nothing is lost"
        _check_prefix(self.live.trained)
        assert len(self.live.trained) == 2 * STEPS


def _check_prefix(trained: list[Sample]) -> None:
    """Each sample once, in the order of the plan, and epochs never go back."""
    assert [name for name, _ in trained] == [f"{step}/{index}" for step in range(len(trained) // 2) for index in (0, 1)]
    epochs = [epoch for _, epoch in trained]
    assert epochs == sorted(epochs)


def _prompts(scope: Scope) -> str:
    return keys.prompts(scope.job_id, scope.epoch)


def _scored(scope: Scope) -> str:
    return keys.scored(scope.job_id, scope.epoch)


def _score(sample: Sample) -> rollout_pb2.Score:
    name, epoch = sample
    return rollout_pb2.Score(rollout=rollout_pb2.Rollout(sample_id=name, epoch=epoch, completion_ids=ids_tensor([1])))


def _samples(scores: list[rollout_pb2.Score]) -> list[Sample]:
    return [(score.rollout.sample_id, score.rollout.epoch) for score in scores]


class InMemory(Machine):
    """On the queue that unit tests use."""

    def make_queue(self) -> Any:
        return MemoryQueue()

    async def set_epoch(self, epoch: int) -> None:
        self.queue.set_epoch(JOB, epoch)


class OnRedis(Machine):
    """On the real queue class, its Lua scripts run by a simulated server."""

    def make_queue(self) -> Any:
        line = Line(RedisServer(), self.draw, lambda *_: None)
        self.redis: Any = SimRedis(line)
        blocking: Any = SimRedis(line, retries=0)
        return WorkQueue(self.redis, blocking)

    async def set_epoch(self, epoch: int) -> None:
        await self.redis.hset(keys.job(JOB), "epoch", str(epoch))


@pytest.mark.parametrize("machine", [InMemory, OnRedis])
def test_nothing_is_lost_and_nothing_counts_twice(machine: type[Machine]) -> None:
    limits = settings(max_examples=60, stateful_step_count=40, derandomize=True, deadline=None)
    run_state_machine_as_test(machine, settings=limits)


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("machine", [InMemory, OnRedis])
def test_nothing_is_lost_in_long_histories(machine: type[Machine]) -> None:
    run_state_machine_as_test(machine, settings=settings(max_examples=200, stateful_step_count=120, deadline=None))
