"""A running job: the collaborators of `loop.py`, made of exchange, learner, publisher, journal and manifests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from stillhouse.core.blobs import JobArtifacts
from stillhouse.core.errors import NonFiniteError
from stillhouse.core.evaluations import folder_of, read_best
from stillhouse.core.failpoints import failpoint
from stillhouse.core.metrics import COMMITS, FAILED_SAMPLES, POLICY_VERSION
from stillhouse.core.queue.jobs import JobStore
from stillhouse.core.queue.streams import Scope
from stillhouse.core.spec import JobSpec, StageSpan
from stillhouse.trainer import manifests
from stillhouse.trainer.asks import train_score
from stillhouse.trainer.batch import TeacherHead, TrainSample
from stillhouse.trainer.evaluations import Evaluations
from stillhouse.trainer.exchange import Exchange
from stillhouse.trainer.followed import Followed
from stillhouse.trainer.journal import JournalledStep, StepJournal, read_step
from stillhouse.trainer.ledger import Ledger
from stillhouse.trainer.manifests import ManifestRef, Opening
from stillhouse.trainer.progress import Progress
from stillhouse.trainer.prompts import Prompt, is_on_policy, make_group, sample_seed
from stillhouse.trainer.publish import Publisher
from stillhouse.trainer.retention import Policy, retain
from stillhouse.trainer.rewards import reward_metrics
from stillhouse.trainer.samplers import SamplerPool
from stillhouse.trainer.scored import ScoredGroup, ScoredSample, busy_seconds
from stillhouse.trainer.space import Space
from stillhouse.trainer.stage import Stage
from stillhouse.trainer.texts import Texts
from stillhouse.trainer.train import LearnerThread, keep_journalled, micro_batch_plans, plan_from_journal
from stillhouse.v1 import rollout_pb2

MAX_NON_FINITE: Final = 3
"""Steps in a row without a finite gradient after which the job fails: one may be a bad sample, three are divergence."""


@dataclass
class Run:
    """One claim of one job, from the loaded learner to the last commit. Implements every Protocol of the loop.

    What changes from stage to stage is in `stage`.
    """

    scope: Scope
    spec: JobSpec
    jobs: JobStore
    artifacts: JobArtifacts
    opening: Opening
    exchange: Exchange
    samplers: SamplerPool
    learner: LearnerThread
    publisher: Publisher
    progress: Progress
    heads: Mapping[str, TeacherHead]
    """Of the teachers that judge with them now."""
    texts: Texts
    """Brings what the student does not write."""
    stage: Stage
    """The one that trains."""
    make_stage: Callable[[StageSpan], Awaitable[Stage]]
    """Makes another ready."""
    threads: int
    space: Space
    ledger: Ledger
    """What the learner consumed."""
    look_at_first: Callable[[Sequence[TrainSample], Mapping[str, float]], Awaitable[None]]
    """Takes the first step's samples and metrics before anything of it is published; raises what they refuse."""
    on_damage: Callable[[str], None]
    """Told about files that do not verify."""
    followed: Followed | None = None
    """Publishes the average that teachers follow; None = none does."""
    evaluations: Evaluations | None = None
    step_done: int = 0
    """Optimizer steps in the learner."""
    _batch: tuple[list[TrainSample], list[list[int]]] = field(default_factory=lambda: ([], []))
    _metrics: dict[str, float] = field(default_factory=dict)
    _reward_metrics: dict[str, float] = field(default_factory=dict)
    _busy: dict[str, float] = field(default_factory=dict)
    _non_finite: int = 0
    """Steps in a row whose gradient was not finite."""
    _is_commit_due: bool = False
    """A checkpoint was due while an evaluation was under way."""
    _last_commit: ManifestRef | None = None
    _last_commit_at: float = field(default_factory=time.monotonic)

    # -- Stages ------------------------------------------------------------------------------------------------------

    async def enter(self, span: StageSpan) -> None:
        """End the stage that trains, with a checkpoint, and begin `span`; nothing if that is the one."""
        if span.index == self.stage.span.index:
            return
        await self._finish_evaluation()
        await self.commit()
        failpoint("trainer.stage_ended")
        stage = await self.make_stage(span)
        await self.learner.begin_stage(span)
        self.stage = stage
        self.publisher.keep(span.max_staleness + 1)
        failpoint("trainer.stage_begun")

    # -- Rollouts ----------------------------------------------------------------------------------------------------

    async def start(self, group: int, min_policy_version: int) -> asyncio.Future[ScoredGroup]:
        stage = self.stage.spec
        prompt = self.stage.prompt(group)
        message = self._group(
            prompt,
            purpose=rollout_pb2.PURPOSE_TRAIN,
            group=group,
            group_id=str(group),
            seed_id=str(group),
            size=stage.schedule.group_size,
            sampling=self.stage.sampling(),
            score=train_score(stage),
            min_policy_version=min_policy_version,
        )
        if is_on_policy(self.spec.seed, group, stage.on_policy_fraction):
            return await self._plan(message)
        return await self.texts.start(message, prompt, stage.off_policy_source)

    async def plan(self, prompt: Prompt, **fields: Any) -> asyncio.Future[ScoredGroup]:
        """Plan a group that the student answers; for `fields` see `_group` and `make_group`."""
        return await self._plan(self._group(prompt, **fields))

    async def _plan(self, message: rollout_pb2.PromptGroup) -> asyncio.Future[ScoredGroup]:
        return await self.space.insist("more prompts", lambda: self.exchange.plan(message))

    def _group(
        self, prompt: Prompt, *, seed_id: str, size: int, pinned: bool = False, **fields: Any
    ) -> rollout_pb2.PromptGroup:
        """A group of `size` samples whose seeds follow from `seed_id`; `pinned` to its version."""
        seeds = [sample_seed(self.spec.seed, seed_id, index) for index in range(size)]
        message = make_group(prompt, job_id=self.scope.job_id, epoch=self.scope.epoch, seeds=seeds, **fields)
        if self.spec.deterministic:  # the oldest version allowed, and no other: chosen by schedule, not by time
            message.exact_policy_version_plus_one = message.min_policy_version + 1
        elif pinned:
            message.pinned_policy_version_plus_one = message.min_policy_version + 1
        return message

    async def done(self, groups: Sequence[ScoredGroup]) -> None:
        await self.exchange.done([sample for group in groups for sample in group.samples])
        failpoint("trainer.acknowledged")

    # -- Journal -----------------------------------------------------------------------------------------------------

    async def write(self, step: int, groups: Sequence[ScoredGroup], next_group: int) -> None:
        await self.space.interrupt.race(self.exchange.settled(groups))
        await self._report_failures(groups)  # first: a job that fails for them must have named them
        self.exchange.check_failures(self.spec.max_failed_fraction)
        scored = [sample for group in groups for sample in group.scored]
        self._reward_metrics = await self._judge(step, scored)
        with self.progress.timed("journal"):
            samples = self.stage.samples(scored, step)
            plan = await self.learner.plan(samples, self.heads)
            await self._write_journal(
                step,
                [sample.score for group in groups for sample in group.samples],
                groups=[group.group for group in groups],
                next_group=next_group,
                micro_batches=micro_batch_plans(samples, plan),
            )
        failpoint("trainer.journalled")
        self._batch = (samples, plan)
        self._busy = busy_seconds(scored)

    async def _judge(self, step: int, scored: Sequence[ScoredSample]) -> dict[str, float]:
        """Have completions judged, where the stage has an outcome reward; gives its metrics."""
        rewards = self.stage.rewards
        if rewards is None or not scored:
            return {}
        with self.progress.timed("judge"):
            problems = await rewards.judge(scored)
        if problems:
            message = f"{len(problems)} of {len(scored)} completions got no verdict, hence reward 0; {problems[0]}"
            await self.jobs.event(
                self.scope.job_id, "reward.failed", message, level="warning", step=step, count=len(problems)
            )
        return {**reward_metrics(scored, self.spec.teachers), "reward/failed": float(len(problems))}

    async def _write_journal(self, step: int, scores: Sequence[rollout_pb2.Score], **header: Any) -> None:
        await self.space.insist(
            f"the journal of step {step}",
            lambda: StepJournal(self.artifacts, self.scope).write(step, scores, stage=self.stage.span.index, **header),
            needed=lambda: sum(score.ByteSize() for score in scores),
        )

    async def _report_failures(self, groups: Sequence[ScoredGroup]) -> None:
        for sample in (sample for group in groups for sample in group.samples if sample.is_failed):
            failed = sample.score.failed
            self.progress.usage["failed_samples"] += 1
            FAILED_SAMPLES.inc()
            await self.jobs.event(
                self.scope.job_id,
                "sample.failed",
                f"sample {sample.sample_id}: {failed.reason}: {failed.message}",
                level="warning",
                sample_id=sample.sample_id,
                reason=failed.reason,
                service=failed.service,
                attempts=failed.attempts,
            )

    # -- Learner -----------------------------------------------------------------------------------------------------

    async def step(self, step: int, groups: Sequence[ScoredGroup]) -> None:
        samples, plan = self._batch
        self._metrics = {**await self._train(step, samples, plan), **self._reward_metrics}
        if step == 0:
            await self.look_at_first(samples, self._metrics)
        failpoint("trainer.stepped")

    async def _train(self, step: int, samples: list[TrainSample], plan: list[list[int]]) -> dict[str, float]:
        """One optimizer step, or none if its gradient is not finite; the samples are consumed either way."""
        is_skipped = False
        with self.progress.timed("train"):
            try:
                metrics = await self.learner.step(samples, self.heads, plan)
                self._non_finite = 0
            except NonFiniteError as error:
                self._non_finite += 1
                if self._non_finite >= MAX_NON_FINITE:
                    raise
                is_skipped = True
                metrics = await self.learner.skip()
                await self.jobs.event(
                    self.scope.job_id,
                    "step.skipped",
                    f"no update: {error.message}",
                    level="warning",
                    step=step,
                    sample_ids=list(error.sample_ids),
                )
        consumed = {sample.sample_id: sample.completion_ids for sample in samples}
        self.ledger.add(step, list(consumed.items()), is_skipped=is_skipped)
        self.step_done = step + 1
        return metrics

    async def replay(self) -> None:
        """Train the journalled steps that no manifest covers again: the same samples, none sampled anew."""
        for ref in self.opening.replay:
            await self.enter(self.spec.span_at(ref.step))
            await self._evaluate_again(ref.step)
            journalled = await asyncio.to_thread(read_step, self.artifacts.journal(ref.epoch, ref.step))
            scored = await self._scored_again(journalled)
            samples = self.stage.samples(scored, ref.step)
            if self.spec.deterministic:  # the next groups want the weights of the versions before
                await self.publisher.hold(ref.step, await self.learner.state_arrays())
            metrics = await self._train(ref.step, samples, plan_from_journal(samples, journalled.header.micro_batches))
            metrics |= reward_metrics(scored, self.spec.teachers) if self.stage.rewards is not None else {}
            failpoint("trainer.replayed")
            await self.progress.step_done(self.step_done, metrics, busy_seconds(scored))

    async def _scored_again(self, journalled: JournalledStep) -> list[ScoredSample]:
        """The samples of a journal. Hidden states are not in it, so those are scored again.

        If that fails for some, the step gets a new journal in this epoch which says so: the ledger stays true.
        """
        header, scores = journalled.header, journalled.scores
        hidden = [score for score in scores if score.WhichOneof("result") == "hidden"]
        fresh: dict[str, ScoredSample] = {}
        if hidden:
            group = await (await self.exchange.rescore(header.step, hidden))
            await self.exchange.done(group.samples)
            fresh = {sample.sample_id: sample for sample in group.samples}
            for score in hidden:
                if not fresh[score.rollout.sample_id].is_failed:
                    keep_journalled(score, fresh[score.rollout.sample_id].score)
        samples = [fresh.get(score.rollout.sample_id) or ScoredSample(score) for score in scores]
        if any(sample.is_failed for sample in fresh.values()):
            await self._write_journal(
                header.step,
                [sample.score for sample in samples],
                groups=header.groups,
                next_group=header.next_group,
                micro_batches=header.micro_batches,
            )
        return [sample for sample in samples if not sample.is_failed]

    # -- Weights -----------------------------------------------------------------------------------------------------

    async def publish(self, step: int) -> None:
        with self.progress.timed("publish"):
            if self.followed is not None:
                await self.followed.publish(step, self.learner.followed_arrays)
            await self.publisher.publish(step, await self.learner.state_arrays())
        POLICY_VERSION.labels("trainer", self.scope.job_id).set(step)
        if self._metrics:
            await self.progress.step_done(step, self._metrics, self._busy)
            self._metrics = {}

    # -- Checkpoints -------------------------------------------------------------------------------------------------

    async def commit_if_due(self, step: int) -> None:
        policy = self.spec.checkpoint
        is_end = step in (self.stage.span.stop_step, self.progress.stop_step)
        is_overdue = time.monotonic() - self._last_commit_at > policy.max_redo_s
        self._is_commit_due |= is_end or step % policy.every_steps == 0 or is_overdue
        if is_end:
            await self._finish_evaluation()
        if self._is_commit_due and not self.is_evaluating:
            with self.progress.timed("commit"):
                await self.commit()

    @property
    def committed_step(self) -> int:
        """Steps behind the newest checkpoint."""
        base = self._last_commit or self.opening.base
        return base.step if base else 0

    async def commit(self) -> None:
        """Commit the learner's present state, once per step."""
        step = self.step_done
        base = self._last_commit or self.opening.base
        self._is_commit_due = False
        if step == 0 or step == self.committed_step:
            return
        facts = {
            "job_id": self.scope.job_id,
            "next_group": self.stage.span.first_group_of(step),
            "stage": self.learner.stage_index,
            "parent": base.as_json() if base else None,
            "spec_sha256": manifests.spec_sha256(self.spec.model_dump(mode="json")),
            "usage": self.progress.usage,
            "ledger": self.ledger.as_json(),
            "threads": self.threads,
        }
        ref = await self.space.insist(
            f"the checkpoint of step {step}",
            lambda: self.learner.save(
                lambda save: manifests.commit(self.artifacts, self.scope.epoch, step, facts, save)
            ),
            needed=lambda: manifests.size_bytes(self.artifacts, base),
        )
        failpoint("trainer.committed")
        COMMITS.inc()
        self._last_commit, self._last_commit_at = ref, time.monotonic()
        await self.jobs.update(self.scope, committed_step=step)
        await self.jobs.event(
            self.scope.job_id, "checkpoint.saved", f"checkpoint at step {step}", step=step, name=ref.name
        )
        await asyncio.to_thread(
            retain, self.artifacts, Policy.of(self.spec), self.opening.base, on_damage=self.on_damage
        )

    # -- Evaluator ---------------------------------------------------------------------------------------------------

    @property
    def stop_step(self) -> int:
        return self.progress.stop_step

    async def evaluate_if_due(self, step: int) -> None:
        if self.evaluations is None:
            return
        if self.evaluations.is_due(step):
            await self._finish_evaluation()
            await self.commit()  # what is measured can be had, and a takeover begins no later
            await self.evaluations.begin(step)
        await self.evaluations.conclude(step)

    async def _evaluate_again(self, step: int) -> None:
        """In a replay: the claim before ended while `step` was measured beside later steps."""
        if self.evaluations is None or self.is_evaluating or self.spec.deterministic:
            return
        if self.evaluations.is_due(step):
            await self.publisher.hold(step, await self.learner.state_arrays())
            await self.evaluations.begin(step)

    @property
    def is_evaluating(self) -> bool:
        """Held-out prompts are measured beside training: nothing later is committed until that is written."""
        return self.evaluations is not None and self.evaluations.is_under_way

    async def _finish_evaluation(self) -> None:
        if self.is_evaluating:
            assert self.evaluations is not None
            with self.progress.timed("evaluate"):
                await self.evaluations.finish()

    # -- details -----------------------------------------------------------------------------------------------------

    async def choose_export(self) -> int:
        """Have in the learner what the job exports: its last weights, or its best checkpoint's; gives their step."""
        best = read_best(self.artifacts) if self.spec.checkpoint.export == "best" else None
        if best is None or best["step"] == self.step_done:
            return self.step_done
        folder = folder_of(self.artifacts, best["checkpoint"])
        span = self.spec.span_at(best["step"] - 1)
        if span.index != self.learner.stage_index:
            await self.learner.begin_stage(span)
        await self.learner.restore(folder)
        return int(best["step"])

    async def export(self, source_dir: Path, card: dict[str, Any]) -> None:
        """Write the finished student beside the artifacts, in place of an older export."""
        await self.learner.export(source_dir, self.artifacts.export(self.scope.epoch), card)
