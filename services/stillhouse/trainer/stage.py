"""What a claim has anew in each stage: prompts and their order, how completions are sampled, what of them trains.

What it has throughout (queue, learner, ledger, checkpoints) is in run.py.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from stillhouse.core.errors import JobFailedError, PreflightError
from stillhouse.core.models import ModelEntry
from stillhouse.core.queue.streams import Scope
from stillhouse.core.schemas import Check
from stillhouse.core.service import Context
from stillhouse.core.spec import JobSpec, PolicyGradientLoss, StageSpan, StageSpec, TeacherSpec
from stillhouse.core.suspicions import filtered
from stillhouse.trainer.asks import asks
from stillhouse.trainer.batch import TeacherHead, TrainSample
from stillhouse.trainer.exchange import Exchange
from stillhouse.trainer.heads import ensure_loaded, fetch_head, make_task
from stillhouse.trainer.loop import Interrupt
from stillhouse.trainer.masks import mask_tokens
from stillhouse.trainer.models import JobModels
from stillhouse.trainer.preflight import (
    Readers,
    all_stop_ids,
    check_writers,
    load_held_out,
    load_prompts,
    short_warning,
)
from stillhouse.trainer.progress import Progress
from stillhouse.trainer.prompts import Prompt, PromptOrder
from stillhouse.trainer.report import Report
from stillhouse.trainer.rewards import Rewards, outcomes
from stillhouse.trainer.samplers import SamplerPool
from stillhouse.trainer.scored import ScoredSample
from stillhouse.trainer.space import Space
from stillhouse.trainer.tokens import special_token_ids
from stillhouse.trainer.train import to_sample
from stillhouse.trainer.verify.judges import Judges, VerifierError
from stillhouse.v1 import rollout_pb2
from stillhouse.v1.rollout_pb2 import Retokenize, TeacherTask

ENDS: Final = "what ends a teacher's turns and texts ends the student's completions"
PROMPTS: Final = "every row renders by the chat templates, and fits with its completion"
VERIFIERS: Final = "every verifier loads"


@dataclass(frozen=True)
class Stage:
    """A stage that is ready: its teachers are loaded, its verifiers, too."""

    span: StageSpan
    prompts: Sequence[Prompt]
    order: PromptOrder
    """Counts from the stage's first group."""
    rewards: Rewards | None
    """Judges what the student writes; None = the stage has no outcome reward."""
    stop_ids: Sequence[int]
    """Token ids that end a completion: the student's own and the stage's."""
    special_ids: Sequence[int]
    """Special tokens of the student, where the stage masks them."""

    @property
    def spec(self) -> StageSpec:
        return self.span.stage

    def prompt(self, group: int) -> Prompt:
        """The prompt of a group."""
        return self.order[group - self.span.first_group]

    def sampling(self) -> rollout_pb2.SamplingParams:
        """How the student writes, and what is recorded of it."""
        sampling, select = self.spec.sampling, self.spec.tokens.select
        return rollout_pb2.SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            max_tokens=sampling.max_tokens,
            stop=sampling.stop,
            stop_token_ids=self.stop_ids,
            record_top_k=self.spec.loss.record_top_k(),
            record_entropies=select is not None and select.by == "entropy",
        )

    def samples(self, scored: Sequence[ScoredSample], step: int) -> list[TrainSample]:
        """What `step` of the job trains on, masks included."""
        if not scored:
            raise JobFailedError("every sample of the step failed; its events sample.failed say why")
        temperature = self.spec.sampling.temperature
        advantages = outcomes(scored, self.rewards.spec) if self.rewards is not None else {}
        samples = []
        for sample in scored:
            prompt, outcome = self.prompts[sample.score.rollout.row], advantages.get(sample.sample_id, 0.0)
            for each in sample.by_teacher():
                samples.append(to_sample(each, prompt.weight_of(each.teacher), temperature, outcome))
        return mask_tokens(samples, self.spec.tokens, step - self.span.first_step, self.special_ids)


