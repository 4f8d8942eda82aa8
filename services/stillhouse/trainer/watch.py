"""Beside the loop: the lease is renewed, users' wishes are passed on, and the record says what the job waits for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from redis.exceptions import RedisError

from stillhouse.core.errors import ConflictError
from stillhouse.core.queue.jobs import JobRecord
from stillhouse.core.queue.streams import Scope
from stillhouse.core.service import Context
from stillhouse.trainer.loop import Interrupt
from stillhouse.trainer.samplers import SamplerPool

NO_PROGRESS_S: Final = 120.0
"""Time without a score after which a job says that it makes no progress: longer than any completion on a CPU takes."""


class Watch:
    """Watches over one claim of a job.

    `status` gives the status that the job has when nothing is missing; `idle_s` the seconds without a score although
    groups are in flight.
    """

    def __init__(
        self,
        ctx: Context,
        scope: Scope,
        *,
        interrupt: Interrupt,
        samplers: SamplerPool,
        min_samplers: int,
        status: Callable[[], str],
        idle_s: Callable[[], float],
    ) -> None:
        self._ctx = ctx
        self._scope = scope
        self._interrupt = interrupt
        self._samplers = samplers
        self._min_samplers = min_samplers
        self._status = status
        self._idle_s = idle_s

    async def run(self) -> None:
        """Keep the lease; pass on a user's wish to cancel and the process's wish to stop; until cancelled.

        Raises:
            LeaseLostError: another trainer leads the job.
        """
        lease_s = self._ctx.settings.lease_s
        while True:
            if self._ctx.stop.is_set():
                self._interrupt.set("draining")
            try:
                await self._ctx.jobs.renew(self._scope, self._ctx.instance, lease_s)
                record = await self._ctx.jobs.get(self._scope.job_id)
                if record.status == "cancelling":
                    self._interrupt.set("cancelled")
                elif self._status() in ("starting", "running"):
                    with suppress(ConflictError):  # it ended or was cancelled just now
                        await self._tell_missing(record)
            except (RedisError, OSError) as error:
                self._ctx.log.warning("cannot renew the lease", job_id=self._scope.job_id, error=str(error))
            await asyncio.sleep(min(1.0, lease_s / 3))

    async def _tell_missing(self, record: JobRecord) -> None:
        """Say in the record which service the job waits for because none is there, and take it back when one is."""
        reason = message = ""
        if self._samplers.size < self._min_samplers and not await self._ctx.registry.services("sampler"):
            reason, message = "no_sampler", "no sampler service is running; `stillhouse ps` shows what runs"
        elif not await self._ctx.registry.services("teacher"):
            reason, message = "no_teacher", "no teacher service is running; `stillhouse ps` shows what runs"
        elif self._idle_s() > NO_PROGRESS_S:
            reason = "no_progress"
            message = f"no score for {NO_PROGRESS_S:g} s although groups are in flight; see the services' logs"
        if record.status_reason != reason or record.status == "stalled":
            await self._ctx.jobs.update(
                self._scope,
                allowed=("starting", "running", "stalled"),
                status=self._status(),
                status_reason=reason,
                status_message=message,
            )
            if reason:
                await self._ctx.jobs.event(self._scope.job_id, "warning", message, level="warning", reason=reason)
