"""Leading a job: one claim from lease to final state.

    claim -> open epoch -> validating (pre-flight) -> starting (load, restore, replay) -> running (loop) -> succeeded
                                   |                         |                              |
                                   +----- failed ------------+------- cancelled ------------+---- draining: handed on
                                                                                                 paused

The lease is renewed in the background; a lost lease stops everything without another write. What ends a claim
otherwise is written once, by a fenced update of the record and `final.json` beside the artifacts.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from redis.exceptions import RedisError

from stillhouse.core import tracing
from stillhouse.core.blobs import is_no_space, sha256_file
from stillhouse.core.checkpoints import read_references
from stillhouse.core.errors import ConflictError, JobFailedError, LeaseLostError, StillhouseError
from stillhouse.core.evaluations import read_best, read_stop, stop_step
from stillhouse.core.failpoints import failpoint
from stillhouse.core.metrics import CLAIMS_ENDED, forget_job
from stillhouse.core.queue.jobs import JobRecord
from stillhouse.core.queue.streams import Scope
from stillhouse.core.queue.turns import CLAIMABLE
from stillhouse.core.report.facts import without_rows
from stillhouse.core.service import Context
from stillhouse.core.spec import JobSpec, SamplersSpec, StageSpan, StageSpec
from stillhouse.core.tasks import cancel_all
from stillhouse.trainer import manifests
from stillhouse.trainer.ends import CRASHED, HANDED_ON, End, Ends
from stillhouse.trainer.loop import Collaborators, Interrupt, Interrupted, run_opd
from stillhouse.trainer.manifests import Opening
from stillhouse.trainer.measures import card_facts, change
from stillhouse.trainer.models import model_names
from stillhouse.trainer.progress import Progress
from stillhouse.trainer.publish import Publisher
from stillhouse.trainer.run import Run
from stillhouse.trainer.samplers import SamplerPool
from stillhouse.trainer.space import Space
from stillhouse.trainer.start import Start
from stillhouse.trainer.trackers.base import TrackedRun, Trackers
from stillhouse.trainer.trackers.kinds import open_tracker
from stillhouse.trainer.train import LearnerThread
from stillhouse.trainer.watch import Watch

MAX_FRUITLESS: Final = 5
"""Claims in a row that end by a crash without a single step: then it is the job that crashes its trainers."""
ANY_SAMPLER: Final = SamplersSpec(min=1)
"""A live pre-flight takes what is free."""


class Lead:
    """One claim of one job by this trainer."""

    def __init__(
        self, ctx: Context, record: JobRecord, scope: Scope, make_learner: Callable[[], LearnerThread] = LearnerThread
    ) -> None:
        self._ctx = ctx
        self.scope = scope
        self._record = record
        self.spec = JobSpec.model_validate(record.spec)
        self.artifacts = ctx.artifacts.job(scope.job_id)
        self.interrupt = Interrupt()
        self.progress = Progress(scope, ctx.jobs, self.spec.stop_step())
        self.status = "validating"
        self._traceparent = ""
        """Of the claim."""
        self._waits = record.kind == "distillation"
        """A job waits for services that are not there; a live pre-flight says so and ends."""
        self.run_: Run | None = None
        self._trackers: Trackers | None = None
        self._is_ready = False
        """The run has caught up with its journals."""
        self._log = ctx.log.bind(job_id=scope.job_id, epoch=scope.epoch)
        self._ends = Ends(ctx, scope, self.artifacts, self._log)
        self._background: list[asyncio.Task[None]] = []
        self.space = Space(self.artifacts.root, self.interrupt, self._log)
        self._start = Start(
            ctx=ctx,
            scope=scope,
            spec=self.spec,
            record=record,
            artifacts=self.artifacts,
            interrupt=self.interrupt,
            space=self.space,
            progress=self.progress,
            samplers=SamplerPool(
                scope,
                self.spec.samplers if record.kind == "distillation" else ANY_SAMPLER,
                registry=ctx.registry,
                peers=ctx.peers,
                lease_s=ctx.settings.lease_s,
                log=self._log,
                priority=self.spec.priority,
            ),
            learner=make_learner(),
            log=self._log,
            run_beside=self._run_beside,
        )

    @property
    def publisher(self) -> Publisher | None:
        """Whose weights the samplers fetch; None = none are published yet."""
        return self.run_.publisher if self.run_ else self._start.publisher

    # -- the claim ---------------------------------------------------------------------------------------------------

    async def lead(self) -> None:
        """Work until the job has ended, the lease is lost or the process drains. Errors end up in the job's record."""
        about = {"job_id": self.scope.job_id, "epoch": self.scope.epoch}
        before = self._record.traceparent
        # over at once, so that what follows has a parent even if this process is killed
        with tracing.span("claim", kind="consumer", parent=before, **about) as span:
            self._traceparent = span.traceparent or before
            if self.scope.epoch > 1:
                span.link(before)
                span.event("job.taken_over", {"stillhouse.previous_epoch": self.scope.epoch - 1})
        with tracing.within(self._traceparent, **about):
            await self._lead_on()

    async def _lead_on(self) -> None:
        watch = Watch(
            self._ctx,
            self.scope,
            interrupt=self.interrupt,
            samplers=self._start.samplers,
            min_samplers=lambda: self.spec.samplers.min if self._waits and self._start.stages.needs_samplers else 0,
            status=lambda: self.status,
            idle_s=lambda: self._start.exchange.idle_s() if self._start.exchange else 0.0,
            trouble=self.space.trouble,
            needs_teachers=lambda: self._waits and self._start.stages.needs_teachers,
        )
        self._run_beside(watch.run(), "renew lease")
        end: End | None = None
        try:
            end = await self._work()
        except LeaseLostError as error:
            self._log.warning("lease lost; dropping everything", reason=error.message)
            await self._ends.close_epoch("lease_lost", error.message)
        except RedisError as error:
            self._log.error("queue server lost; the job goes on under a new claim", error=str(error))
            await self._ends.close_epoch("queue_lost", str(error))
        finally:
            await cancel_all(self._background)
            if self.run_ is not None and self.run_.evaluations is not None:
                await self.run_.evaluations.cancel()
            with suppress(RedisError, OSError):
                await self._start.samplers.release()
            await self._start.close()
            if self._trackers is not None:
                await asyncio.to_thread(self._trackers.close)
            forget_job(self.scope.job_id)
            CLAIMS_ENDED.labels("lost" if end is None else end.status.replace(" ", "_")).inc()
        if end is not None:
            await self._ends.write(
                end, self._start.exchange, step=self.run_.step_done if self.run_ is not None else self._record.step
            )

    def _run_beside(self, work: Coroutine[Any, Any, None], name: str) -> None:
        self._background.append(asyncio.create_task(work, name=name))

    async def _work(self) -> End:
        """Lead to an end; whatever goes wrong with the job is one."""
        try:
            try:
                return await self._lead()
            except Interrupted as stop:
                return await self._stopped(stop.reason)
        except (LeaseLostError, RedisError):
            raise
        except StillhouseError as error:
            return End("failed", error=_as_error(error))
        except Exception as error:
            # whoever claims the job next may have more luck; the process goes on, too
            self._log.exception("claim crashed")
            return End(CRASHED, error={"code": "internal", "message": f"{type(error).__name__}: {error}"})

    async def _lead(self) -> End:
        failpoint("trainer.claimed")
        number, message = await asyncio.to_thread(manifests.fruitless_claims, self.artifacts)
        opening = await self._guard(self.space.insist("the new claim", lambda: asyncio.to_thread(self._open)))
        self.progress.stop_step = await asyncio.to_thread(stop_step, self.spec, self.artifacts)
        if self._record.status == "cancelling":
            raise Interrupted("cancelled")
        if number >= MAX_FRUITLESS:
            raise JobFailedError(
                f"{number} trainers in a row died with this job before a step was trained; the last said: "
                f"{message or 'nothing, it was killed (out of memory?); see its log'}"
            )
        if self.spec.asks_samplers():
            self._run_beside(self._start.samplers.run(), "lease samplers")
        if not self._waits:
            await self._guard(self.interrupt.race(self._start.look(opening, self._set_status)))
            return End("succeeded", result={"preflight": self._start.report.answer().model_dump(mode="json")})
        self._trackers = self._open_trackers()
        with tracing.span("prepare"):
            run = await self._guard(self._start.run(opening, self._set_status))
            self.run_ = run
            await self._guard(self._start.catch_up(run))
        self._is_ready = True
        await self._guard(self._train(run))
        return await self._finish(run)

    def _open(self) -> Opening:
        return manifests.open_epoch(
            self.artifacts, self.scope.epoch, self._ctx.instance, self._on_damage, lag=self.spec.lag
        )

    async def _guard(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Await `work`, but end with the exception of a background task that dies first."""
        task = asyncio.ensure_future(work)
        try:
            while not task.done():
                # not for ever: `work` itself adds background tasks
                await asyncio.wait({task, *self._background}, timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
                for other in self._background:
                    if other.done():
                        _reraise(other)
            return task.result()
        finally:
            await cancel_all([task])

    def _open_trackers(self) -> Trackers | None:
        if not self.spec.trackers:
            return None
        loop, events = asyncio.get_running_loop(), self._ctx.jobs.event

        def tell(message: str) -> None:
            self._log.warning("tracker", problem=message)
            with suppress(RuntimeError):  # the process ends: nobody is left to tell
                asyncio.run_coroutine_threadsafe(
                    events(self.scope.job_id, "tracker.failed", message, level="warning"), loop
                )

        config = without_rows(self.spec.model_dump(mode="json"))
        run = TrackedRun(self.scope.job_id, self.spec.name or self.scope.job_id, config, self.artifacts.root)
        trackers = Trackers(self.spec.trackers, run, open_tracker, tell)
        self.progress.on_metrics = trackers.log
        return trackers

    # -- running -----------------------------------------------------------------------------------------------------

    async def _train(self, run: Run) -> None:
        """What is left of the stages, one after the other."""
        await run.publish(run.step_done)
        for span in self.spec.spans()[self.spec.span_at(run.step_done).index :]:
            await run.enter(span)
            await self._wait_for_samplers()
            if self.status != "running":
                await self._set_status("running", started_at=self._record.started_at or time.time())
            if run.step_done == span.first_step:
                await self._tell_started(span)
            self.progress.phase = "training"
            self.progress.start_clock()
            await run_opd(span, run.step_done, Collaborators(run, run, run, run, run, run), self.interrupt)
        await run.evaluate_if_due(run.stop_step)
        await run.commit()

    async def _wait_for_samplers(self) -> None:
        if self._start.stages.needs_samplers:
            await self.progress.show("waiting for samplers")
            await self.interrupt.race(self._start.samplers.wait_for_min())

    async def _tell_started(self, span: StageSpan) -> None:
        stage = span.stage
        message = f"stage '{stage.name}' ({span.index + 1} of {len(self.spec.stages)}) begins at step {span.first_step}"
        facts = {"stage": stage.name, "index": span.index, "step": span.first_step}
        await self._ctx.jobs.event(self.scope.job_id, "stage.started", message, **facts)

    async def _finish(self, run: Run) -> End:
        """Export the student, then say so: `succeeded` means that all steps are committed."""
        if run.step_done != run.stop_step:
            raise JobFailedError(f"ended at step {run.step_done} of {run.stop_step}")
        await self.progress.show("exporting")
        with tracing.span("export"):
            exported = await self._guard(run.choose_export())
            result = self._result(run, exported)
            student = self._ctx.models.get(self.spec.student.model)
            card = self._card(result)
            await self._guard(self.space.insist("the export", lambda: run.export(Path(student.path), card)))
        failpoint("trainer.exported")
        return End("succeeded", result=result)

    def _result(self, run: Run, exported_step: int) -> dict[str, Any]:
        export = self.artifacts.export(self.scope.epoch).relative_to(self.artifacts.root)
        result: dict[str, Any] = {
            "steps": run.step_done,
            "exported_step": exported_step,
            "export": "ckpt_export",
            "export_path": str(export),
            "usage": self.progress.usage,
        }
        if run.evaluations is not None:
            held_out = run.evaluations.held_out
            result["evaluation"] = change(held_out.read(0), held_out.read(exported_step))
            result["best_checkpoint"] = read_best(self.artifacts)
        if (stop := read_stop(self.artifacts)) is not None:
            result["early_stop"] = stop
        return result

    def _card(self, result: dict[str, Any]) -> dict[str, Any]:
        """What the model card of the export says."""
        card: dict[str, Any] = {
            "student": self.spec.student.model,
            **model_names(self.spec, read_references(self.artifacts)),
            "stages": [self._stage_card(stage) for stage in self.spec.stages],
            "job_id": self.scope.job_id,
            "spec_sha256": manifests.spec_sha256(self.spec.model_dump(mode="json")),
        }
        lora, decay = self.spec.student.lora, self.spec.stages[-1].optimizer.ema_decay
        if lora is not None:
            card["adapter"] = lora.model_dump()
        if decay is not None:
            card["ema_decay"] = decay
        if "evaluation" in result:
            card |= card_facts(result["evaluation"])
        return card

    def _stage_card(self, stage: StageSpec) -> dict[str, Any]:
        data = stage.data
        return {
            "name": stage.name,
            **({"recipe": stage.recipe} if stage.recipe is not None else {}),
            "objective": stage.loss.model_dump(),
            "on_policy_fraction": stage.on_policy_fraction,
            "off_policy_source": stage.off_policy_source,
            "steps": stage.schedule.steps,
            "data_sha256": sha256_file(self._ctx.artifacts.file(data.file))
            if data.file
            else manifests.spec_sha256(data.model_dump(mode="json")),
        }

    # -- ends --------------------------------------------------------------------------------------------------------

    async def _stopped(self, reason: str) -> End:
        """A clean stop between steps: what is trained is committed; a cancelled job ends, else it goes on later."""
        failpoint("trainer.stopping", reason)
        run = self.run_ if self._is_ready else None
        if run is not None and (reason == "cancelled" or not run.is_evaluating):
            try:
                await run.commit()
            except Exception as error:
                if not is_no_space(error):
                    raise
                self._log.error("no room for a last checkpoint; the journals have all of it", error=str(error))
        return End("cancelled") if reason == "cancelled" else End(HANDED_ON)

    async def _set_status(self, status: str, **fields: Any) -> None:
        self.status = status
        try:
            await self._ctx.jobs.update(
                self.scope,
                allowed=tuple(each for each in CLAIMABLE if each != "cancelling"),
                status=status,
                status_reason="",
                status_message="",
                stop_step=self.progress.stop_step,
                traceparent=self._traceparent,
                **fields,
            )
        except ConflictError:  # a wish of the user's came meanwhile
            record = await self._ctx.jobs.get(self.scope.job_id)
            raise Interrupted("paused" if record.status == "pausing" else "cancelled") from None
        await self._ctx.jobs.event(
            self.scope.job_id, "job.status", f"job {status}", status=status, epoch=self.scope.epoch
        )

    def _on_damage(self, message: str) -> None:
        self._log.error("a file of the job does not verify; falling back to an older one", error=message)


def _as_error(error: StillhouseError) -> dict[str, Any]:
    return {"code": error.code, "message": error.message, "param": error.param, "service": "trainer"}


def _reraise(task: asyncio.Task[Any]) -> None:
    """Raise what ended a background task, out of the group it may be wrapped in."""
    error = task.exception()
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if error is not None:
        raise error
    raise JobFailedError(f"background task '{task.get_name()}' ended early")
