"""The sampler's work: groups of prompts in, rollouts out, with weights that are new enough.

Staleness is bounded here and nowhere else: a group is started only when the weights are at least its
`min_policy_version`, so late joiners, lost notifications and partitions do no harm.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final

from google.protobuf.message import DecodeError

from stillhouse.core.errors import StillhouseError, TooLargeError, WireError
from stillhouse.core.failpoints import failpoint
from stillhouse.core.queue import keys
from stillhouse.core.queue.claims import QUEUE_ERRORS, Claims
from stillhouse.core.queue.client import BLOCK_MS
from stillhouse.core.queue.streams import Entry, Outcome, Scope
from stillhouse.core.service import Context
from stillhouse.core.tasks import cancel_all
from stillhouse.core.telemetry import DROPPED, SAMPLED_ROLLOUTS
from stillhouse.core.worker import pause, run_turns, unless
from stillhouse.sampler.engines.base import SampleRequest
from stillhouse.sampler.generation import Completion, Generator
from stillhouse.sampler.messages import (
    Source,
    destination,
    group_requests,
    make_failure,
    make_rollout,
    rollout_mark,
    sample_id,
    score_mark,
)
from stillhouse.sampler.student import Student
from stillhouse.v1 import rollout_pb2 as pb

IDLE_S: Final = 0.2
"""Pause between looks for an assignment: a new job waits for it once."""
WATCH_S: Final = 0.5
"""How often a running batch checks that it is still wanted."""
LINGER_S: Final = 0.05
"""Wait for more groups after the first: a plan arrives group by group, and a batch cannot grow once it runs."""
RETRY_S: Final = 2.0
"""Pause after a model or weights could not be had."""


@dataclass(slots=True, eq=False)
class _Work:
    """A claimed group and what is still to be done of it."""

    entry: Entry
    group: pb.PromptGroup
    requests: dict[int, SampleRequest]
    """Open samples by index; one leaves when its end is handed over."""

    @property
    def exact_version(self) -> int | None:
        """Deterministic mode: these weights and no others, and the group is its own batch."""
        return self.group.exact_policy_version_plus_one - 1 if self.group.exact_policy_version_plus_one else None


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
        self.is_paused = False
        self.activity = "idle"

    async def run(self) -> None:
        """Work until `Context.stop`."""
        await run_turns(self._turn, self._ctx.stop, self._ctx.log)

    async def _turn(self) -> None:
        scope = await self._assignment()
        if scope is None or scope == self._closed or self.is_paused:
            self.scope = None if scope is None else self.scope
            self.activity = "paused" if self.is_paused else "idle"
            await self._idle()
            return
        try:
            if scope != self.scope:
                await self._adopt(scope)
            async with Claims(self._ctx.queue, self._ctx.instance, self._ctx.settings.lease_s, self._ctx.log) as claims:
                started = time.monotonic()
                self.activity = "waiting"
                works = await self._claim(scope, claims)
                if works:
                    await self._serve(scope, claims, works)
                elif time.monotonic() - started < IDLE_S:
                    await self._idle()  # nothing to read from: the streams are not there yet, or no longer
        except StillhouseError as error:
            self._ctx.log.warning("cannot sample", job_id=scope.job_id, epoch=scope.epoch, error=error.message)
            await pause(self._ctx.stop, RETRY_S)

    async def _assignment(self) -> Scope | None:
        """The claim that leased this sampler; one older than what it has seen of the job counts as none."""
        scope = await self._ctx.registry.assignment(self._ctx.instance)
        if scope is None or scope.epoch < self._highest_epoch.get(scope.job_id, 0):
            return None
        self._highest_epoch[scope.job_id] = scope.epoch
        return scope

    async def _adopt(self, scope: Scope) -> None:
        """Have the job's student in memory."""
        self.activity = "loading"
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

    async def _claim(self, scope: Scope, claims: Claims) -> list[_Work]:
        """Groups for a batch: what was abandoned first, no more than fit, and no more than our share of what waits."""
        stream = keys.prompts(scope.job_id, scope.epoch)
        works: list[_Work] = []
        room, share, block_ms = self._ctx.settings.sampler_max_sequences, 1, BLOCK_MS
        while room > 0 and len(works) < share:
            entries = await claims.take_over(stream, keys.SAMPLERS_GROUP, 1)
            entries = entries or await claims.take([stream], keys.SAMPLERS_GROUP, 1, block_ms)
            if not entries:
                break
            failpoint("sampler.claimed")
            work = await self._open(scope, claims, entries[0])
            if work is None:
                continue
            works.append(work)
            room -= len(work.requests)
            if work.exact_version is not None or entries[0].is_suspect:
                break
            if len(works) == 1:
                await pause(self._ctx.stop, LINGER_S)
                share, block_ms = await self._share(scope, stream), int(LINGER_S * 1000)
        return works

    async def _share(self, scope: Scope, stream: str) -> int:
        """Groups outstanding / samplers that serve the job, so that one sampler does not leave the others idle."""
        samplers = await self._ctx.registry.services("sampler")
        num_samplers = max(1, sum(info.job_id == scope.job_id for info in samplers))
        return math.ceil(await self._ctx.queue.length(stream) / num_samplers)

    async def _open(self, scope: Scope, claims: Claims, entry: Entry) -> _Work | None:
        """The claimed group with its open samples; None if there is nothing (more) to write."""
        try:
            group = pb.PromptGroup.FromString(entry.payload)
        except DecodeError as error:
            self._ctx.log.error("unreadable prompt group dropped", entry=entry.id, error=str(error))
            DROPPED.labels("sampler", "unreadable").inc()
            await self._ctx.queue.ack_delete([entry])
            claims.finish(entry)
            return None
        problem = ""
        try:
            requests = group_requests(group)
        except (WireError, ValueError) as error:
            requests = {index: SampleRequest(sample_id(group, index), [], 0, 0) for index in group.sample_indices}
            problem = f"unusable prompt group: {error}"
        work = _Work(entry, group, requests)
        if entry.deliveries > 1 and work.exact_version is None:
            await self._skip_done(scope, work)
        if entry.is_exhausted:
            problem = f"given up after {entry.deliveries - 1} deliveries: its sampler died each time"
        if problem:
            reason = "exhausted" if entry.is_exhausted else "bad_request"
            for index in list(work.requests):
                await self._fail(scope, claims, work, index, reason, problem)
        if not work.requests:
            await self._ctx.queue.ack_delete([entry])
            claims.finish(entry)
            return None
        return work

    async def _skip_done(self, scope: Scope, work: _Work) -> None:
        """Forget the samples that an earlier holder of the group handed over."""
        names = {index: request.key for index, request in work.requests.items()}
        marks = [mark(name) for name in names.values() for mark in (rollout_mark, score_mark)]
        done = await self._ctx.queue.marked(scope, marks)
        for index, name in names.items():
            if rollout_mark(name) in done or score_mark(name) in done:
                del work.requests[index]

    async def _serve(self, scope: Scope, claims: Claims, works: list[_Work]) -> None:
        """Write what was claimed, until done or no longer wanted."""
        halted = asyncio.Event()
        watch = asyncio.create_task(self._watch(scope, halted), name="watch assignment")
        try:
            for batch in _batches(works):
                at_least = max(work.group.min_policy_version for work in batch)
                self.activity = "pulling"
                ensure = self._student.ensure(scope, at_least=at_least, exactly=batch[0].exact_version)
                if not await unless(halted, ensure):
                    return
                self.activity = "sampling"
                await self._write(scope, claims, batch, halted)
                if halted.is_set():
                    return
        finally:
            await cancel_all([watch])

    async def _watch(self, scope: Scope, halted: asyncio.Event) -> None:
        """Set `halted` when the process stops or the job is no longer ours."""
        while not await pause(self._ctx.stop, WATCH_S):
            try:
                if await self._assignment() != scope:
                    break
            except QUEUE_ERRORS:
                continue  # the hand-over will notice if it lasts
        if self._ctx.stop.is_set():
            failpoint("sampler.draining")
        halted.set()

    async def _write(self, scope: Scope, claims: Claims, batch: Sequence[_Work], halted: asyncio.Event) -> None:
        engine, entry = self._student.engine, self._student.entry
        if engine is None or entry is None:
            raise AssertionError("ensure() came first")
        source = Source(scope, self._ctx.instance, entry.tokenizer_sha256)
        where = {request.key: (work, index) for work in batch for index, request in work.requests.items()}
        completions = [Completion(request) for work in batch for request in work.requests.values()]
        written = self._generator.generate(
            engine, completions, self._student.name_of, alone=batch[0].exact_version is not None
        )
        ending = asyncio.create_task(self._abort_when(halted, list(where)), name="abort")
        try:
            async with aclosing(written):
                async for completion in written:
                    if halted.is_set() and completion.finish_reason == "abort":
                        continue  # cut off by us: the claim goes back and another sampler writes it
                    await self._end(claims, *where[completion.key], completion, source, halted)
        finally:
            await cancel_all([ending])

    async def _abort_when(self, halted: asyncio.Event, keys: list[str]) -> None:
        await halted.wait()
        self._generator.abort(keys)

    async def _end(
        self, claims: Claims, work: _Work, index: int, completion: Completion, source: Source, halted: asyncio.Event
    ) -> None:
        """Hand a sample over, as rollout or as failure."""
        scope, name = source.scope, completion.key
        failpoint("sampler.sampled", name)
        if completion.finish_reason == "failed":
            outcome = await self._fail(scope, claims, work, index, completion.reason, completion.message)
        else:
            target, mark, payload = destination(make_rollout(work.group, index, completion, source), scope)
            is_last = len(work.requests) == 1
            try:
                outcome = await self._ctx.queue.hand_over(scope, work.entry, target, mark, payload, last=is_last)
                failpoint("sampler.handed_over")
                self._settle(claims, work, index, outcome)
            except TooLargeError as error:
                problem = f"{error.message}; {_content(completion)}"
                outcome = await self._fail(scope, claims, work, index, "too_large", problem)
        if outcome is Outcome.CLOSED:
            self._ctx.log.info("epoch closed, work dropped", job_id=scope.job_id, epoch=scope.epoch)
            claims.drop()
            self._closed = scope
            halted.set()

    async def _fail(self, scope: Scope, claims: Claims, work: _Work, index: int, reason: str, message: str) -> Outcome:
        """End a sample without rollout: on `scored`, and on the dead-letter stream for people."""
        name = sample_id(work.group, index)
        attempts = work.entry.deliveries
        score = make_failure(work.group, index, scope, self._ctx.instance, reason, message, attempts)
        payload = score.SerializeToString()
        target, is_last = keys.scored(scope.job_id, scope.epoch), len(work.requests) == 1
        self._ctx.log.warning("sample failed", job_id=scope.job_id, sample_id=name, reason=reason, message=message)
        outcome = await self._ctx.queue.hand_over(
            scope, work.entry, target, score_mark(name), payload, last=is_last, dead=payload
        )
        self._settle(claims, work, index, outcome)
        return outcome

    def _settle(self, claims: Claims, work: _Work, index: int, outcome: Outcome) -> None:
        SAMPLED_ROLLOUTS.labels(outcome.value.lower()).inc()
        del work.requests[index]
        if not work.requests:
            claims.finish(work.entry)


def _content(completion: Completion) -> str:
    """What makes a rollout too large, and what to do about it."""
    size = f"it holds {len(completion.completion_ids)} tokens"
    if completion.target_ids is None:
        return f"{size}; lower sampling.max_tokens"
    likeliest = completion.target_ids.shape[1]
    return f"{size} with the ids of the {likeliest} likeliest at each; lower loss.k or sampling.max_tokens"


def _batches(works: list[_Work]) -> Iterable[list[_Work]]:
    """Groups that may share a batch: all of them, but in deterministic mode each for itself."""
    free = [work for work in works if work.exact_version is None]
    if free:
        yield free
    for work in works:
        if work.exact_version is not None:
            yield [work]
