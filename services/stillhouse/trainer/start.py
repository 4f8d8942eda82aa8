"""From a claimed job to a `Run`: prompts rendered and checked, student restored, teachers loaded, journals replayed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from stillhouse.core.blobs import JobArtifacts
from stillhouse.core.errors import PreflightError
from stillhouse.core.metrics import REWINDS
from stillhouse.core.models import ModelEntry, verify_files
from stillhouse.core.pulse import BULK
from stillhouse.core.queue.jobs import JobRecord
from stillhouse.core.queue.streams import Scope
from stillhouse.core.schemas import Check
from stillhouse.core.service import Context
from stillhouse.core.spec import JobSpec
from stillhouse.trainer import manifests
from stillhouse.trainer.accuracy import Accuracy
from stillhouse.trainer.evaluate import HeldOut
from stillhouse.trainer.evaluations import Evaluations
from stillhouse.trainer.exchange import Exchange
from stillhouse.trainer.followed import Followed
from stillhouse.trainer.ledger import Ledger
from stillhouse.trainer.loop import Interrupt
from stillhouse.trainer.manifests import Opening
from stillhouse.trainer.models import JobModels
from stillhouse.trainer.preflight import all_stop_ids
from stillhouse.trainer.progress import Progress
from stillhouse.trainer.publish import Publisher
from stillhouse.trainer.report import REFUSALS, Report
from stillhouse.trainer.run import Run
from stillhouse.trainer.samplers import SamplerPool
from stillhouse.trainer.space import Space
from stillhouse.trainer.stage import Stages
from stillhouse.trainer.texts import Texts
from stillhouse.trainer.train import LearnerThread
from stillhouse.trainer.validate import look_at_first, validate


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
    models: JobModels = field(init=False)
    stages: Stages = field(init=False)
    report: Report = field(init=False)
    """What is found out about the job."""
    publisher: Publisher | None = None
    """Of a live pre-flight; a job's is in its run."""

    def __post_init__(self) -> None:
        tell = partial(self.ctx.jobs.event, self.scope.job_id)
        self.report = Report(self.artifacts.preflight, tell, is_live=self.record.kind == "preflight")
        self.stages = Stages(
            ctx=self.ctx,
            scope=self.scope,
            spec=self.spec,
            interrupt=self.interrupt,
            progress=self.progress,
            samplers=self.samplers,
            space=self.space,
            log=self.log,
            report=self.report,
        )

    async def run(self, opening: Opening, set_status: Callable[[str], Awaitable[None]]) -> Run:
        """Validate the job and bring everything to the checkpoint that `opening` names."""
        await set_status("validating")
        await asyncio.to_thread(self.report.load)
        try:
            await validate(self, opening)
        except REFUSALS:
            await self.keep_report()
            raise
        await self.keep_report()
        student = self.models.student
        self.exchange = self.stages.exchange = await self._open_exchange()
        texts = self._texts(self.exchange, student)

        await set_status("starting")
        await self.progress.show("loading the student")
        step, ledger = await self._load_student(Path(self.models.start.path), opening)
        stage = await self.stages.make(self.spec.span_at(step))
        run = Run(
            scope=self.scope,
            spec=self.spec,
            jobs=self.ctx.jobs,
            artifacts=self.artifacts,
            opening=opening,
            exchange=self.exchange,
            samplers=self.samplers,
            learner=self.learner,
            publisher=Publisher(self.scope, self.ctx.jobs, self.samplers, stage.span.max_staleness + 1),
            followed=self._followed(),
            progress=self.progress,
            heads=self.stages.heads,
            texts=texts,
            stage=stage,
            make_stage=self.stages.make,
            threads=self.ctx.settings.threads,
            space=self.space,
            look_at_first=partial(look_at_first, self),
            on_damage=lambda message: self.log.error("a checkpoint does not verify", error=message),
            step_done=step,
            ledger=ledger,
        )
        run.evaluations = self._evaluations(run, student)
        return run

    async def catch_up(self, run: Run) -> None:
        """Train what is journalled and not in that checkpoint."""
        if steps := run.opening.replay:
            await self.progress.show(f"replaying {len(steps)} steps")
            await self.interrupt.race(run.replay())
        await self._tell_rewound(run.step_done)
        # the claim before may have died between a step or checkpoint and its record, or the record was rebuilt
        await self.ctx.jobs.update(self.scope, step=run.step_done, committed_step=run.committed_step)

    async def look(self, opening: Opening, set_status: Callable[[str], Awaitable[None]]) -> None:
        """A live pre-flight: validate the job, then probe what it would run on; the report has what was found."""
        from stillhouse.trainer.look import OF_SAMPLERS, OF_TEACHERS, Look

        await set_status("validating")
        await validate(self, opening)
        if self.report.has_errors:
            for name in (*OF_SAMPLERS, *OF_TEACHERS):
                reason = "not probed: a check that the probes rest on has failed"
                await self.report.add(Check(name=name, verdict="skipped", message=reason))
        else:
            await set_status("starting")
            await Look(self).probe()
        await self.keep_report()

    async def keep_report(self, *, anew: bool = False) -> None:
        """Write the report beside the artifacts, unless an earlier claim did."""
        if self.report.is_known and not anew:
            return
        await self.ctx.jobs.update(self.scope)  # what a zombie finds is not for others
        await self.space.insist("the pre-flight report", lambda: asyncio.to_thread(self.report.write))

    async def publish_first(self) -> None:
        """Load the student as the job would begin with it, and publish its weights to the samplers."""
        span = self.spec.spans()[0]
        load = self.learner.load(Path(self.models.start.path), self.spec, self.ctx.settings.threads, span)
        await self._tell_loaded(await self.interrupt.race(load))
        self.publisher = Publisher(self.scope, self.ctx.jobs, self.samplers, 1)
        await self.publisher.publish(0, await self.learner.state_arrays())

    async def open_models(self) -> JobModels:
        """The models of the job, checkpoints among them made models."""

        async def make(name: str) -> ModelEntry:
            from stillhouse.trainer.materialise import make_model

            await self.progress.show(f"reading checkpoint {name}")
            work = partial(self.learner.call, make_model, self.ctx.models, name, patience=BULK)
            return await self.interrupt.race(self.space.insist(f"the model of {name}", work))

        job_id = self.scope.job_id
        models = JobModels(
            job_id,
            self.spec,
            self.ctx.models,
            make=make,
            fence=lambda: self.ctx.jobs.update(self.scope),
            space=self.space,
            tell=partial(self.ctx.jobs.event, job_id),
        )
        await models.open()
        for entry in (models.student, models.start):
            await asyncio.to_thread(verify_files, entry)
        return models

    async def _open_exchange(self) -> Exchange:
        ctx = self.ctx
        exchange = Exchange(
            self.scope,
            queue=ctx.queue,
            redis=ctx.redis,
            registry=ctx.registry,
            peers=ctx.peers,
            consumer=ctx.instance,
            log=self.log,
        )
        await self.space.insist("the streams of the job", exchange.open)
        self.run_beside(exchange.run(), "take scores")
        return exchange

    def _followed(self) -> Followed | None:
        ema = self.spec.ema_of_student()
        if ema is None:
            return None
        return Followed(self.scope, ema, registry=self.ctx.registry, peers=self.ctx.peers, log=self.log)

    def _texts(self, exchange: Exchange, student: ModelEntry) -> Texts:
        """What brings off-policy groups."""
        texts = Texts(
            exchange=exchange,
            samplers=self.samplers,
            space=self.space,
            teachers=self.stages.speakers,
            tokenizer_sha256=student.tokenizer_sha256,
            log=self.log,
        )
        self.run_beside(texts.run(), "write texts")
        return texts

    async def close(self) -> None:
        """Drop what outlives no claim."""
        await self.stages.close()
        await asyncio.to_thread(self.learner.close)

    def _evaluations(self, run: Run, student: ModelEntry) -> Evaluations | None:
        if not self.stages.held_out:
            return None
        return Evaluations(
            self._held_out(run, student),
            scope=self.scope,
            spec=self.spec,
            jobs=self.ctx.jobs,
            artifacts=self.artifacts,
            space=self.space,
            publisher=run.publisher,
            learner=self.learner,
            progress=self.progress,
            step_done=lambda: run.step_done,
        )

    def _held_out(self, run: Run, student: ModelEntry) -> HeldOut:
        last = self.spec.stages[-1]
        return HeldOut(
            self.spec.evaluation,
            self.stages.held_out,
            plan=run.plan,
            done=run.exchange.done,
            race=self.interrupt.race,
            fence=lambda: self.ctx.jobs.update(self.scope),
            space=self.space,
            learner=self.learner,
            heads=run.heads,
            teachers=self.stages.speakers,
            samplers=self.samplers,
            readers=self.stages.readers,
            judge=self._accuracy().judge,
            ends={0, *(span.stop_step for span in self.spec.spans())},
            by_spans=self.spec.crosses_tokenizers(),
            stop=last.sampling.stop,
            stop_ids=all_stop_ids(last, student),
            artifacts=self.artifacts,
        )

    def _accuracy(self) -> Accuracy:
        """Judges held-out texts; trouble with a verifier is told, and ends nothing."""

        async def warn(message: str) -> None:
            await self.ctx.jobs.event(self.scope.job_id, "accuracy.failed", message, level="warning")

        text = self.stages.readers.renderer.text
        return Accuracy(self.spec.evaluation, self.stages.held_out, text, self.interrupt.race, warn)

    async def _load_student(self, model_dir: Path, opening: Opening) -> tuple[int, Ledger]:
        """Bring the learner to the state the epoch opens from; gives its step and what is behind it.

        A checkpoint is read in the stage that wrote it. That of a stage's end belongs to the stage that ends.
        """
        base = opening.base
        manifest = await asyncio.to_thread(manifests.verify, self.artifacts, base) if base else None
        if manifest is not None:
            self._check_threads(manifest)
        span = self.spec.spans()[manifest["stage"] if manifest else 0]
        load = self.learner.load(model_dir, self.spec, self.ctx.settings.threads, span)
        await self._tell_loaded(await self.interrupt.race(load))
        if self.progress.stop_step < self.spec.stop_step():
            await self.learner.end_at(self.progress.stop_step)
        if base is None or manifest is None:
            return 0, Ledger()
        await self.learner.restore(base.folder(self.artifacts))
        self.progress.restore(manifest["usage"])
        if (now := self.spec.span_at(base.step)).index != span.index:
            await self.learner.begin_stage(now)
        return base.step, Ledger(**manifest["ledger"])

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
        if self.scope.epoch > 1 and not (
            self.record.retry_of and not self.record.trainer
        ):  # else it is the first claim
            REWINDS.inc()
            await self.ctx.jobs.event(
                self.scope.job_id,
                "job.rewound",
                f"taken over by {self.ctx.instance}: continues at step {step}",
                level="warning",
                **{"from": self.record.step, "to": step, "epoch": self.scope.epoch},
            )
