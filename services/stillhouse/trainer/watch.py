"""Beside the loop: the lease is renewed, users' wishes are passed on, and the record says what the job waits for.

A job whose trainer is well but cannot go on is `stalled`, with a reason, and goes back by itself:

    no_sampler       no sampler serves it; a frozen one leaves the registry within 8 s
    no_teacher       no teacher is there
    no_student       its samplers cannot load the student, and say why
    sampler_silent   the samplers that work for it, or the teachers, say that their
    teacher_silent     computation makes no progress
    no_weights       its samplers wait for weights of which nothing arrives
    no_progress      no score arrives although groups are in flight, and no service works
    no_space         the disk of the artifacts is full
    queue_full       the queue server has no memory for more work

A slow machine is no reason: as long as a service beats, token by token or batch by batch, it works.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final

from redis.exceptions import RedisError

from stillhouse.core.errors import ConflictError
from stillhouse.core.queue.jobs import JobRecord
from stillhouse.core.queue.registry import ServiceInfo
from stillhouse.core.queue.streams import Scope
from stillhouse.core.service import Context
from stillhouse.trainer.loop import Interrupt
from stillhouse.trainer.samplers import SamplerPool

ASK_S: Final = 3.0
"""Time without a score after which the queue server is asked whether it has room."""
QUIET_S: Final = 10.0
"""Time without a score, and without a service that works on one, after which a job makes no progress."""
SILENT_S: Final = 60.0
"""Time without a token or batch after which a computation counts as silent: twice a slow forward pass on a CPU."""
NO_PROGRESS_S: Final = 120.0
"""Time without a score after which services that only load or pull count for nothing."""
SEE_SERVICES: Final = "`stillhouse services` shows what runs, and the job goes on by itself when one is there"
COMPUTING: Final = ("sampling", "scoring")
PREPARING: Final = ("loading", "pulling")
"""What services say that they do, while they work for a job."""


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
        min_samplers: Callable[[], int],
        status: Callable[[], str],
        idle_s: Callable[[], float],
        needs_teachers: Callable[[], bool],
        trouble: Callable[[], tuple[str, str] | None] = lambda: None,
    ) -> None:
        self._ctx = ctx
        self._scope = scope
        self._interrupt = interrupt
        self._samplers = samplers
        self._min_samplers = min_samplers
        self._status = status
        self._idle_s = idle_s
        self._trouble = trouble
        """(reason, message) of what the trainer itself waits for."""
        self._needs_teachers = needs_teachers

    async def run(self) -> None:
        """Keep the lease; pass on a user's wish to cancel or pause and the process's wish to stop; until cancelled.

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
                elif record.status == "pausing":
                    self._interrupt.set("paused")
                elif self._status() in ("starting", "running") or self._trouble() is not None:
                    with suppress(ConflictError):  # it ended or was cancelled just now
                        await self._tell(record)
            except (RedisError, OSError) as error:
                self._ctx.log.warning("cannot renew the lease", job_id=self._scope.job_id, error=str(error))
            await asyncio.sleep(min(1.0, lease_s / 3))

    async def _tell(self, record: JobRecord) -> None:
        """Say in the record what the job waits for, and take it back when it goes on."""
        services = await self._ctx.registry.services()
        reason, message = await self._queue_full() or self._missing(services) or ("", "")
        status = "stalled" if reason else self._status()
        if (record.status, record.status_reason) == (status, reason) or status == "validating":
            return  # a claim says by itself when it begins
        await self._ctx.jobs.update(
            self._scope, allowed=(record.status,), status=status, status_reason=reason, status_message=message
        )
        level = "warning" if reason else "info"
        data = {"status": status, "reason": reason, "epoch": self._scope.epoch}
        await self._ctx.jobs.event(
            self._scope.job_id, "job.status", message or f"job {status} again", level=level, **data
        )

    async def _queue_full(self) -> tuple[str, str] | None:
        """Samplers and teachers cannot hand over, and the trainer only sees that nothing comes."""
        if self._idle_s() < ASK_S:
            return None
        memory: Any = await self._ctx.redis.info("memory")
        used, limit = int(memory["used_memory"]), int(memory["maxmemory"])
        if limit == 0 or used < limit:
            return None
        return "queue_full", (
            f"the queue server uses {used} bytes, its maxmemory is {limit}: raise it, or finish or cancel other jobs; "
            "the job goes on by itself"
        )

    def _missing(self, services: Sequence[ServiceInfo]) -> tuple[str, str] | None:
        """(reason, message) of what keeps the job from going on; None if nothing does."""
        trouble = self._trouble()
        if trouble is not None or self._status() == "validating":
            return trouble
        samplers = [info for info in services if info.role == "sampler"]
        teachers = [info for info in services if info.role == "teacher"]
        if self._samplers.size < self._min_samplers() and not samplers:
            return "no_sampler", f"no sampler service answers; {SEE_SERVICES}"
        if self._samplers.size == 0 and self._samplers.has_started:
            return "no_sampler", f"the job has lost its samplers, and the {len(samplers)} there are serve other jobs"
        if self._needs_teachers() and not teachers:
            return "no_teacher", f"no teacher service answers; {SEE_SERVICES}"
        ours = [info for info in samplers if self._is_ours(info)]
        return self._no_student(ours) or self._standstill([*ours, *teachers])

    def _is_ours(self, sampler: ServiceInfo) -> bool:
        """One that loads the student serves no job yet."""
        return sampler.job_id == self._scope.job_id or (not sampler.job_id and self._samplers.has(sampler.instance))

    def _no_student(self, samplers: Sequence[ServiceInfo]) -> tuple[str, str] | None:
        """Why none of the samplers can begin. They try again by themselves."""
        problems = [
            f"sampler '{info.instance}': {problem}" for info in samplers if (problem := info.extra.get("problem"))
        ]
        if self._idle_s() > QUIET_S and problems and len(problems) == len(samplers):
            return "no_student", problems[0]
        return None

    def _standstill(self, services: Sequence[ServiceInfo]) -> tuple[str, str] | None:
        """Why no score arrives although groups are in flight. A teacher may be busy for another job: it works."""
        idle_s = self._idle_s()
        computing = [info for info in services if info.state in COMPUTING]
        silent = [info for info in computing if _silent_s(info) > SILENT_S]
        if idle_s > SILENT_S and computing and len(silent) == len(computing):
            info = silent[0]
            return f"{info.role}_silent", (
                f"{info.role} '{info.instance}' has made no progress for {_silent_s(info):.0f} s; it is started again "
                f"after hang_s {self._ctx.settings.hang_s:g} s"
            )
        preparing = [info for info in services if info.state in PREPARING]
        cut_off = [info for info in preparing if _silent_s(info, "transfer_silent_s") > QUIET_S]
        if idle_s > QUIET_S and cut_off and not computing and len(cut_off) == len(preparing):
            info = cut_off[0]
            return "no_weights", (
                f"{info.role} '{info.instance}' fetches the weights from {self._ctx.instance}, of which nothing has "
                f"arrived for {_silent_s(info, 'transfer_silent_s'):.0f} s; see the network between them"
            )
        limit_s = NO_PROGRESS_S if preparing else QUIET_S
        if idle_s > limit_s and not computing:
            return "no_progress", (
                f"no score for more than {limit_s:g} s although groups are in flight, and no service works on one; "
                "see the services' logs"
            )
        return None


def _silent_s(info: ServiceInfo, name: str = "silent_s") -> float:
    return float(info.extra.get(name) or 0.0)
