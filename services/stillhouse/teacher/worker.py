"""The teacher's work: rollouts in, scores out, for all jobs in fair turns."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from google.protobuf.message import DecodeError

from stillhouse.core.errors import NotFoundError, StillhouseError, TooLargeError, WireError
from stillhouse.core.failpoints import failpoint
from stillhouse.core.queue import keys
from stillhouse.core.queue.claims import NO_WAIT_MS, Claims
from stillhouse.core.queue.client import BLOCK_MS
from stillhouse.core.queue.streams import Entry, Outcome, Scope
from stillhouse.core.service import Context
from stillhouse.core.telemetry import DROPPED, SCORED_ROLLOUTS
from stillhouse.core.worker import pause, run_turns
from stillhouse.teacher.batching import plan_batches
from stillhouse.teacher.blobstore import BlobStore
from stillhouse.teacher.engines.base import Abilities, Scored, ScoreItem, Unscored
from stillhouse.teacher.messages import blob_key, make_failure, make_score, score_mark, without_tokens
from stillhouse.teacher.pool import Resident
from stillhouse.teacher.scoring import Scorer
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


class TeacherWorker:
    """Serves every stream of rollouts that the index lists.

    consumes:     Rollout from the streams `rollouts:<teacher>` of all jobs
    waits for:    a rollout (blocking read over all streams)
    produces:     a Score per rollout on `scored` of its job, with its payload in the blob store
    unblocked by: a sampler's hand-over; `Context.stop`, which hands claims back
    """

    def __init__(self, ctx: Context, scorer: Scorer, blobs: BlobStore, abilities: Abilities) -> None:
        self._ctx = ctx
        self._scorer = scorer
        self._blobs = blobs
        self._reader = Reader(ctx.models)
        self._abilities = abilities
        self._last_stream = ""
        self._unusable: dict[str, float] = {}
        self._deterministic: dict[Scope, bool] = {}
        self._scopes: set[Scope] = set()
        self.activity = "idle"
        self.job_id = ""

    async def run(self) -> None:
        """Work until `Context.stop`."""
        await run_turns(self._round, self._ctx.stop, self._ctx.log)

    async def _round(self) -> None:
        """One batch of every stream that has work, or a wait for the first rollout anywhere."""
        tasks = await self._tasks()
        self._drop_blobs({Scope(task.job_id, task.epoch) for task in tasks.values()})
        now = time.monotonic()
        self._unusable = {stream: until for stream, until in self._unusable.items() if until > now}
        tasks = {stream: task for stream, task in tasks.items() if stream not in self._unusable}
        if not tasks:
            self.activity, self.job_id = "idle", ""
            await pause(self._ctx.stop, IDLE_S)
            return
        has_served = False
        for stream in self._rotation(list(tasks)):
            if self._ctx.stop.is_set():
                return
            has_served |= await self._turn({stream: tasks[stream]}, NO_WAIT_MS)
        if not has_served and not self._ctx.stop.is_set():
            self.activity = "waiting"
            started = time.monotonic()
            if not await self._turn(tasks, BLOCK_MS) and time.monotonic() - started < IDLE_S:
                await pause(self._ctx.stop, IDLE_S)

    async def _tasks(self) -> dict[str, pb.TeacherTask]:
        """Streams that are there and whose rollouts the engine can score, by model: neighbours share it."""
        redis: Any = self._ctx.redis
        tasks: dict[str, pb.TeacherTask] = {}
        for member in sorted(await redis.smembers(keys.TEACHERS)):
            index = await redis.hgetall(keys.teacher(member.decode()))
            for stream, task in sorted(index.items()):
                # a stream that is gone would make a read over all of them fail
                if await redis.exists(stream):
                    tasks[stream.decode()] = pb.TeacherTask.FromString(task)
        return {stream: task for stream, task in tasks.items() if not self._abilities.refusal(task)}

    def _rotation(self, streams: list[str]) -> list[str]:
        """The streams, starting after the one served last: whoever is first in the index has no advantage."""
        if self._last_stream in streams:
            start = streams.index(self._last_stream) + 1
            return streams[start:] + streams[:start]
        return streams

    def _drop_blobs(self, live: set[Scope]) -> None:
        """Free the payloads of epochs that are over."""
        for scope in self._blobs.scopes() - live:
            self._blobs.drop(scope, 0.0 if scope in self._scopes else BLOB_TTL_S)
        for scope in self._scopes - live:
            self._deterministic.pop(scope, None)
        self._scopes = live | (self._scopes & self._blobs.scopes())

    async def _turn(self, tasks: dict[str, pb.TeacherTask], block_ms: int) -> bool:
        """Score about one batch of the streams; False if they were empty."""
        async with Claims(self._ctx.queue, self._ctx.instance, self._ctx.settings.lease_s, self._ctx.log) as claims:
            works = await self._claim(claims, tasks, block_ms)
            if works:
                failpoint("teacher.claimed")
            for stream, task in tasks.items():
                mine = [work for work in works if work.entry.stream == stream]
                if mine and not self._ctx.stop.is_set():
                    self._last_stream = stream
                    self.activity, self.job_id = "scoring", task.job_id
                    await self._score(claims, task, mine)
            return bool(works)

    async def _claim(self, claims: Claims, tasks: dict[str, pb.TeacherTask], block_ms: int) -> list[_Work]:
        """Rollouts for about one forward pass: what was abandoned first."""
        works: list[_Work] = []
        for stream, task in tasks.items():
            for _ in range(CLAIM_COUNT):
                taken = await claims.take_over(stream, keys.TEACHERS_GROUP, 1)
                works += [work for entry in taken for work in await self._open(claims, task, entry)]
                if any(entry.is_suspect for entry in taken):
                    return works
                if not taken:
                    break
        budget = self._ctx.settings.teacher_batch_tokens
        is_single = len(tasks) == 1
        count = CLAIM_COUNT if is_single else 1
        while len(works) * max((work.item.length for work in works), default=0) < budget:
            entries = await claims.take(list(tasks), keys.TEACHERS_GROUP, count, NO_WAIT_MS if works else block_ms)
            for entry in entries:
                works += await self._open(claims, tasks[entry.stream], entry)
            if not entries or not is_single:
                break
        return works

    async def _open(self, claims: Claims, task: pb.TeacherTask, entry: Entry) -> list[_Work]:
        """The claimed rollout; empty if it has already found its end."""
        try:
            rollout = pb.Rollout.FromString(entry.payload)
        except DecodeError as error:
            self._ctx.log.error("unreadable rollout dropped", entry=entry.id, error=str(error))
            DROPPED.labels("teacher", "unreadable").inc()
            await self._ctx.queue.ack_delete([entry])
            claims.finish(entry)
            return []
        try:
            item = await self._reader.item(task, rollout)
        except WireError as error:
            await self._fail(claims, task, entry, rollout, "bad_request", error.message)
            return []
        if entry.is_exhausted:
            message = f"given up after {entry.deliveries - 1} deliveries: its teacher died each time"
            await self._fail(claims, task, entry, rollout, "exhausted", message)
            return []
        return [_Work(entry, rollout, item)]

    async def _score(self, claims: Claims, task: pb.TeacherTask, works: Sequence[_Work]) -> None:
        """Score rollouts of one stream; what is not done when the process stops is handed back."""
        scope = Scope(task.job_id, task.epoch)
        try:
            resident = await self._scorer.model(task)
        except StillhouseError as error:
            self._ctx.log.error("model cannot be used", job_id=task.job_id, model=task.model, error=error.message)
            self._unusable[works[0].entry.stream] = time.monotonic() + UNUSABLE_S
            return
        if any(work.rollout.score.kind == pb.SCORE_KIND_HIDDEN for work in works):
            await self._scorer.head(resident)  # hashed once, off the event loop
        lengths = [work.item.length for work in works]
        # deterministic mode: alone, since the last bits of a row depend on what else is in its batch
        budget = 0 if await self._is_deterministic(scope) else self._ctx.settings.teacher_batch_tokens
        for batch in plan_batches(lengths, budget):
            if self._ctx.stop.is_set():
                failpoint("teacher.draining")
                return
            chosen = [works[index] for index in batch]
            failpoint("teacher.scoring", " ".join(work.rollout.sample_id for work in chosen))
            results, score_s = await self._scorer.score(resident, [work.item for work in chosen])
            failpoint("teacher.scored")
            for work, result in zip(chosen, results, strict=True):
                outcome = await self._end(claims, task, work, result, resident, score_s)
                if outcome is Outcome.CLOSED:
                    self._ctx.log.info("epoch closed, work dropped", job_id=task.job_id, epoch=task.epoch)
                    for dropped in works:
                        claims.finish(dropped.entry)
                    return

    async def _is_deterministic(self, scope: Scope) -> bool:
        if scope not in self._deterministic:
            try:
                spec = (await self._ctx.jobs.get(scope.job_id)).spec
            except NotFoundError:
                spec = {}
            self._deterministic[scope] = bool(spec.get("deterministic"))
        return self._deterministic[scope]

    async def _end(
        self,
        claims: Claims,
        task: pb.TeacherTask,
        work: _Work,
        result: Scored | Unscored,
        resident: Resident,
        score_s: float,
    ) -> Outcome:
        """Hand a sample over, as score or as failure."""
        if isinstance(result, Unscored):
            return await self._fail(claims, task, work.entry, work.rollout, result.reason, result.message)
        scope = Scope(task.job_id, task.epoch)
        score = make_score(work.rollout, work.item, result, resident, scope, self._blobs, self._ctx.instance, score_s)
        try:
            outcome = await self._hand_over(claims, task, work.entry, score)
        except TooLargeError as error:
            self._blobs.release(blob_key(score))
            return await self._fail(claims, task, work.entry, work.rollout, "too_large", error.message)
        if outcome is not Outcome.DONE:
            self._blobs.release(blob_key(score))  # nobody will ask for it
        return outcome

    async def _fail(
        self, claims: Claims, task: pb.TeacherTask, entry: Entry, rollout: pb.Rollout, reason: str, message: str
    ) -> Outcome:
        """End a sample without score: on `scored`, and on the dead-letter stream for people."""
        self._ctx.log.warning(
            "sample failed", job_id=task.job_id, sample_id=rollout.sample_id, reason=reason, message=message
        )
        kept = without_tokens(rollout) if reason == "too_large" else rollout
        score = make_failure(kept, self._ctx.instance, reason, message, entry.deliveries)
        return await self._hand_over(claims, task, entry, score)

    async def _hand_over(self, claims: Claims, task: pb.TeacherTask, entry: Entry, score: pb.Score) -> Outcome:
        payload = score.SerializeToString()
        dead = payload if score.WhichOneof("result") == "failed" else b""
        outcome = await self._ctx.queue.hand_over(
            Scope(task.job_id, task.epoch),
            entry,
            keys.scored(task.job_id, task.epoch),
            score_mark(score.rollout),
            payload,
            dead=dead,
        )
        failpoint("teacher.handed_over")
        claims.finish(entry)
        SCORED_ROLLOUTS.labels("failed" if dead else outcome.value.lower()).inc()
        return outcome
