"""Teachers that follow a student: the moving average of its weights, pulled from the trainer that leads the job.

Life of the weights:  none -> pulled for a job -> replaced by newer ones -> gone with the model (evicted, process ended)
A rollout is judged by an average at least as new as the policy that wrote it, and by a newer one where a hint said that
there is one: pulling under the claim costs no accuracy, only time.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Any

from stillhouse.core.errors import StaleWeightsError, StillhouseError
from stillhouse.core.metrics import POLICY_VERSION
from stillhouse.core.pulls import Weights, fetch_weights, leader
from stillhouse.core.pulse import BULK
from stillhouse.core.queue.streams import Scope
from stillhouse.core.service import Context
from stillhouse.core.weights import order
from stillhouse.core.worker import ComputeThread
from stillhouse.teacher.pool import Resident
from stillhouse.v1 import rollout_pb2, weights_pb2


class Follower:
    """Brings newer averages into models that follow a student."""

    def __init__(self, ctx: Context, compute: ComputeThread) -> None:
        self._ctx = ctx
        self._compute = compute
        self._hints: dict[str, weights_pb2.WeightsRef] = {}
        """Newest average heard of, by job."""
        self._served: set[str] = set()
        """Jobs with a policy version on /metrics."""

    def hint(self, job_id: str, ref: weights_pb2.WeightsRef) -> None:
        """There is a newer average."""
        known = self._hints.get(job_id)
        if known is None or order(known) < order(ref):
            self._hints[job_id] = ref

    def forget_others(self, job_ids: Collection[str]) -> None:
        """Drop the hints and metrics of all jobs but these."""
        for job_id in self._served.difference(job_ids):
            POLICY_VERSION.remove_by_labels({"role": "teacher", "job_id": job_id})
        self._served.intersection_update(job_ids)
        self._hints = {job_id: ref for job_id, ref in self._hints.items() if job_id in job_ids}

    async def follow(self, resident: Resident, task: rollout_pb2.TeacherTask, at_least: int) -> None:
        """Have an average in the model that is as new as policy version `at_least` of the task's epoch, and as every
        hint. Nobody else may use the model meanwhile.

        Raises:
            StaleWeightsError: the trainer has only older ones.
            StillhouseError: they are needed and cannot be had.
        """
        version = _version(resident, task)
        hint = self._hints.get(task.job_id)
        hinted = hint.policy_version if hint is not None and hint.epoch == task.epoch else 0
        if version is not None and version >= max(at_least, hinted):
            return
        try:
            await self._pull(resident, task)
        except StillhouseError as error:
            if version is None or version < at_least or resident.weights is None:
                raise
            self._ctx.log.warning("newer average not pulled", job_id=task.job_id, error=error.message)
        version = _version(resident, task)
        if version is None or version < at_least:
            raise StaleWeightsError(
                f"job {task.job_id}: a rollout of policy version {at_least} needs the average of that version or a "
                f"newer one; the trainer has {version}"
            )

    async def _pull(self, resident: Resident, task: rollout_pb2.TeacherTask) -> None:
        started = time.monotonic()
        scope = Scope(task.job_id, task.epoch)
        trainer = await leader(self._ctx, task.job_id)
        have = resident.weights.sha256 if resident.weights is not None else ""
        transfer = self._ctx.transfer
        with transfer.work():
            weights = await fetch_weights(trainer, scope, have_sha256=have, on_part=transfer.beat, average=True)
        if weights.arrays:
            resident.weights = None  # unnamed while they are being replaced
            await self._compute.run(_load_into, resident.engine, weights, patience=BULK)
        resident.weights = weights.ref
        POLICY_VERSION.labels("teacher", task.job_id).set(weights.ref.policy_version)
        self._served.add(task.job_id)
        self._ctx.log.info(
            "average pulled",
            job_id=task.job_id,
            epoch=weights.ref.epoch,
            policy_version=weights.ref.policy_version,
            seconds=round(time.monotonic() - started, 3),
        )


def at_least(rollouts: Collection[rollout_pb2.Rollout], epoch: int) -> int:
    """Newest policy version of an epoch that wrote tokens of the rollouts."""
    versions = [span.policy_version for rollout in rollouts for span in rollout.spans if span.epoch == epoch]
    return max(versions, default=0)


def _version(resident: Resident, task: rollout_pb2.TeacherTask) -> int | None:
    """Policy version of the average in the model, if it is of the task's claim."""
    weights = resident.weights
    return weights.policy_version if weights is not None and weights.epoch == task.epoch else None


def _load_into(engine: Any, weights: Weights) -> None:
    engine.load_weights(weights.arrays, weights.dtypes)
