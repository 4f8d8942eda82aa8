"""From a claimed job to a `Run`: prompts rendered and checked, student restored, teachers loaded, journals replayed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from stillhouse.core.blobs import JobArtifacts
from stillhouse.core.errors import PreflightError
from stillhouse.core.models import ModelEntry, verify_files
from stillhouse.core.pulse import BULK
from stillhouse.core.queue.jobs import JobRecord
from stillhouse.core.queue.streams import Scope
from stillhouse.core.service import Context
from stillhouse.core.spec import JobSpec, PolicyGradientLoss, TeacherSpec
from stillhouse.trainer import manifests
from stillhouse.trainer.accuracy import Accuracy
from stillhouse.trainer.asks import asks
from stillhouse.trainer.batch import TeacherHead
from stillhouse.trainer.evaluate import HeldOut
from stillhouse.trainer.exchange import Exchange
from stillhouse.trainer.followed import Followed
from stillhouse.trainer.heads import ensure_loaded, fetch_head, make_task
from stillhouse.trainer.ledger import Ledger
from stillhouse.trainer.loop import Interrupt
from stillhouse.trainer.manifests import Opening
from stillhouse.trainer.models import JobModels
from stillhouse.trainer.preflight import (
    Readers,
    all_stop_ids,
    filtered_warning,
    load_prompts,
    open_readers,
    short_warning,
)
from stillhouse.trainer.progress import Progress
from stillhouse.trainer.prompts import Prompt, PromptOrder
from stillhouse.trainer.publish import Publisher
from stillhouse.trainer.rewards import Rewards
from stillhouse.trainer.run import Run
from stillhouse.trainer.samplers import SamplerPool
from stillhouse.trainer.space import Space
from stillhouse.trainer.templates import Renderer
from stillhouse.trainer.texts import Texts
from stillhouse.trainer.tokens import special_token_ids, stop_token_ids
from stillhouse.trainer.train import LearnerThread
from stillhouse.trainer.verify.judges import Judges, VerifierError
from stillhouse.v1.rollout_pb2 import Retokenize, TeacherTask


@dataclass
class Start:
    """Everything a claim has before its run exists."""

    ctx: Context
    scope: Scope
    spec: JobSpec
    record: JobRecord
    """As it was when the job was claimed."""
    artifacts: JobArtifacts
    interrupt: Interrupt
    space: Space
    progress: Progress
    samplers: SamplerPool
    learner: LearnerThread
    log: Any
    run_beside: Callable[[Coroutine[Any, Any, None], str], None]
    """Runs something until the claim ends; its error ends the claim."""
    exchange: Exchange | None = None
    judges: Judges | None = None
    models: JobModels = field(init=False)
    readers: Readers = field(init=False)
    """Both set first of all."""

    async def run(self, opening: Opening, set_status: Callable[[str], Awaitable[None]]) -> Run:
        """Validate the job and bring everything to the state that `opening` names."""
        await set_status("validating")
        self._check_ranks()
        if self.spec.deterministic:
            await self._check_services()
        await self._open_models()
        stage, student = self.spec.stages[0], self.models.student
        teachers = {name: self.models.entry(name) for name in self.spec.teachers}
        self.readers = await asyncio.to_thread(open_readers, self.spec, student, teachers)
        renderer = self.readers.renderer
        prompts, held_out = await self._load_prompts()
        rewards = await self._load_rewards(prompts, renderer)
        self.exchange = await self._open_exchange(teachers)
        self.run_beside(self.exchange.run(), "take scores")
        texts = self._texts(self.exchange, student, teachers)
        self.run_beside(texts.run(), "write texts")

        await set_status("starting")
        await self.progress.show("loading the student")
        threads = self.ctx.settings.threads
        facts = await self.interrupt.race(self.learner.load(Path(self.models.start.path), self.spec, threads))
        await self._tell_loaded(facts)
        first_step, ledger = await self._restore(opening)
        await self.progress.show("loading teachers")
        heads = await self.interrupt.race(self._load_teachers(teachers, held_out))
        run = Run(
            scope=self.scope,
            spec=self.spec,
            jobs=self.ctx.jobs,
            artifacts=self.artifacts,
            opening=opening,
            exchange=self.exchange,
            samplers=self.samplers,
            learner=self.learner,
            publisher=Publisher(self.scope, self.ctx.jobs, self.samplers, stage.schedule.max_staleness + 1),
            followed=self._followed(),
            progress=self.progress,
            order=PromptOrder(
                prompts, self.spec.seed, stage.data.shuffle, stage.schedule.prompts_per_step, stage.data.mix
            ),
            prompts=prompts,
            heads=heads,
            texts=texts,
            rewards=rewards,
            stop_ids=all_stop_ids(stage, student),
            special_ids=special_token_ids(student) if stage.tokens.mask_special else (),
            threads=threads,
            space=self.space,
            on_damage=lambda message: self.log.error("a checkpoint does not verify", error=message),
            step_done=first_step,
            ledger=ledger,
        )
        run.held_out = self._held_out(run, held_out)
        if opening.replay:
            await self.progress.show(f"replaying {len(opening.replay)} steps")
            await self.interrupt.race(run.replay())
        await self._tell_rewound(run.step_done)
        # the claim before may have died between a step or checkpoint and its record, or the record was rebuilt
        await self.ctx.jobs.update(
            self.scope, step=run.step_done, committed_step=opening.base.step if opening.base else 0
        )
        return run

    async def _open_models(self) -> None:
        """The models of the job, checkpoints among them made models."""

        async def make(name: str) -> ModelEntry:
            from stillhouse.trainer.materialise import make_model

            await self.progress.show(f"reading checkpoint {name}")
            work = partial(self.learner.call, make_model, self.ctx.models, name, patience=BULK)
            return await self.interrupt.race(self.space.insist(f"the model of {name}", work))

        job_id = self.scope.job_id
        self.models = JobModels(
            job_id,
            self.spec,
            self.ctx.models,
            make=make,
            fence=lambda: self.ctx.jobs.update(self.scope),
            tell=partial(self.ctx.jobs.event, job_id),
        )
        await self.models.open()
        for entry in (self.models.student, self.models.start):
            await asyncio.to_thread(verify_files, entry)

    def _speakers(self, teachers: Mapping[str, ModelEntry]) -> dict[str, TeacherSpec]:
        """The teachers with the names that samplers know their models by."""
        return {
            name: spec.model_copy(update={"model": teachers[name].name}) for name, spec in self.spec.teachers.items()
        }

    def _check_ranks(self) -> None:
        """Refuse what several ranks do not do."""
        number = self.learner.num_ranks
        if number == 1:
            return
        instead = "run the job on a trainer with trainer_ranks 1 (`stillhouse up --trainer-ranks 1`), or"
        if self.spec.student.lora is not None:
            raise PreflightError(
                f"the job trains a low-rank adapter, and this trainer has trainer_ranks {number}, which splits whole "
                f"weights only: {instead} remove student.lora"
            )
        if self.spec.deterministic:
            raise PreflightError(
                f"the job is deterministic, and this trainer has trainer_ranks {number}: sums over ranks differ in "
                f"their last bits from those of another number of ranks: {instead} remove deterministic"
            )

    async def _check_services(self) -> None:
        """The last bits of every sum depend on engine and threads: all samplers must agree before the first sample.
        Teachers see for themselves, those that come later, too: `TeacherTask.threads`."""
        threads = self.ctx.settings.threads
        if threads == 0:
            raise PreflightError(
                "a deterministic job needs a fixed number of threads; set STILLHOUSE_THREADS "
                "(`stillhouse up --threads`) to the same number in sampler, teacher and trainer"
            )
        for info in await self.ctx.registry.services("sampler"):
            found = (info.extra.get("engine", ""), info.extra.get("threads", ""))
            if found != ("transformers", str(threads)):
                raise PreflightError(
                    f"a deterministic job needs the engine transformers with {threads} threads everywhere, as in this "
                    f"trainer; {info.role} '{info.instance}' has engine {found[0]} with {found[1]} threads"
                )

    async def _load_prompts(self) -> tuple[list[Prompt], list[Prompt]]:
        """Training and held-out prompts, rendered and checked."""
        stage = self.spec.stages[0]
        prompts, held_out = await asyncio.to_thread(load_prompts, self.spec, self.readers, self.ctx.artifacts)
        most = stage.sampling.max_tokens
        await self._tell_cut([len(prompt.completion_ids or ()) > most for prompt in prompts])
        if warning := filtered_warning(stage):
            await self.ctx.jobs.event(self.scope.job_id, "sampling.filtered", warning, level="warning")
        if self.spec.asks_samplers():
            await self._tell_short(prompts, most)
        await self._tell_short(held_out, self.spec.evaluation.max_tokens)
        return prompts, held_out

    async def _tell_short(self, prompts: list[Prompt], max_tokens: int) -> None:
        """Say that samplers which are there now read less than the student."""
        samplers = await self.ctx.registry.services("sampler")
        lengths = {info.instance: int(info.extra.get("max_length") or 0) for info in samplers}
        if warning := short_warning(prompts, max_tokens, lengths):
            await self.ctx.jobs.event(self.scope.job_id, "sampling.short", warning, level="warning")

    async def _tell_cut(self, is_cut: Sequence[bool]) -> None:
        """Say that completions of the data lose their end: the student would learn to go on for ever."""
        if any(is_cut):
            most = self.spec.stages[0].sampling.max_tokens
            await self.ctx.jobs.event(
                self.scope.job_id,
                "data.cut",
                f"{sum(is_cut)} of {len(is_cut)} completions are longer than sampling.max_tokens {most} and are cut, "
                "without their end; raise it to train on all of them",
                level="warning",
            )

    async def _open_exchange(self, teachers: dict[str, ModelEntry]) -> Exchange:
        ctx = self.ctx
        exchange = Exchange(
            self.scope,
            queue=ctx.queue,
            redis=ctx.redis,
            registry=ctx.registry,
            peers=ctx.peers,
            consumer=ctx.instance,
            tasks=self._tasks(teachers),
            log=self.log,
        )
        await self.space.insist("the streams of the job", exchange.open)
        return exchange

    def _tasks(self, teachers: dict[str, ModelEntry]) -> dict[str, TeacherTask]:
        """How the teachers that score do it, by name."""
        asked = self.spec.teachers if self.spec.asks_teachers() else {}
        wanted, threads = asks(self.spec), self.ctx.settings.threads if self.spec.deterministic else 0
        tasks = {
            name: make_task(self.scope, name, spec, teachers[name], wanted, threads=threads)
            for name, spec in asked.items()
        }
        for name, ends in self.readers.crossing.items():
            end_token_id = self.readers.for_teachers[name].end_of_turn(ends)
            tasks[name].retokenize.CopyFrom(Retokenize(student=self.spec.student.model, end_token_id=end_token_id))
        return tasks

    def _followed(self) -> Followed | None:
        ema = self.spec.ema_of_student()
        if ema is None:
            return None
        return Followed(self.scope, ema, registry=self.ctx.registry, peers=self.ctx.peers, log=self.log)

    def _texts(self, exchange: Exchange, student: ModelEntry, teachers: dict[str, ModelEntry]) -> Texts:
        """What brings off-policy groups; if teachers write them, they must end as the student does."""
        stage = self.spec.stages[0]
        writes = stage.on_policy_fraction < 1 and stage.off_policy_source == "teacher"
        known = all_stop_ids(stage, student)
        for name, entry in teachers.items() if writes else ():
            if odd := sorted(set(stop_token_ids(entry)) - set(known)):
                raise PreflightError(
                    f"teacher '{name}' ({entry.name}) ends its texts with the tokens {odd}, too, at which the student "
                    f"({student.name}) would go on; add them to sampling.stop_token_ids"
                )
        return Texts(
            exchange=exchange,
            samplers=self.samplers,
            space=self.space,
            teachers=self._speakers(teachers) if writes else None,
            tokenizer_sha256=student.tokenizer_sha256,
            log=self.log,
        )

    async def _load_rewards(self, prompts: Sequence[Prompt], renderer: Renderer) -> Rewards | None:
        """What judges completions, its verifiers loaded; None = the loss has no outcome reward."""
        loss = self.spec.stages[0].loss
        reward = loss.reward if isinstance(loss, PolicyGradientLoss) else None
        if reward is None:
            return None
        self.judges = Judges(timeout_s=reward.timeout_s)
        rewards = Rewards(reward, prompts, self.judges, renderer.text, self.interrupt.race)
        await self.progress.show("loading verifiers")
        try:
            await rewards.load()
        except VerifierError as error:
            raise PreflightError(
                f"{error.message}; `stillhouse verifiers`, where the trainer ({self.ctx.instance}) runs, lists what "
                "works there"
            ) from None
        return rewards

    async def close(self) -> None:
        """Drop what outlives no claim."""
        if self.judges is not None:
            await self.judges.close()
        await asyncio.to_thread(self.learner.close)

    async def _load_teachers(
        self, teachers: dict[str, ModelEntry], held_out: Sequence[Prompt]
    ) -> dict[str, TeacherHead]:
        """Every teacher loaded somewhere; the heads of those whose hidden states come to the learner."""
        loss = self.spec.stages[0].loss
        needs_heads = loss.payload() == "hidden" or (bool(held_out) and not loss.crosses_tokenizers())
        heads: dict[str, TeacherHead] = {}
        of_models: dict[tuple[str, int], TeacherHead] = {}
        for name, task in self._tasks(teachers).items():
            if needs_heads:
                model = (task.model_sha256, task.dtype)
                if model not in of_models:  # teachers of one model share its head
                    of_models[model] = await fetch_head(self.ctx.registry, self.ctx.peers, task, self._tell_waiting)
                heads[name] = of_models[model]
            else:
                await ensure_loaded(self.ctx.registry, self.ctx.peers, task, self._tell_waiting)
        return heads

    async def _tell_waiting(self, reason: str) -> None:
        """Say why no teacher takes the job; "" = one has taken it."""
        if reason:
            self.log.warning("waiting for a teacher", reason=reason)
        await self.progress.show(f"waiting for a teacher: {reason}" if reason else "loading teachers")

    def _held_out(self, run: Run, prompts: Sequence[Prompt]) -> HeldOut | None:
        if not prompts:
            return None
        return HeldOut(
            self.spec.evaluation,
            prompts,
            plan=run.plan,
            done=run.exchange.done,
            race=self.interrupt.race,
            fence=lambda: self.ctx.jobs.update(self.scope),
            space=self.space,
            learner=self.learner,
            heads=run.heads,
            teachers=self._speakers(self.readers.teachers),
            samplers=self.samplers,
            readers=self.readers,
            judge=self._accuracy(prompts).judge,
            by_spans=run.stage.loss.crosses_tokenizers(),
            stop=run.stage.sampling.stop,
            stop_ids=run.stop_ids,
            artifacts=self.artifacts,
        )

    def _accuracy(self, prompts: Sequence[Prompt]) -> Accuracy:
        """Judges held-out texts; trouble with a verifier is told, and ends nothing."""

        async def warn(message: str) -> None:
            await self.ctx.jobs.event(self.scope.job_id, "accuracy.failed", message, level="warning")

        return Accuracy(self.spec.evaluation, prompts, self.readers.renderer.text, self.interrupt.race, warn)

    async def _restore(self, opening: Opening) -> tuple[int, Ledger]:
        """Bring the learner to the state the epoch opens from; returns its step and what is behind it."""
        if opening.base is None:
            return 0, Ledger()
        manifest = await asyncio.to_thread(manifests.verify, self.artifacts, opening.base)
        self._check_threads(manifest)
        await self.learner.restore(opening.base.folder(self.artifacts))
        self.progress.restore(manifest["usage"])
        return int(manifest["step"]), Ledger(**manifest["ledger"])

    def _check_threads(self, manifest: Mapping[str, Any]) -> None:
        """Another number of threads sums in another order: the last bits would differ."""
        if self.spec.deterministic and manifest["threads"] != self.ctx.settings.threads:
            raise PreflightError(
                f"the job is deterministic and was trained with {manifest['threads']} threads, this trainer has "
                f"{self.ctx.settings.threads}; set STILLHOUSE_THREADS={manifest['threads']}"
            )

    async def _tell_loaded(self, facts: Mapping[str, Any]) -> None:
        how = "packed" if facts["packing"] else "padded"
        message = (
            f"{facts['learning_parameters']:,} of the student's {facts['parameters']:,} parameters learn; samples are "
            f"{how}: {facts['packing_reason']}"
        )
        self.log.info("student loaded", **facts)
        await self.ctx.jobs.event(self.scope.job_id, "student.loaded", message, **facts)

    async def _tell_rewound(self, step: int) -> None:
        if self.scope.epoch > 1:
            await self.ctx.jobs.event(
                self.scope.job_id,
                "job.rewound",
                f"taken over by {self.ctx.instance}: continues at step {step}",
                level="warning",
                **{"from": self.record.step, "to": step, "epoch": self.scope.epoch},
            )