@dataclass
class Stages:
    """Makes the stages of a claim ready, one after the other; what can be refused of them is refused at its start."""

    ctx: Context
    scope: Scope
    spec: JobSpec
    interrupt: Interrupt
    progress: Progress
    samplers: SamplerPool
    space: Space
    log: Any
    report: Report
    """What is found out about the job."""
    heads: dict[str, TeacherHead] = field(default_factory=dict)
    """Of the teachers that judge now by hidden states, by name."""
    speakers: dict[str, TeacherSpec] = field(default_factory=dict)
    """Teachers by name, with the names that samplers know their models by."""
    held_out: list[Prompt] = field(default_factory=list)
    needs_samplers: bool = False
    """Something has to be written in the stage that is on, or while it is measured."""
    needs_teachers: bool = False
    """Something has to be scored."""
    models: JobModels = field(init=False)
    exchange: Exchange = field(init=False)
    readers: Readers = field(init=False)
    _prompts: dict[int, list[Prompt]] = field(default_factory=dict)
    """By stage; of those that are still to come."""
    _rewards: dict[int, Rewards] = field(default_factory=dict)

    async def announce(self, stage: StageSpec) -> None:
        """Say what a stage needs of others: samplers are leased, or given back."""
        is_measured = self.spec.evaluation.data is not None
        self.needs_teachers = self.spec.measures_kl() or stage.asks_teachers()
        self.needs_samplers = is_measured or stage.asks_samplers()
        await self.samplers.use(self.needs_samplers)

    async def check(self, readers: Readers, spans: Sequence[StageSpan]) -> None:
        """Read the prompts and load the verifiers of the stages that are to come.

        Raises:
            PreflightError: names the stage, the row or verifier, and the fix.
        """
        self.readers = readers
        look, artifacts = self.report.look, self.ctx.artifacts
        for span in spans:
            await look("ends", ENDS, check_writers, span.stage, readers.student, readers.teachers)
            prompts = await look("prompts", PROMPTS, load_prompts, span.stage, self.spec, readers, artifacts)
            if prompts is None:
                continue
            self._prompts[span.index] = prompts
            await self._warn(span.stage, prompts)
            await look("verifiers", VERIFIERS, self._load_verifiers, span, prompts)
        self.held_out = await look("prompts", PROMPTS, load_held_out, self.spec, readers, artifacts) or []
        await self._warn_short(self.held_out, self.spec.evaluation.max_tokens)

    def prompts(self) -> list[list[Prompt]]:
        """Of each stage that is to come, as far as they can be read."""
        return [self._prompts[index] for index in sorted(self._prompts)]

    async def make(self, span: StageSpan) -> Stage:
        """Everything that a stage needs. May wait for a teacher; nothing is changed if it is interrupted."""
        stage, student = span.stage, self.readers.student
        await self.announce(stage)
        self.progress.begin_stage(stage.name)
        await self.progress.show("loading teachers")
        prompts = self._prompts[span.index]
        await self.interrupt.race(self._load_teachers(stage, prompts))
        self._prompts = {index: kept for index, kept in self._prompts.items() if index >= span.index}
        await self._close_verifiers(before=span.index)
        return Stage(
            span=span,
            prompts=prompts,
            order=PromptOrder(
                prompts,
                span.order_seed(self.spec.seed),
                stage.data.shuffle,
                stage.schedule.prompts_per_step,
                stage.data.mix,
            ),
            rewards=self._rewards.get(span.index),
            stop_ids=all_stop_ids(stage, student),
            special_ids=special_token_ids(student) if stage.tokens.mask_special else (),
        )

    async def close(self) -> None:
        """End the verifiers' processes."""
        await self._close_verifiers(before=len(self.spec.stages))

    # -- teachers ----------------------------------------------------------------------------------------------------

    async def _load_teachers(self, stage: StageSpec, prompts: Sequence[Prompt]) -> None:
        """Every teacher that judges now loaded somewhere; the heads of those whose hidden states the learner gets."""
        mix = stage.data.mix
        drawn = [prompt for prompt in prompts if mix is None or prompt.teacher in mix]
        trained, measured = _teachers(drawn), _teachers(self.held_out)
        asked = (trained if stage.needs_teacher() else set()) | measured
        entries = {name: await self.models.ready(name) for name in self.spec.teachers if name in asked}
        for name, entry in entries.items():
            self.speakers[name] = self.spec.teachers[name].model_copy(update={"model": entry.name})
        judging = (trained if stage.asks_teachers() else set()) | measured
        tasks = {name: self.task(name, entry) for name, entry in entries.items() if name in judging}
        await self.space.insist("the streams of teachers", lambda: self.exchange.open_teachers(tasks))
        with_heads = trained if stage.loss.payload() == "hidden" else set()
        with_heads = with_heads | (set() if self.spec.crosses_tokenizers() else measured)
        await self._ready(tasks, with_heads)

    async def _ready(self, tasks: Mapping[str, TeacherTask], with_heads: Collection[str]) -> None:
        for name in self.heads.keys() - with_heads:
            del self.heads[name]
        of_models = {(tasks[name].model_sha256, tasks[name].dtype): head for name, head in self.heads.items()}
        for name, task in tasks.items():
            if name not in with_heads:
                await ensure_loaded(self.ctx.registry, self.ctx.peers, task, self._tell_waiting)
                continue
            model = (task.model_sha256, task.dtype)
            if model not in of_models:  # teachers of one model share its head
                of_models[model] = await fetch_head(self.ctx.registry, self.ctx.peers, task, self._tell_waiting)
            self.heads[name] = of_models[model]

    def task(self, name: str, entry: ModelEntry) -> TeacherTask:
        """How a teacher scores."""
        threads = self.ctx.settings.threads if self.spec.deterministic else 0
        task = make_task(self.scope, name, self.spec.teachers[name], entry, asks(self.spec), threads=threads)
        if (ends := self.readers.crossing.get(name)) is not None:
            end_token_id = self.readers.for_teachers[name].end_of_turn(ends)
            task.retokenize.CopyFrom(Retokenize(student=self.spec.student.model, end_token_id=end_token_id))
        return task

    async def _tell_waiting(self, reason: str) -> None:
        """Say why no teacher takes the job; "" = one has taken it."""
        if reason:
            self.log.warning("waiting for a teacher", reason=reason)
        await self.progress.show(f"waiting for a teacher: {reason}" if reason else "loading teachers")

    # -- verifiers ---------------------------------------------------------------------------------------------------

    async def _load_verifiers(self, span: StageSpan, prompts: Sequence[Prompt]) -> None:
        """Load what judges completions, where the loss has an outcome reward."""
        loss = span.stage.loss
        reward = loss.reward if isinstance(loss, PolicyGradientLoss) else None
        if reward is None:
            return
        judges = Judges(timeout_s=reward.timeout_s)
        rewards = Rewards(reward, prompts, judges, self.readers.renderer.text, self.interrupt.race)
        self._rewards[span.index] = rewards
        await self.progress.show("loading verifiers")
        try:
            await rewards.load()
        except VerifierError as error:
            raise PreflightError(
                f"{error.message}; `stillhouse verifiers`, where the trainer ({self.ctx.instance}) runs, lists what "
                "works there"
            ) from None

    async def _close_verifiers(self, before: int) -> None:
        """Of the stages before `before`."""
        for index in [index for index in self._rewards if index < before]:
            await self._rewards.pop(index).judges.close()

    # -- warnings ----------------------------------------------------------------------------------------------------

    async def _warn(self, stage: StageSpec, prompts: Sequence[Prompt]) -> None:
        most = stage.sampling.max_tokens
        if cut := sum(len(prompt.completion_ids or ()) > most for prompt in prompts):
            await self._event(
                "data.cut",
                f"{cut} of {len(prompts)} completions are longer than sampling.max_tokens {most} and are cut, without "
                "their end; raise it to train on all of them",
            )
        if warning := filtered(stage):
            await self._event("sampling.filtered", warning)
        if self.spec.evaluation.data is not None or stage.asks_samplers():
            await self._warn_short(prompts, most)

    async def _warn_short(self, prompts: Sequence[Prompt], max_tokens: int) -> None:
        """Say that samplers which are there now read less than the student."""
        samplers = await self.ctx.registry.services("sampler")
        lengths = {info.instance: int(info.extra.get("max_length") or 0) for info in samplers}
        if warning := short_warning(prompts, max_tokens, lengths):
            await self._event("sampling.short", warning)

    async def _event(self, kind: str, message: str) -> None:
        await self.report.add(Check(name=kind, verdict="warning", message=message), event=kind)


def _teachers(prompts: Sequence[Prompt]) -> set[str]:
    """Names of the teachers of prompts."""
    return {name for prompt in prompts for name in (prompt.teacher, *(other.teacher for other in prompt.further))}
