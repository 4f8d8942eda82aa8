"""When held-out prompts are measured, and what follows from it: the best checkpoint, an early end of the job.

    due -> its step is committed -> under way -> written -> best checkpoint named, early end recorded

While an evaluation of step v is under way training goes on: its weights stay on the shelf for samplers, its groups are
written by version v and no other, and the learner keeps a copy of the weights for the exact KL, which takes it from
training for a forward pass at a time. One evaluation is under way at most; the next one that is due waits for it.

Until it is written no checkpoint after v is committed, so whoever takes the job over begins at v or before and measures
it again. In a deterministic job, and after the last step, nothing else goes on meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stillhouse.core.blobs import JobArtifacts, read_jsonl, sealed, write_json
from stillhouse.core.evaluations import best_of, read_evaluations, read_stop, stopping
from stillhouse.core.failpoints import failpoint
from stillhouse.core.queue.jobs import JobStore
from stillhouse.core.queue.streams import Scope
from stillhouse.core.spec import JobSpec
from stillhouse.core.tasks import cancel_all
from stillhouse.trainer.evaluate import HeldOut
from stillhouse.trainer.manifests import ManifestRef, lineage, list_manifests
from stillhouse.trainer.measures import held_out_metrics, sentence, told
from stillhouse.trainer.progress import Progress
from stillhouse.trainer.publish import Publisher
from stillhouse.trainer.space import Space
from stillhouse.trainer.train import LearnerThread


@dataclass
class Evaluations:
    """Those of one claim of a job."""

    held_out: HeldOut
    scope: Scope
    spec: JobSpec
    jobs: JobStore
    artifacts: JobArtifacts
    space: Space
    publisher: Publisher
    learner: LearnerThread
    progress: Progress
    """Says after how many steps the job ends."""
    step_done: Callable[[], int]
    """Optimizer steps in the learner."""
    _task: asyncio.Task[None] | None = None
    _is_news: bool = field(default=True)
    """Evaluations were written, perhaps by an earlier claim, that nothing has followed from yet."""

    @property
    def is_under_way(self) -> bool:
        """One has begun and is not written, also if it was given up: nothing later may be committed."""
        return self._task is not None and not _is_written(self._task)

    def is_due(self, step: int) -> bool:
        """The weights of `step` steps are still to be measured."""
        return self.held_out.is_due(step, self.progress.stop_step)

    async def begin(self, step: int) -> None:
        """Begin to measure the weights that the learner has and the shelf holds as version `step`."""
        await self.finish()
        is_beside = not self.spec.deterministic and step < self.progress.stop_step
        if is_beside:
            self.publisher.pin(step)
            await self.learner.hold(True)
        self._task = asyncio.create_task(self._measure(step, is_beside), name=f"evaluate step {step}")
        if not is_beside:
            with self.progress.timed("evaluate"):
                await self.progress.show("evaluating")
                await self.finish()
            await self.progress.show("training")

    async def finish(self) -> None:
        """Wait for the evaluation that is under way.

        Raises:
            Whatever ended it.
        """
        if self._task is not None:
            await self._task
            self._task = None  # what failed stays: it is not written

    async def cancel(self) -> None:
        """Give up what is under way: another claim measures it again."""
        await cancel_all([self._task] if self._task is not None else [])

    async def _measure(self, step: int, is_beside: bool) -> None:
        is_averaged = step == self.progress.stop_step and self.spec.stages[-1].optimizer.ema_decay is not None
        try:
            result = await self.held_out.evaluate(
                step, is_averaged=is_averaged, facts=lambda: {"steps_meanwhile": self.step_done() - step}
            )
        finally:
            self.publisher.unpin(step)
        if is_beside:
            await self.learner.hold(False)
        failpoint("trainer.evaluated")
        self._is_news = True
        self.progress.on_metrics(step, held_out_metrics(result))
        await self.jobs.event(self.scope.job_id, "evaluation", sentence(result), **told(result))

    # -- what follows ------------------------------------------------------------------------------------------------

    async def conclude(self, step: int) -> None:
        """Name the best checkpoint, and end the job after the step that is next if evaluations say so; `step` is it.

        Raises:
            Whatever ended the evaluation that was under way.
        """
        if self._task is not None and self._task.done():
            await self.finish()
        if not self._is_news:
            return
        self._is_news = False
        await self._name_best()
        await self._end_early(step)

    async def _name_best(self) -> None:
        evaluations = await asyncio.to_thread(read_evaluations, self.artifacts)
        refs = {ref.step: ref for ref in await asyncio.to_thread(_committed, self.artifacts)}
        best = best_of(self.spec, evaluations, refs.keys())
        if best is None:
            return
        checkpoint = f"ckpt_{refs[best.step].epoch}-{refs[best.step].name}"
        document = {"checkpoint": checkpoint, "step": best.step, "metric": best.metric, "mode": best.mode}
        document |= {"value": best.value}
        await self.jobs.update(self.scope, best_checkpoint=checkpoint)
        await self._write("the name of the best checkpoint", self.artifacts.best_checkpoint, document)

    async def _end_early(self, step: int) -> None:
        """Record the end before anything follows from it. It is one step ahead: that step is the job's last."""
        stop = await asyncio.to_thread(read_stop, self.artifacts)
        if stop is None and step + 1 < self.progress.stop_step:
            found = stopping(self.spec, evaluations := await asyncio.to_thread(read_evaluations, self.artifacts))
            if found is None:
                return
            metric, values = found
            early = self.spec.evaluation.early_stop
            stop = {"stop_step": step + 1, "step": evaluations[-1]["step"], "reason": early.when if early else ""}
            stop |= {"metric": metric, "values": values}
            await self.jobs.update(self.scope, stop_step=step + 1)  # fenced: a zombie ends no job
            await self._write("the early end", self.artifacts.stop, stop)
            failpoint("trainer.stop_recorded")
            self.progress.stop_step = step + 1
            await self.learner.end_at(step + 1)
        if stop is not None:
            await self._tell_end(stop)

    async def _tell_end(self, stop: dict[str, Any]) -> None:
        """Once: a claim may have recorded the end and died before it told."""
        told = await asyncio.to_thread(read_jsonl, self.artifacts.events)
        if any(event.get("type") == "job.early_stop" for event in told):
            return
        last = ", ".join(f"{value:.4g}" for value in stop["values"][-5:])
        message = (
            f"{stop['reason']} of {stop['metric']} (last values {last}): the job ends after {stop['stop_step']} of "
            f"{self.spec.stop_step()} steps"
        )
        facts = {name: stop[name] for name in ("stop_step", "step", "reason", "metric")}
        await self.jobs.event(self.scope.job_id, "job.early_stop", message, **facts)

    async def _write(self, what: str, path: Path, document: dict[str, Any]) -> None:
        await self.space.insist(what, lambda: asyncio.to_thread(write_json, path, sealed(document)))


def _is_written(task: asyncio.Task[None]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is None


def _committed(artifacts: JobArtifacts) -> list[ManifestRef]:
    """Checkpoints behind the weights of the job that are there."""
    past = lineage(artifacts)
    there = set(list_manifests(artifacts))
    return [ref for ref in past.manifests if ref in there] if past is not None else []
