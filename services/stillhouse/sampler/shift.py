"""A shift: what a sampler does under one claim of a job. Groups are taken whenever there is room, samples leave as they
end, weights are replaced while others run, and what is being written is kept beside its group about once a second.

Staleness is bounded here and nowhere else: a group is started only when the weights are at least its
`min_policy_version`, so late joiners, lost notifications and partitions do no harm.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, Final

from google.protobuf.message import DecodeError

from stillhouse.core.errors import TooLargeError, WireError
from stillhouse.core.failpoints import failpoint
from stillhouse.core.metrics import SAMPLED_ROLLOUTS, SAMPLER_DROPPED
from stillhouse.core.queue import keys
from stillhouse.core.queue.claims import QUEUE_ERRORS, Claims
from stillhouse.core.queue.client import BLOCK_MS
from stillhouse.core.queue.streams import Entry, Outcome, Scope
from stillhouse.core.rollouts import rollout_mark, sample_id, score_mark
from stillhouse.core.service import Context
from stillhouse.core.tasks import cancel_all
from stillhouse.core.worker import pause, unless
from stillhouse.sampler.engines.base import SampleRequest
from stillhouse.sampler.generation import Completion, Generator
from stillhouse.sampler.messages import (
    Source,
    content,
    destination,
    group_requests,
    make_failure,
    make_rollout,
)
from stillhouse.sampler.student import Student
from stillhouse.sampler.work import Work
from stillhouse.v1 import rollout_pb2 as pb

LOOK_S: Final = 0.1
"""How often a shift that has room, but more than its share of the groups, looks again, and follows hints."""
SHARE_S: Final = 0.5
"""How often the samplers of the job are counted."""
HALT_S: Final = 5.0
"""How long a shift that ends waits for hand-overs that are on their way."""


class Shift:
    """Takes groups and writes them until it is halted or something fails; `run` then keeps what is unfinished.

    The caller hands back the claims that are left.
    """

    def __init__(self, ctx: Context, student: Student, generator: Generator, scope: Scope, claims: Claims) -> None:
        self._ctx = ctx
        self._log = ctx.log.bind(job_id=scope.job_id, epoch=scope.epoch)
        self._student = student
        self._generator = generator
        self._scope = scope
        self._claims = claims
        self._stream = keys.prompts(scope.job_id, scope.epoch)
        self._works: dict[str, Work] = {}
        """Open groups by entry."""
        self._coming: Work | None = None
        """Claimed, and waits until the weights may become what it wants."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._error: BaseException | None = None
        self._changed = asyncio.Event()
        """Set when a sample has ended, or the shift is halted."""
        self._num_samplers = (1, -math.inf)
        """Samplers that serve the job, and when they were counted."""
        self.is_paused = False
        """Nothing more is taken."""
        self.is_closed = False
        """The epoch is closed: what is left is nobody's any more."""
        self.halted = asyncio.Event()
        """Set when it is to end."""

    @property
    def activity(self) -> str:
        """For the heartbeat."""
        if any(work.is_writing for work in self._works.values()):
            return "sampling"
        return "pulling" if self._works else "waiting"

    def halt(self) -> None:
        """Stop writing and taking groups."""
        self.halted.set()
        self._changed.set()
        for work in self._works.values():
            work.halted.set()

    async def run(self) -> None:
        """Work until halted.

        Raises:
            Whatever went wrong with a group; the others are kept as far as they are.
        """
        self._spawn(self._take_groups(), "take groups")
        self._spawn(self._follow_hints(), "follow hints")
        self._spawn(self._keep_parts(), "keep parts")
        try:
            await self.halted.wait()
            await self._wind_down()
        finally:
            await cancel_all(self._tasks)
            self._student.is_pinned = False
        if self._error is not None:
            raise self._error

    async def _wind_down(self) -> None:
        """Let what is on its way arrive; keep what is unfinished."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=HALT_S)
        await cancel_all(self._tasks)
        try:
            for work in list(self._works.values()):
                await self._keep(work)
        except QUEUE_ERRORS as error:
            self._log.warning("partial completions not kept", error=str(error))

    def _spawn(self, coro: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(coro, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._changed.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            self._error = self._error or error
            self.halt()

    # -- taking groups -----------------------------------------------------------------------------------------------

    async def _take_groups(self) -> None:
        while not self.halted.is_set():
            await self._take()

    async def _take(self) -> None:
        """Take a group and start it; or wait until there is room."""
        if self.is_paused or not await self._has_room():
            await self._wait_for_change()
            return
        started = time.monotonic()
        entries = await self._claims.take_over(self._stream, keys.SAMPLERS_GROUP, 1)
        entries = entries or await self._claims.take([self._stream], keys.SAMPLERS_GROUP, 1, BLOCK_MS)
        if not entries:
            if time.monotonic() - started < LOOK_S:
                await self._wait_for_change()  # nothing to read from: the streams are not there yet, or no longer
            return
        if entries[0].id in self._works:
            return  # our own: its renewals failed for a lease, and nobody else came
        failpoint("sampler.claimed")
        work = await self._open(entries[0])
        if work is None:
            return
        if work.is_alone:
            await self._until_idle()
        await self._make_way(work)
        if self.halted.is_set():
            return
        self._works[work.entry.id] = work
        self._spawn(self._serve(work), f"group {work.group.group_id}")
        if work.is_alone:
            await self._until_idle()

    async def _until_idle(self) -> None:
        """Wait until the open groups are done, or the shift is halted."""
        while self._works and not self.halted.is_set():
            await self._wait_for_change()

    async def _make_way(self, work: Work) -> None:
        """Wait until the weights may become those that `work` wants."""
        self._coming = work
        self._pin()
        try:
            if work.pinned_version is not None:
                await self._student.settled()  # newer weights may be on their way into the engine
            while not self.halted.is_set() and work.must_wait(self._works.values(), self._student.version(self._scope)):
                await self._wait_for_change()
        finally:
            self._coming = None

    def _pin(self) -> None:
        """No newer weights while a group is open, or next, that wants those which are there."""
        works = [*self._works.values(), *([self._coming] if self._coming else [])]
        self._student.is_pinned = any(work.pinned_version is not None for work in works)

    async def _wait_for_change(self) -> None:
        await pause(self._changed, LOOK_S)
        self._changed.clear()

    async def _has_room(self) -> bool:
        """The engine has a free slot, and we hold less than our share of what is outstanding: others want work, too."""
        engine = self._student.engine
        num_open = sum(len(work.completions) for work in self._works.values())
        if not self._works:
            return True
        if engine is None or num_open >= engine.max_sequences:
            return False
        num_samplers, counted_at = self._num_samplers
        if time.monotonic() - counted_at > SHARE_S:
            samplers = await self._ctx.registry.services("sampler")
            num_samplers = max(1, sum(info.job_id == self._scope.job_id for info in samplers))
            self._num_samplers = (num_samplers, time.monotonic())
        if num_samplers == 1:
            return True
        return len(self._works) < math.ceil(await self._ctx.queue.length(self._stream) / num_samplers)

    async def _open(self, entry: Entry) -> Work | None:
        """The claimed group with its open samples; None if there is nothing (more) to write."""
        try:
            group = pb.PromptGroup.FromString(entry.payload)
        except DecodeError as error:
            self._log.error("unreadable prompt group dropped", entry=entry.id, error=str(error))
            SAMPLER_DROPPED.labels("unreadable").inc()
            await self._drop(entry)
            return None
        problem = ""
        try:
            requests = group_requests(group)
        except (WireError, ValueError) as error:
            requests = {index: SampleRequest(sample_id(group, index), [], 0, 0) for index in group.sample_indices}
            problem = f"unusable prompt group: {error}"
        work = Work(entry, group, {index: Completion(request) for index, request in requests.items()})
        if entry.was_held and work.exact_version is None:
            await self._go_on(work)
        if entry.is_exhausted:
            problem = f"given up after {entry.deliveries - 1} deliveries: its sampler died each time"
        if problem:
            reason = "exhausted" if entry.is_exhausted else "bad_request"
            for index in list(work.completions):
                await self._fail(work, index, reason, problem)
        if not work.completions:
            await self._drop(entry)
            return None
        return work

    async def _go_on(self, work: Work) -> None:
        """Forget the samples that an earlier holder of the group handed over; take what it kept of the others."""
        names = {index: completion.key for index, completion in work.completions.items()}
        of = (work.group.teacher, work.group.attempt)
        marks = {name: {rollout_mark(name, *of), score_mark(name, *of)} for name in names.values()}
        done = await self._ctx.queue.marked(self._scope, sorted(set().union(*marks.values())))
        for index, name in names.items():
            if marks[name] & done:
                del work.completions[index]
        parts = await self._ctx.queue.partials(work.entry)
        try:
            work.resume(parts)
        except (WireError, DecodeError) as error:
            work.is_kept = False
            self._log.error("unreadable parts of a group: it is written anew", entry=work.entry.id, error=str(error))
            return
        if num_tokens := sum(len(completion.completion_ids) for completion in work.completions.values()):
            self._log.info("group continued", group=work.group.group_id, tokens=num_tokens)

    async def _drop(self, entry: Entry) -> None:
        await self._ctx.queue.ack_delete([entry])
        self._claims.finish(entry)

    # -- writing -----------------------------------------------------------------------------------------------------

    async def _serve(self, work: Work) -> None:
        """Write a group until it is done or halted. One that fails is not kept: that would be progress."""
        try:
            with work.span() as span:
                self._pin()
                ensure = self._student.ensure(self._scope, at_least=work.min_version, exactly=work.pinned_version)
                if await unless(work.halted, ensure):
                    span.set({"stillhouse.policy_version": self._student.version(self._scope) or 0})
                    work.is_writing = True
                    await self._write(work)
        except BaseException:
            self._works.pop(work.entry.id, None)
            raise
        finally:
            work.is_writing = False

    async def _write(self, work: Work) -> None:
        engine, entry = self._student.engine, self._student.entry
        if engine is None or entry is None:
            raise AssertionError("ensure() came first")
        source = Source(self._ctx.instance, entry.tokenizer_sha256)
        indices = {completion.key: index for index, completion in work.completions.items()}
        is_exact = work.exact_version is not None
        completions = list(work.completions.values())
        written = self._generator.generate(engine, completions, self._student.name_of, alone=is_exact)
        async with aclosing(written):
            while (completion := await _next_unless(work.halted, written)) is not None:
                await self._end(work, indices[completion.key], completion, source)

    async def _end(self, work: Work, index: int, completion: Completion, source: Source) -> None:
        """Hand a sample over, as rollout or as failure."""
        failpoint("sampler.sampled", completion.key)
        if completion.finish_reason == "failed":
            await self._fail(work, index, completion.reason, completion.message)
            return
        if completion.finish_reason == "abort":  # training on what is left would favour short ones
            message = f"aborted by a caller after {len(completion.completion_ids)} tokens"
            await self._fail(work, index, "aborted", message)
            return
        target, mark, payload = destination(make_rollout(work.group, index, completion, source), self._scope)
        is_last = len(work.completions) == 1
        try:
            outcome = await self._ctx.queue.hand_over(self._scope, work.entry, target, mark, payload, last=is_last)
        except TooLargeError as error:
            await self._fail(work, index, "too_large", f"{error.message}; {content(completion)}")
            return
        failpoint("sampler.handed_over")
        self._settle(work, index, outcome)

    async def _fail(self, work: Work, index: int, reason: str, message: str) -> None:
        """End a sample without rollout: on `scored`, and on the dead-letter stream for people."""
        scope, name = self._scope, sample_id(work.group, index)
        attempts = work.entry.deliveries
        score = make_failure(work.group, index, self._ctx.instance, reason, message, attempts)
        payload = score.SerializeToString()
        target, is_last = keys.scored(scope.job_id, scope.epoch), len(work.completions) == 1
        self._log.warning("sample failed", sample_id=name, reason=reason, message=message)
        mark = score_mark(name, score.rollout.teacher, score.rollout.attempt)
        outcome = await self._ctx.queue.hand_over(scope, work.entry, target, mark, payload, last=is_last, dead=payload)
        self._settle(work, index, outcome, is_failed=True)

    def _settle(self, work: Work, index: int, outcome: Outcome, *, is_failed: bool = False) -> None:
        SAMPLED_ROLLOUTS.labels("failed" if is_failed else outcome.value.lower()).inc()
        del work.completions[index]
        self._changed.set()
        if not work.completions:
            self._claims.finish(work.entry)
            self._works.pop(work.entry.id, None)
            self._pin()
        if outcome is Outcome.CLOSED:
            self._close()

    def _close(self) -> None:
        self._log.info("epoch closed, work dropped")
        self._claims.drop()
        self.is_closed = True
        self.halt()

    # -- beside it ---------------------------------------------------------------------------------------------------

    async def _follow_hints(self) -> None:
        while not await pause(self.halted, LOOK_S):
            try:
                await unless(self.halted, self._student.follow(self._scope))
            except QUEUE_ERRORS as error:
                self._log.warning("newer weights not pulled", error=str(error))

    async def _keep_parts(self) -> None:
        while not await pause(self.halted, self._ctx.settings.sampler_keep_s):
            try:
                for work in list(self._works.values()):
                    await self._keep(work)
            except QUEUE_ERRORS as error:
                self._log.warning("partial completions not kept", error=str(error))

    async def _keep(self, work: Work) -> None:
        """Put what its samples gained beside the group; whoever claims it next goes on from there."""
        while not self.is_closed and work.is_kept and work.exact_version is None and (part := work.next_part()):
            outcome = await self._claims.append_partial(self._scope, work.entry, work.num_parts, part)
            if outcome is Outcome.CLOSED:
                self._close()
            if outcome is not Outcome.DONE:
                self._leave(work)
                return
            work.part_is_kept()

    def _leave(self, work: Work) -> None:
        """Another worker holds the group now."""
        if self._works.pop(work.entry.id, None) is not None:
            self._log.info("group left to who took it over", group=work.group.group_id)
            self._pin()
        self._claims.finish(work.entry)
        work.halted.set()


async def _next_unless(halted: asyncio.Event, written: AsyncGenerator[Completion, None]) -> Completion | None:
    """The next completion that ends; None if there is none, or `halted` comes first."""
    found: list[Completion] = []

    async def take() -> None:
        found.extend([completion] if (completion := await anext(written, None)) is not None else [])

    await unless(halted, take())
    return found[0] if found else None
