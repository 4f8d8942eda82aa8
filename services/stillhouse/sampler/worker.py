"""The sampler's worker: serves whoever leased this sampler, one shift after the other."""

from __future__ import annotations

import asyncio
from typing import Final

from stillhouse.core import tracing
from stillhouse.core.errors import AuthError, StillhouseError
from stillhouse.core.failpoints import failpoint
from stillhouse.core.metrics import POLICY_VERSION
from stillhouse.core.queue.claims import QUEUE_ERRORS, Claims
from stillhouse.core.queue.streams import Scope
from stillhouse.core.service import Context
from stillhouse.core.tasks import cancel_all
from stillhouse.core.worker import pause, run_turns
from stillhouse.sampler.generation import Generator
from stillhouse.sampler.shift import Shift
from stillhouse.sampler.student import Student

IDLE_S: Final = 0.2
"""Pause between looks for an assignment: a new job waits for it once."""
WATCH_S: Final = 0.5
"""How often a shift checks that it is still wanted."""
RETRY_S: Final = 2.0
"""Pause after a model or weights could not be had."""


class SamplerWorker:
    """Serves the job that leased this sampler.

    consumes:     PromptGroup from the stream `prompts` of the job's epoch
    waits for:    an assignment (polled), a group (blocking read), weights that are new enough (at most PULL_WAIT_S)
    produces:     a Rollout per sample on `rollouts:<teacher>`; a Score on `scored` if it failed or no teacher is asked
    unblocked by: a trainer's lease, its plan and its FetchWeights; `Context.stop`, which hands claims back
    """

    def __init__(self, ctx: Context, student: Student, generator: Generator) -> None:
        self._ctx = ctx
        self._student = student
        self._generator = generator
        self._highest_epoch: dict[str, int] = {}
        self._closed: Scope | None = None
        self.wake = asyncio.Event()
        """Set when something changed that an idle worker should look at."""
        self.scope: Scope | None = None
        """The claim of the job served now."""
        self._shift: Shift | None = None
        self._doing = "idle"
        self._is_paused = False
        self._is_unknown = False
        """The trainer has just refused our credential."""

    @property
    def is_paused(self) -> bool:
        """No group is started until it is resumed."""
        return self._is_paused

    @is_paused.setter
    def is_paused(self, is_paused: bool) -> None:
        self._is_paused = is_paused
        if self._shift is not None:
            self._shift.is_paused = is_paused
        self.wake.set()

    @property
    def activity(self) -> str:
        """For the heartbeat."""
        return self._doing if self._shift is None else self._shift.activity

    async def run(self) -> None:
        """Work until `Context.stop`."""
        await run_turns(self._turn, self._ctx.stop, self._ctx.log)

    async def _turn(self) -> None:
        scope = await self._assignment()
        if scope is None or scope == self._closed or self.is_paused:
            self.scope = None if scope is None else self.scope
            self._ctx.problem = "" if scope is None else self._ctx.problem
            self._doing = "paused" if self.is_paused else "idle"
            await self._idle()
            return
        try:
            if scope != self.scope:
                await self._adopt(scope)
            if not self._is_unknown:  # it would only be said again
                self._ctx.problem = ""
            await self._serve(scope)
            self._is_unknown = False
        except StillhouseError as error:
            self._doing, self._is_unknown = "idle", isinstance(error, AuthError)
            self._ctx.problem = "" if self.scope and not self._is_unknown else error.message
            self._ctx.log.warning("cannot sample", job_id=scope.job_id, epoch=scope.epoch, error=error.message)
            await pause(self._ctx.stop, RETRY_S)

    async def _serve(self, scope: Scope) -> None:
        """Work for a job until the process stops or the job is no longer ours."""
        record = await self._ctx.jobs.get(scope.job_id)
        with tracing.within(record.traceparent, job_id=scope.job_id, epoch=scope.epoch):
            await self._work(scope)

    async def _work(self, scope: Scope) -> None:
        settings = self._ctx.settings
        log = self._ctx.log.bind(job_id=scope.job_id, epoch=scope.epoch)
        async with Claims(self._ctx.queue, self._ctx.instance, settings.lease_s, log) as claims:
            shift = self._shift = Shift(self._ctx, self._student, self._generator, scope, claims)
            watch = asyncio.create_task(self._watch(scope, shift), name="watch assignment")
            if (version := self._student.version(scope)) is not None:  # of an earlier shift
                POLICY_VERSION.labels("sampler", scope.job_id).set(version)
            try:
                await shift.run()
            finally:
                self._shift, self._doing = None, "idle"
                POLICY_VERSION.remove_by_labels({"role": "sampler"})
                await cancel_all([watch])
                if shift.is_closed:
                    self._closed = scope

    async def _watch(self, scope: Scope, shift: Shift) -> None:
        """Halt the shift when the process stops or the job is no longer ours."""
        try:
            while not await pause(self._ctx.stop, WATCH_S):
                try:
                    if await self._assignment() != scope:
                        break
                except QUEUE_ERRORS:
                    continue  # the hand-over will notice if it lasts
            if self._ctx.stop.is_set():
                failpoint("sampler.draining")
        finally:
            shift.halt()

    async def _assignment(self) -> Scope | None:
        """The claim that leased this sampler; one older than what it has seen of the job counts as none."""
        scope = await self._ctx.registry.assignment(self._ctx.instance)
        if scope is None or scope.epoch < self._highest_epoch.get(scope.job_id, 0):
            return None
        self._highest_epoch[scope.job_id] = scope.epoch
        return scope

    async def _adopt(self, scope: Scope) -> None:
        """Have the job's student in memory; until then no job is served."""
        self.scope, self._doing = None, "loading"
        record = await self._ctx.jobs.get(scope.job_id)
        student = record.spec["student"]
        await self._student.load_model(student["model"], student.get("dtype", "float32"))
        self._student.hint = None  # of the job before, whose versions say nothing about this one
        self.scope = scope
        self._ctx.log.info("serving", job_id=scope.job_id, epoch=scope.epoch, model=student["model"])

    async def _idle(self) -> None:
        if not self._ctx.stop.is_set():
            await pause(self.wake, IDLE_S)
            self.wake.clear()
