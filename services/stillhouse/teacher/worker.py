"""The teacher's work: rollouts in, scores out, for all jobs in fair turns. Which stream is next: see schedule.py."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Final

from google.protobuf.message import DecodeError

from stillhouse.core.errors import NotFoundError, StillhouseError, TooLargeError, WireError
from stillhouse.core.failpoints import failpoint
from stillhouse.core.metrics import SCORED_ROLLOUTS, TEACHER_DROPPED
from stillhouse.core.queue import keys
from stillhouse.core.queue.claims import NO_WAIT_MS, Claims
from stillhouse.core.queue.client import BLOCK_MS
from stillhouse.core.queue.streams import Entry, Outcome, Scope
from stillhouse.core.rollouts import score_mark
from stillhouse.core.service import Context
from stillhouse.core.worker import pause, run_turns
from stillhouse.teacher.ahead import ReadAhead
from stillhouse.teacher.blobstore import BlobStore
from stillhouse.teacher.engines.base import Abilities, Scored, ScoreItem, Unscored
from stillhouse.teacher.following import Follower, at_least
from stillhouse.teacher.messages import (
    blob_key,
    make_failure,
    make_score,
    score_bytes,
    without_tokens,
)
from stillhouse.teacher.pool import Resident
from stillhouse.teacher.schedule import Schedule, Stream
from stillhouse.teacher.scoring import Batch, Scorer
from stillhouse.teacher.spans import Reader
from stillhouse.v1 import rollout_pb2 as pb

CLAIM_COUNT: Final = 8
"""Rollouts claimed at once while a batch is filled: few, so that several teachers share a stream."""
IDLE_S: Final = 0.2
"""Pause where there is no stream to read from."""
UNUSABLE_S: Final = 10.0
"""Pause of a stream whose model cannot be loaded here; another teacher may serve it."""
BLOB_TTL_S: Final = 3600.0
"""Payloads of direct scores belong to no stream whose end would free them."""


@dataclass(slots=True, eq=False)
class _Work:
    """A claimed rollout."""

    entry: Entry
    rollout: pb.Rollout
    item: ScoreItem


@dataclass(frozen=True, slots=True)
class _Source:
    """A stream of rollouts, and how they are scored."""

    stream: Stream
    task: pb.TeacherTask


class TeacherWorker:
    """Serves every stream of rollouts that the index lists.

    consumes:     Rollout from the streams `rollouts:<teacher>` of all jobs
    waits for:    a rollout (blocking read over all streams)
    produces:     a Score per rollout on `scored` of its job, with its payload in the blob store
    unblocked by: a sampler's hand-over; `Context.stop`, which hands claims back
    """

    def __init__(
        self, ctx: Context, scorer: Scorer, blobs: BlobStore, follower: Follower, abilities: Abilities
    ) -> None:
        self._ctx = ctx
        self._scorer = scorer
        self._blobs = blobs
        self._reader = Reader(ctx.models)
        self._follower = follower
        self._abilities = abilities
        self._schedule = Schedule()
        self._ahead = ReadAhead(scorer.pool)
        self._unusable: dict[str, float] = {}
        self._deterministic: dict[Scope, bool] = {}
        self._scopes: set[Scope] = set()
        self.activity = "idle"
        self.job_id = ""

    async def run(self) -> None:
        """Work until `Context.stop`."""
        await run_turns(self._round, self._ctx.stop, self._ctx.log)

    async def _round(self) -> None:
        """About one batch of the stream whose turn it is, or a wait for the first rollout anywhere."""
        if self._scorer.dead is not None:
            raise self._scorer.dead
        tasks = await self._tasks()
        counts = await self._ctx.queue.waiting(list(tasks), keys.TEACHERS_GROUP, self._ctx.settings.lease_s)
        tasks = {name: task for name, task in tasks.items() if name in counts}
        self._drop_blobs({Scope(task.job_id, task.epoch) for task in tasks.values()})
        sources = self._sources(tasks)
        if not sources:
            self.activity, self.job_id = "idle", ""
            await pause(self._ctx.stop, IDLE_S)
            return
        waiting = [source.stream for name, source in sources.items() if counts[name]]
        if waiting:
            chosen = self._choose(sources, waiting)
            await self._turn({chosen: sources[chosen]}, NO_WAIT_MS, waiting)
            return
        self.activity = "waiting"
        self._schedule.rest()
        started = time.monotonic()
        if not await self._turn(sources, BLOCK_MS, []) and time.monotonic() - started < IDLE_S:
            await pause(self._ctx.stop, IDLE_S)

    async def _tasks(self) -> dict[str, pb.TeacherTask]:
        """The streams of the index whose rollouts the engine can score."""
        redis: Any = self._ctx.redis
        tasks: dict[str, pb.TeacherTask] = {}
        for member in sorted(await redis.smembers(keys.TEACHERS)):
            index = await redis.hgetall(keys.teacher(member.decode()))
            tasks |= {stream.decode(): pb.TeacherTask.FromString(task) for stream, task in sorted(index.items())}
        return {stream: task for stream, task in tasks.items() if not self._abilities.refusal(task)}

    def _sources(self, tasks: Mapping[str, pb.TeacherTask]) -> dict[str, _Source]:
        """Streams whose model can be used here; the others wait for a teacher that has it."""
        now = time.monotonic()
        self._unusable = {name: until for name, until in self._unusable.items() if until > now}
        sources: dict[str, _Source] = {}
        for name, task in tasks.items():
            if name not in self._unusable:
                try:
                    sources[name] = _Source(self._scorer.pool.stream(name, task), task)
                except StillhouseError as error:
                    self._set_aside(name, task, error)
        streams = [source.stream for source in sources.values()]
        self._schedule.forget({stream.job_id for stream in streams}, {stream.model for stream in streams})
        self._follower.forget_others({stream.job_id for stream in streams})
        return sources

    def _set_aside(self, name: str, task: pb.TeacherTask, error: StillhouseError) -> None:
        self._ctx.log.error("model cannot be used", job_id=task.job_id, model=task.model, error=error.message)
        self._unusable[name] = time.monotonic() + UNUSABLE_S

    def _choose(self, sources: Mapping[str, _Source], waiting: Sequence[Stream]) -> str:
        """The stream whose turn it is; the files of the model that comes after it are read meanwhile."""
        resident = {one.key for one in self._scorer.pool.residents()}
        chosen = self._schedule.choose(waiting, resident, self._scorer.pool.fits)
        if upcoming := self._schedule.upcoming(waiting, resident | {chosen.model}):
            self._ahead.start(sources[upcoming.name].task, upcoming.model)
        return chosen.name

    def _drop_blobs(self, live: set[Scope]) -> None:
        """Free the payloads of epochs that are over."""
        for scope in self._blobs.scopes() - live:
            self._blobs.drop(scope, 0.0 if scope in self._scopes else BLOB_TTL_S)
        for scope in self._scopes - live:
            self._deterministic.pop(scope, None)
        self._scopes = live | (self._scopes & self._blobs.scopes())

    async def _turn(self, sources: Mapping[str, _Source], block_ms: int, waiting: Sequence[Stream]) -> bool:
        """Score about one batch of one of the sources; False if all were empty. `waiting`: streams that have work."""
        async with Claims(self._ctx.queue, self._ctx.instance, self._ctx.settings.lease_s, self._ctx.log) as claims:
            works = await self._claim(claims, sources, block_ms)
            if works:
                failpoint("teacher.claimed")
            found = [source.stream for name, source in sources.items() if any(w.entry.stream == name for w in works)]
            if found and not self._ctx.stop.is_set():
                # work that came at once for several is handed back but for one: it has its turn like all other work
                chosen = found[0].name if len(found) == 1 else self._choose(sources, found)
                self.activity, self.job_id = "scoring", sources[chosen].task.job_id
                async with self._scorer.turn():
                    mine = [work for work in works if work.entry.stream == chosen]
                    await self._serve(claims, sources[chosen], mine, waiting)
            return bool(works)

    async def _serve(self, claims: Claims, source: _Source, works: Sequence[_Work], waiting: Sequence[Stream]) -> None:
        """Score rollouts of one stream with their model."""
        stream, task = source.stream, source.task
        resident = {one.key for one in self._scorer.pool.residents()}
        try:
            model, load_s = await self._scorer.model(task, self._schedule.at_work(waiting, resident))
            started = time.monotonic()  # an average that is pulled is part of the turn
            if task.follows_student:
                await self._follower.follow(model, task, at_least([work.rollout for work in works], task.epoch))
        except StillhouseError as error:
            self._set_aside(stream.name, task, error)
            return
        if load_s:
            self._ctx.log.info("model loaded", job_id=task.job_id, model=task.model, seconds=round(load_s, 1))
            self._schedule.loaded(stream.model, load_s)
            self._ahead.loaded(stream.model)
        await self._score(claims, task, works, model, num_loads=int(load_s > 0))
        tokens = sum(work.item.length for work in works)
        self._schedule.served(stream, tokens, time.monotonic() - started)

    async def _claim(self, claims: Claims, sources: Mapping[str, _Source], block_ms: int) -> list[_Work]:
        """Rollouts for about one forward pass: what was abandoned first."""
        works: list[_Work] = []
        for name, source in sources.items():
            for _ in range(CLAIM_COUNT):
                taken = await claims.take_over(name, keys.TEACHERS_GROUP, 1)
                works += [work for entry in taken for work in await self._open(claims, source.task, entry)]
                if any(entry.is_suspect for entry in taken):
                    return works
                if not taken or name in self._unusable:
                    break
        budget = self._ctx.settings.teacher_batch_tokens
        is_single = len(sources) == 1
        count = CLAIM_COUNT if is_single else 1
        while len(works) * max((work.item.length for work in works), default=0) < budget:
            entries = await claims.take(list(sources), keys.TEACHERS_GROUP, count, NO_WAIT_MS if works else block_ms)
            for entry in entries:
                works += await self._open(claims, sources[entry.stream].task, entry)
            if not entries or not is_single or self._unusable.keys() & sources.keys():
                break
        return works

    async def _open(self, claims: Claims, task: pb.TeacherTask, entry: Entry) -> list[_Work]:
        """The claimed rollout; empty if it has already found its end, or its stream was set aside."""
        try:
            rollout = pb.Rollout.FromString(entry.payload)
        except DecodeError as error:
            self._ctx.log.error("unreadable rollout dropped", entry=entry.id, error=str(error))
            TEACHER_DROPPED.labels("unreadable").inc()
            await self._ctx.queue.ack_delete([entry])
            claims.finish(entry)
            return []
        if entry.is_exhausted:
            message = f"given up after {entry.deliveries - 1} deliveries: its teacher died each time"
            await self._fail(claims, task, entry, rollout, "exhausted", message)
            return []
        try:
            item = await self._reader.item(task, rollout)
        except WireError as error:
            await self._fail(claims, task, entry, rollout, "bad_request", error.message)
            return []
        except StillhouseError as error:  # of this process, not of the rollout: it is handed back for another teacher
            self._set_aside(entry.stream, task, error)
            return []
        return [_Work(entry, rollout, item)]

    async def _score(
        self, claims: Claims, task: pb.TeacherTask, works: Sequence[_Work], resident: Resident, num_loads: int
    ) -> None:
        """Score rollouts of one stream; what is not done when the process stops is handed back."""
        num_ended = 0
        batches = self._scorer.batches(
            resident,
            [work.item for work in works],
            budget=self._ctx.settings.teacher_batch_tokens,
            job_id=task.job_id,
            is_exact=await self._is_deterministic(Scope(task.job_id, task.epoch)),
        )
        async with aclosing(batches):
            async for batch in batches:
                failpoint("teacher.scored")
                for index, result in zip(batch.indices, batch.results, strict=True):
                    score = self._make(task, works[index], result, batch)
                    score.model_loads, num_loads = num_loads, 0
                    outcome = await self._end(claims, task, works[index], score)
                    if outcome is Outcome.CLOSED:
                        self._ctx.log.info("epoch closed, work dropped", job_id=task.job_id, epoch=task.epoch)
                        for dropped in works:
                            claims.finish(dropped.entry)
                        return
                num_ended += len(batch.indices)
                if self._ctx.stop.is_set() and num_ended < len(works):
                    failpoint("teacher.draining")
                    return

    async def _is_deterministic(self, scope: Scope) -> bool:
        if scope not in self._deterministic:
            try:
                spec = (await self._ctx.jobs.get(scope.job_id)).spec
            except NotFoundError:
                spec = {}
            self._deterministic[scope] = bool(spec.get("deterministic"))
        return self._deterministic[scope]

    def _make(self, task: pb.TeacherTask, work: _Work, result: Scored | Unscored, batch: Batch) -> pb.Score:
        """The end of a sample, as score or as failure."""
        if isinstance(result, Unscored):
            return self._failure(task, work.entry, work.rollout, result.reason, result.message)
        scope = Scope(task.job_id, task.epoch)
        return make_score(work.rollout, work.item, result, batch, scope, self._blobs, self._ctx.instance)

    async def _end(self, claims: Claims, task: pb.TeacherTask, work: _Work, score: pb.Score) -> Outcome:
        """Hand a sample over; its payload is kept as long as somebody may ask for it."""
        try:
            outcome = await self._hand_over(claims, task, work.entry, score)
        except TooLargeError as error:
            self._blobs.release(blob_key(score))
            return await self._fail(claims, task, work.entry, work.rollout, "too_large", error.message)
        if outcome is Outcome.DONE:
            self._scorer.accounts.sent(task.job_id, score_bytes(score))
        else:
            self._blobs.release(blob_key(score))  # nobody will ask for it
        return outcome

    async def _fail(
        self, claims: Claims, task: pb.TeacherTask, entry: Entry, rollout: pb.Rollout, reason: str, message: str
    ) -> Outcome:
        """End a sample without score: on `scored`, and on the dead-letter stream for people."""
        return await self._hand_over(claims, task, entry, self._failure(task, entry, rollout, reason, message))

    def _failure(self, task: pb.TeacherTask, entry: Entry, rollout: pb.Rollout, reason: str, message: str) -> pb.Score:
        self._ctx.log.warning(
            "sample failed", job_id=task.job_id, sample_id=rollout.sample_id, reason=reason, message=message
        )
        kept = without_tokens(rollout) if reason == "too_large" else rollout
        return make_failure(kept, self._ctx.instance, reason, message, entry.deliveries)

    async def _hand_over(self, claims: Claims, task: pb.TeacherTask, entry: Entry, score: pb.Score) -> Outcome:
        payload = score.SerializeToString()
        dead = payload if score.WhichOneof("result") == "failed" else b""
        outcome = await self._ctx.queue.hand_over(
            Scope(task.job_id, task.epoch),
            entry,
            keys.scored(task.job_id, task.epoch),
            score_mark(score.rollout.sample_id, score.rollout.teacher, score.rollout.attempt),
            payload,
            dead=dead,
        )
        failpoint("teacher.handed_over")
        claims.finish(entry)
        SCORED_ROLLOUTS.labels("failed" if dead else outcome.value.lower()).inc()
        return outcome
