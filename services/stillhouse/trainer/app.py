"""The trainer process: claims one job after another and leads it."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from pydantic import ValidationError
from redis.exceptions import RedisError

from stillhouse.core.errors import ConfigError, NotFoundError, UnavailableError
from stillhouse.core.launch import Launch
from stillhouse.core.queue.streams import Scope
from stillhouse.core.queue.turns import in_turn
from stillhouse.core.rpc import Server
from stillhouse.core.service import Context
from stillhouse.core.worker import pause
from stillhouse.trainer.lead import Lead
from stillhouse.trainer.service import TrainerServicer
from stillhouse.trainer.train import LearnerThread
from stillhouse.v1 import trainer_pb2_grpc

if TYPE_CHECKING:
    from stillhouse.trainer.ranks import Ranks

POLL_S: Final = 0.5
"""Time between looks for a job: a submitted job starts within it."""


class TrainerApp:
    """`App` of the trainer."""

    def __init__(
        self, ctx: Context, make_learner: Callable[[], LearnerThread] = LearnerThread, ranks: Ranks | None = None
    ) -> None:
        self._ctx = ctx
        self._make_learner = make_learner
        self._ranks = ranks
        self._lead: Lead | None = None
        ctx.loaded = lambda: [lead.spec.student.model] if (lead := self._lead) and lead.run_ is not None else []

    def register(self, server: Server) -> None:
        servicer = TrainerServicer(self._ctx.instance, lambda: self._lead)
        server.add(trainer_pb2_grpc.add_TrainerServiceServicer_to_server, servicer, "stillhouse.v1.TrainerService")

    def state(self) -> tuple[str, str]:
        if self._lead is None:
            return "idle", ""
        return self._lead.progress.phase, self._lead.scope.job_id

    async def run(self) -> None:
        """Lead jobs until the process is asked to stop.

        consumes:     jobs that are not finished and whose lease is free
        waits for:    such a job, looking every `POLL_S`
        produces:     finished jobs
        unblocked by: a submitted job, an expired lease, or SIGTERM

        Raises:
            UnavailableError: another rank of this trainer has died.
        """
        while not self._ctx.stop.is_set():
            try:
                lead = await self._claim()
            except (RedisError, OSError) as error:
                self._ctx.log.warning("queue server does not answer", error=str(error))
                lead = None
            if lead is None:
                await pause(self._ctx.stop, POLL_S)
                continue
            self._lead = lead
            try:
                await lead.lead()
            finally:
                self._lead = lead = None
                gc.collect()  # student, published weights and heads hang in reference cycles
            if self._ranks is not None and self._ranks.is_broken:
                raise UnavailableError("the ranks of this trainer are out of step; all end, to be started again")
        if self._ranks is not None:
            await asyncio.to_thread(self._ranks.release)

    async def _claim(self) -> Lead | None:
        """The job whose turn it is, of those that nobody leads."""
        jobs = self._ctx.jobs
        for job_id in in_turn(await jobs.active()):
            try:
                record = await jobs.get(job_id)
            except NotFoundError:
                continue
            artifact_epoch = await asyncio.to_thread(self._ctx.artifacts.job(job_id).highest_epoch)
            epoch = await jobs.claim(job_id, self._ctx.instance, self._ctx.settings.lease_s, artifact_epoch)
            if epoch:
                self._ctx.log.info("job claimed", job_id=job_id, epoch=epoch)
                try:
                    return Lead(self._ctx, record, Scope(job_id, epoch), self._make_learner)
                except ValidationError as error:  # written by another version
                    await self._refuse(Scope(job_id, epoch), str(error))
        return None

    async def _refuse(self, scope: Scope, message: str) -> None:
        error = {"code": "invalid_request", "message": f"this version cannot read the job: {message}", "param": "spec"}
        await self._ctx.jobs.update(
            scope, release=True, status="failed", status_reason="invalid_request", error=error, finished_at=time.time()
        )
        await self._ctx.jobs.event(scope.job_id, "job.status", "job failed", level="warning", status="failed")


def build(ctx: Context) -> TrainerApp:
    """Wire the trainer; as one of several ranks, once all of them are there."""
    ranks = _join(ctx, Launch.read().size)
    return TrainerApp(ctx, lambda: LearnerThread(ctx.pulse, ctx.settings.hang_s, ranks), ranks)


def _join(ctx: Context, size: int) -> Ranks | None:
    wanted = ctx.settings.trainer_ranks
    if size != wanted:
        raise ConfigError(
            f"the setting trainer_ranks is {wanted}, and this trainer runs as {size} processes; start it with "
            f"`torchrun --nproc-per-node {wanted} -m stillhouse.trainer`, or set STILLHOUSE_TRAINER_RANKS={size}",
            param="trainer_ranks",
        )
    if size == 1:
        return None
    from stillhouse.trainer.ranks import Ranks

    ctx.log.info("waiting for the other ranks", ranks=size)
    return Ranks.join()
