"""Leading a job: one claim from lease to final state.

    claim -> open epoch -> validating (pre-flight) -> starting (load, restore, replay) -> running (loop) -> succeeded
                                   |                         |                              |
                                   +----- failed ------------+------- cancelled ------------+---- draining: handed on

The lease is renewed in the background; a lost lease stops everything without another write. What ends a claim
otherwise is written once, by a fenced update of the record and `final.json` beside the artifacts.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from redis.exceptions import RedisError

from stillhouse.core.blobs import sha256_file, write_json
from stillhouse.core.errors import ConflictError, JobFailedError, LeaseLostError, PreflightError, StillhouseError
from stillhouse.core.models import ModelEntry, verify_files
from stillhouse.core.queue.jobs import JobRecord, final_document
from stillhouse.core.queue.streams import Scope
from stillhouse.core.service import Context
from stillhouse.core.spec import DataSpec, FullVocabularyLoss, JobSpec
from stillhouse.core.tasks import cancel_all
from stillhouse.trainer import manifests
from stillhouse.trainer.batch import TeacherHead
from stillhouse.trainer.evaluate import HeldOut
from stillhouse.trainer.exchange import Exchange
from stillhouse.trainer.heads import ensure_loaded, fetch_head, make_task
from stillhouse.trainer.loop import Collaborators, Interrupt, Interrupted, Pace, run_opd
from stillhouse.trainer.manifests import Opening
from stillhouse.trainer.progress import Progress
from stillhouse.trainer.prompts import Prompt, PromptOrder, Renderer, check_lengths, load_rows, prepare
from stillhouse.trainer.publish import Publisher
from stillhouse.trainer.run import Run
from stillhouse.trainer.samplers import SamplerPool
from stillhouse.trainer.tokens import stop_token_ids
from stillhouse.trainer.train import LearnerThread

LEADABLE: Final = ("queued", "validating", "starting", "running", "stalled", "cancelling")
"""States in which a trainer may take a job over."""


NO_PROGRESS_S: Final = 120.0
"""Time without a score after which a job says that it makes no progress: longer than any completion on a CPU takes."""
HANDED_ON: Final = "handed on"


@dataclass(frozen=True, slots=True)
class _End:
    """How a claim ended: a terminal status of the job, or HANDED_ON."""

    status: str
    error: dict[str, Any] | None = None
    result: dict[str, Any] | None = None


class Lead:
    """One claim of one job by this trainer."""

    def __init__(self, ctx: Context, record: JobRecord, scope: Scope) -> None:
        self._ctx = ctx
        self.scope = scope
        self._record = record
        self.spec = JobSpec.model_validate(record.spec)
        self.artifacts = ctx.artifacts.job(scope.job_id)
        self.interrupt = Interrupt()
        self.progress = Progress(scope, ctx.jobs, self.spec.stop_step())
        self.status = "validating"
        self.run_: Run | None = None
        self._log = ctx.log.bind(job_id=scope.job_id, epoch=scope.epoch)
        self._samplers = SamplerPool(
            scope,
            self.spec.samplers,
            registry=ctx.registry,
            peers=ctx.peers,
            lease_s=ctx.settings.lease_s,
            log=self._log,
        )
        self._learner = LearnerThread()
        self._exchange: Exchange | None = None

    # -- the claim ---------------------------------------------------------------------------------------------------

    async def lead(self) -> None:
        """Work until the job has ended, the lease is lost or the process drains. Errors end up in the job's record."""
        background = [asyncio.create_task(self._renew(), name="renew lease")]
        end: _End | None = None
        try:
            end = await self._work(background)
        except LeaseLostError as error:
            self._log.warning("lease lost; dropping everything", reason=error.message)
        except RedisError as error:
            self._log.error("queue server lost; the job goes on under a new claim", error=str(error))
        finally:
            await cancel_all(background)
            with suppress(RedisError, OSError):
                await self._samplers.release()
            await asyncio.to_thread(self._learner.close)
        if end is not None:
            await self._write_end(end)

    async def _work(self, background: list[asyncio.Task[Any]]) -> _End:
        """Lead to an end; whatever goes wrong with the job is one."""
        try:
            try:
                return await self._lead(background)
            except Interrupted as stop:
                return await self._stopped(stop.reason)
        except (LeaseLostError, RedisError):
            raise
        except StillhouseError as error:
            return _End("failed", error=_as_error(error))
        except Exception as error:
            # the job's record must say so; the process goes on with the next job
            self._log.exception("job crashed")
            return _End("failed", error={"code": "internal", "message": f"{type(error).__name__}: {error}"})

    async def _lead(self, background: list[asyncio.Task[Any]]) -> _End:
        opening = await asyncio.to_thread(
            manifests.open_epoch, self.artifacts, self.scope.epoch, self._ctx.instance, self._on_corrupt
        )
        if self._record.status == "cancelling":
            raise Interrupted("cancelled")
        background.append(asyncio.create_task(self._samplers.run(), name="lease samplers"))
        run = await self._watch(background, self._prepare(opening, background))
        self.run_ = run
        await self._watch(background, self._train(run))
        return await self._finish(run)

    async def _watch(self, background: list[asyncio.Task[Any]], work: Any) -> Any:
        """Await `work`, but end with the exception of a background task that dies first."""
        task = asyncio.ensure_future(work)
        try:
            while not task.done():
                # not for ever: `work` itself adds background tasks
                await asyncio.wait({task, *background}, timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
                for other in background:
                    if other.done():
                        _reraise(other)
            return task.result()
        finally:
            await cancel_all([task])

    async def _renew(self) -> None:
        """Keep the lease; pass on a user's wish to cancel and the process's wish to stop.

        Raises:
            LeaseLostError: another trainer leads the job.
        """
        lease_s = self._ctx.settings.lease_s
        while True:
            if self._ctx.stop.is_set():
                self.interrupt.set("draining")
            try:
                await self._ctx.jobs.renew(self.scope, self._ctx.instance, lease_s)
                record = await self._ctx.jobs.get(self.scope.job_id)
                if record.status == "cancelling":
                    self.interrupt.set("cancelled")
                elif self.status in ("starting", "running"):
                    with suppress(ConflictError):  # it ended or was cancelled just now
                        await self._tell_missing(record)
            except (RedisError, OSError) as error:
                self._log.warning("cannot renew the lease", error=str(error))
            await asyncio.sleep(min(1.0, lease_s / 3))

    async def _tell_missing(self, record: JobRecord) -> None:
        """Say in the record which service the job waits for because none is there, and take it back when one is."""
        reason = message = ""
        if self._samplers.size < self.spec.samplers.min and not await self._ctx.registry.services("sampler"):
            reason, message = "no_sampler", "no sampler service is running; `stillhouse ps` shows what runs"
        elif not await self._ctx.registry.services("teacher"):
            reason, message = "no_teacher", "no teacher service is running; `stillhouse ps` shows what runs"
        elif self._exchange is not None and self._exchange.idle_s() > NO_PROGRESS_S:
            reason = "no_progress"
            message = f"no score for {NO_PROGRESS_S:g} s although groups are in flight; see the services' logs"
        if record.status_reason != reason or record.status == "stalled":
            await self._ctx.jobs.update(
                self.scope,
                allowed=("starting", "running", "stalled"),
                status=self.status,
                status_reason=reason,
                status_message=message,
            )
            if reason:
                await self._ctx.jobs.event(self.scope.job_id, "warning", message, level="warning", reason=reason)

    # -- validating and starting -------------------------------------------------------------------------------------

    async def _prepare(self, opening: Opening, background: list[asyncio.Task[Any]]) -> Run:
        await self._set_status("validating")
        student = self._ctx.models.get(self.spec.student.model)
        teachers = {name: self._ctx.models.get(spec.model) for name, spec in self.spec.teachers.items()}
        await asyncio.to_thread(verify_files, student)
        renderer = await asyncio.to_thread(Renderer, Path(student.path))
        prompts, held_out = await self._load_prompts(renderer, student, teachers)
        exchange = await self._open_exchange(teachers)
        background.append(asyncio.create_task(exchange.run(), name="take scores"))

        await self._set_status("starting")
        await self.progress.show("loading the student")
        threads = self._ctx.settings.threads
        await self.interrupt.race(self._learner.load(Path(student.path), self.spec, threads))
        first_step = await self._restore(opening)
        await self.progress.show("loading teachers")
        heads = await self.interrupt.race(self._load_teachers(teachers, held_out))
        stage = self.spec.stages[0]
        run = Run(
            scope=self.scope,
            spec=self.spec,
            jobs=self._ctx.jobs,
            artifacts=self.artifacts,
            opening=opening,
            exchange=exchange,
            samplers=self._samplers,
            learner=self._learner,
            publisher=Publisher(self.scope, self._ctx.jobs, self._samplers, stage.schedule.max_staleness + 1),
            progress=self.progress,
            order=PromptOrder(prompts, self.spec.seed, stage.data.shuffle),
            prompts=prompts,
            heads=heads,
            stop_ids=stop_token_ids(student),
            threads=threads,
            step_done=first_step,
        )
        run.held_out = self._held_out(run, held_out, renderer, teachers)
        if opening.replay:
            await self.progress.show(f"replaying {len(opening.replay)} steps")
            await self.interrupt.race(run.replay())
        await self._tell_rewound(run.step_done)
        return run

    async def _load_prompts(
        self, renderer: Renderer, student: ModelEntry, teachers: dict[str, ModelEntry]
    ) -> tuple[list[Prompt], list[Prompt]]:
        """Training and held-out prompts, rendered and checked against the models' lengths."""
        stage, evaluation = self.spec.stages[0], self.spec.evaluation
        for name, entry in teachers.items():
            if entry.tokenizer_sha256 != student.tokenizer_sha256:
                raise PreflightError(
                    f"teacher '{name}' ({entry.name}) and student ({student.name}) have different tokenizers; "
                    "their tokens cannot be compared"
                )
        limits = {"student": student.max_sequence_length}
        limits.update({name: entry.max_sequence_length for name, entry in teachers.items()})

        def load(data: DataSpec, max_tokens: int) -> list[Prompt]:
            path = self._ctx.artifacts.file(data.file) if data.file else None
            prompts = prepare(load_rows(data, path), self.spec.teachers, renderer)
            if not prompts:
                raise PreflightError("no prompts: the data has no rows")
            check_lengths(prompts, max_tokens, limits)
            return prompts

        prompts = await asyncio.to_thread(load, stage.data, stage.sampling.max_tokens)
        held_out: list[Prompt] = []
        if evaluation.data is not None:
            held_out = await asyncio.to_thread(load, evaluation.data, evaluation.max_tokens)
        return prompts, held_out

    async def _open_exchange(self, teachers: dict[str, ModelEntry]) -> Exchange:
        ctx = self._ctx
        self._exchange = Exchange(
            self.scope,
            queue=ctx.queue,
            redis=ctx.redis,
            registry=ctx.registry,
            peers=ctx.peers,
            consumer=ctx.instance,
            tasks={
                name: make_task(self.scope, name, spec, teachers[name]) for name, spec in self.spec.teachers.items()
            },
            log=self._log,
        )
        await self._exchange.open()
        return self._exchange

    async def _load_teachers(
        self, teachers: dict[str, ModelEntry], held_out: Sequence[Prompt]
    ) -> dict[str, TeacherHead]:
        """Every teacher loaded somewhere; the heads of those whose hidden states come to the learner."""
        needs_heads = isinstance(self.spec.stages[0].loss, FullVocabularyLoss) or bool(held_out)
        heads: dict[str, TeacherHead] = {}
        for name, spec in self.spec.teachers.items():
            task = make_task(self.scope, name, spec, teachers[name])
            if needs_heads:
                heads[name] = await fetch_head(self._ctx.registry, self._ctx.peers, task)
            else:
                await ensure_loaded(self._ctx.registry, self._ctx.peers, task)
        return heads

    def _held_out(
        self, run: Run, prompts: Sequence[Prompt], renderer: Renderer, teachers: dict[str, ModelEntry]
    ) -> HeldOut | None:
        if not prompts:
            return None
        return HeldOut(
            self.spec.evaluation,
            prompts,
            plan=run.plan,
            done=run.exchange.done,
            race=self.interrupt.race,
            learner=self._learner,
            heads=run.heads,
            teacher_models={name: entry.name for name, entry in teachers.items()},
            samplers=self._samplers,
            renderer=renderer,
            stop_ids=run.stop_ids,
            artifacts=self.artifacts,
        )

    async def _restore(self, opening: Opening) -> int:
        """Bring the learner to the state the epoch opens from; returns its step."""
        if opening.base is None:
            return 0
        manifest = await asyncio.to_thread(manifests.verify, self.artifacts, opening.base)
        await self._learner.restore(opening.base.folder(self.artifacts))
        self.progress.restore(manifest["usage"])
        return int(manifest["step"])

    async def _tell_rewound(self, step: int) -> None:
        if self.scope.epoch > 1:
            await self._ctx.jobs.event(
                self.scope.job_id,
                "job.rewound",
                f"taken over by {self._ctx.instance}: continues at step {step}",
                level="warning",
                **{"from": self._record.step, "to": step, "epoch": self.scope.epoch},
            )

    # -- running -----------------------------------------------------------------------------------------------------

    async def _train(self, run: Run) -> None:
        await run.publish(run.step_done)
        await self.progress.show("waiting for samplers")
        await self.interrupt.race(self._samplers.wait_for_min())
        await self._set_status("running", started_at=self._record.started_at or time.time())
        schedule = self.spec.stages[0].schedule
        pace = Pace(self.spec.stop_step(), schedule.prompts_per_step, schedule.max_staleness)
        together = Collaborators(run, run, run, run, run, run)
        self.progress.phase = "training"
        self.progress.start_clock()
        await run_opd(pace, run.step_done, together, self.interrupt)
        await run.commit()

    async def _finish(self, run: Run) -> _End:
        """Export the student, then say so: `succeeded` means that all steps are committed."""
        if run.step_done != self.spec.stop_step():
            raise JobFailedError(f"ended at step {run.step_done} of {self.spec.stop_step()}")
        await self.progress.show("exporting")
        result = self._result(run)
        student = self._ctx.models.get(self.spec.student.model)
        await run.export(Path(student.path), self._card(result))
        return _End("succeeded", result=result)

    def _result(self, run: Run) -> dict[str, Any]:
        result: dict[str, Any] = {"steps": run.step_done, "export": "ckpt_export", "usage": self.progress.usage}
        if run.held_out is not None:
            before, after = run.held_out.read(0), run.held_out.read(self.spec.stop_step())
            result["evaluation"] = {
                name: {"before": before[name], "after": after[name]}
                for name in ("reverse_kl", "teacher_nll_greedy", "repeated_4grams")
            }
        return result

    def _card(self, result: dict[str, Any]) -> dict[str, Any]:
        """What the model card of the export says."""
        data = self.spec.stages[0].data
        card: dict[str, Any] = {
            "student": self.spec.student.model,
            "teachers": {name: teacher.model for name, teacher in self.spec.teachers.items()},
            "objective": self.spec.stages[0].loss.model_dump(),
            "steps": result["steps"],
            "data_sha256": sha256_file(self._ctx.artifacts.file(data.file))
            if data.file
            else manifests.spec_sha256(data.model_dump(mode="json")),
            "job_id": self.scope.job_id,
            "spec_sha256": manifests.spec_sha256(self.spec.model_dump(mode="json")),
        }
        if "evaluation" in result:
            kl = result["evaluation"]["reverse_kl"]
            card.update(heldout_reverse_kl_before=kl["before"], heldout_reverse_kl_after=kl["after"])
        return card

    # -- ends --------------------------------------------------------------------------------------------------------

    async def _stopped(self, reason: str) -> _End:
        """A clean stop between steps: what is trained is committed; a cancelled job ends, else it is handed on."""
        if self.run_ is not None:
            await self.run_.commit()
        return _End("cancelled") if reason == "cancelled" else _End(HANDED_ON)

    async def _write_end(self, end: _End) -> None:
        """Write how the claim ended, once. A write that fails leaves the job to the next claim."""
        try:
            if self._exchange is not None:
                await self._exchange.close()
            await (self._hand_on() if end.status == HANDED_ON else self._write_final(end))
        except (LeaseLostError, ConflictError) as lost:
            self._log.warning("the job went on without this trainer before its end was written", reason=lost.message)
        except (RedisError, OSError) as error:
            self._log.error(
                "the end of the job is not written; another claim will", status=end.status, error=str(error)
            )

    async def _hand_on(self) -> None:
        await self._ctx.jobs.event(
            self.scope.job_id, "job.handed_on", f"{self._ctx.instance} drains; another trainer may take over"
        )
        await self._ctx.jobs.update(
            self.scope, release=True, status_reason="draining", status_message="waits for another trainer"
        )

    async def _write_final(self, end: _End) -> None:
        fields: dict[str, Any] = {"status_reason": "", "status_message": "", "finished_at": round(time.time(), 3)}
        if end.error is not None:
            fields.update(status_reason=end.error["code"], status_message=end.error["message"], error=end.error)
        if end.result is not None:
            fields["result"] = end.result
        await self._ctx.jobs.update(self.scope, allowed=LEADABLE, release=True, status=end.status, **fields)
        # after the fenced update, so that a zombie never ends a job that goes on
        record = await self._ctx.jobs.get(self.scope.job_id)
        await asyncio.to_thread(write_json, self.artifacts.root / "final.json", final_document(record))
        level = "warning" if end.status == "failed" else "info"
        message = f"job {end.status}" + (f": {end.error['message']}" if end.error else "")
        await self._ctx.jobs.event(self.scope.job_id, "job.status", message, level=level, status=end.status)
        self._log.info("job ended", status=end.status, error=end.error)

    async def _set_status(self, status: str, **fields: Any) -> None:
        self.status = status
        try:
            await self._ctx.jobs.update(
                self.scope,
                allowed=("queued", "validating", "starting", "running", "stalled"),
                status=status,
                status_reason="",
                status_message="",
                stop_step=self.spec.stop_step(),
                **fields,
            )
        except ConflictError:  # the user cancelled meanwhile
            raise Interrupted("cancelled") from None
        await self._ctx.jobs.event(
            self.scope.job_id, "job.status", f"job {status}", status=status, epoch=self.scope.epoch
        )

    def _on_corrupt(self, message: str) -> None:
        self._log.error("checkpoint does not verify; falling back to an older one", error=message)


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
