"""The loop's view of samplers and teachers: `start` a group, get it back scored. Over the queue of one epoch.

A sample's life here:  planned -> waiting -> arrived (score, payload fetched) -> handed to the loop with its group
                                     ^          |
                                     +----------+  payload gone with its teacher: put back for scoring, attempt + 1

Bulk never crosses the queue: hidden states are fetched from the teacher that holds them, as soon as the score arrives.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from redis.exceptions import RedisError

from stillhouse.core.blobs import xxh3
from stillhouse.core.errors import (
    JobFailedError,
    LeaseLostError,
    StillhouseError,
    WireError,
)
from stillhouse.core.failpoints import failpoint
from stillhouse.core.queue import keys
from stillhouse.core.queue.epochs import close_epochs
from stillhouse.core.queue.registry import Registry
from stillhouse.core.queue.streams import Entry, Outcome, QueueBackend, Scope
from stillhouse.core.rpc import Peers, collect
from stillhouse.core.tensors import from_bytes
from stillhouse.v1 import rollout_pb2, teacher_pb2, teacher_pb2_grpc

CLAIM_COUNT: Final = 64
"""Scores taken from the queue at once."""
RECLAIM_COUNT: Final = 1_000_000
"""More than can be in flight: after a lost answer all pending scores are looked at."""
FETCH_TIMEOUT_S: Final = 120.0
"""Deadline of one payload: 32 MiB of hidden states take 0.1 s on loopback, 3 s on a 100 Mbit/s line."""
FETCH_CONCURRENCY: Final = 4
"""Payloads fetched at once: enough to hide latency, few enough to bound memory in flight."""
MAX_ATTEMPTS: Final = 5
"""Times a sample is put back for scoring before the trainer gives it up."""
RETRY_PAUSES_S: Final = (0.0, 1.0, 4.0, 10.0)
"""Pause before the next attempt, by attempt: a teacher that died costs nothing, a link that is down for a while no
sample."""


Payload = rollout_pb2.HiddenScore | rollout_pb2.TopKScore | rollout_pb2.TargetsScore
"""Scores that may stay with the teacher until they are fetched."""


@dataclass(slots=True)
class ScoredSample:
    """A sample at its end: a score, or a failure."""

    score: rollout_pb2.Score
    entry: Entry | None = None
    """Its queue entry, until the journal holds it."""
    hidden: np.ndarray | None = None
    """float16 or float32 [T, D], for scores of kind hidden."""

    @property
    def sample_id(self) -> str:
        return self.score.rollout.sample_id

    @property
    def is_failed(self) -> bool:
        return self.score.WhichOneof("result") == "failed"

    def score_bytes(self) -> int:
        """Size of what the teacher said about the sample, payload included."""
        hidden = 0 if self.hidden is None else self.hidden.nbytes
        return self.score.ByteSize() - self.score.rollout.ByteSize() + hidden


@dataclass(slots=True)
class ScoredGroup:
    """All samples of a planned group, in order of their index."""

    group: int
    samples: list[ScoredSample]

    @property
    def scored(self) -> list[ScoredSample]:
        return [sample for sample in self.samples if not sample.is_failed]


@dataclass(slots=True)
class _Pending:
    """A group in flight."""

    group: int
    wanted: set[str]
    future: asyncio.Future[ScoredGroup]
    arrived: dict[str, ScoredSample] = field(default_factory=dict)


class Exchange:
    """`Rollouts` of the loop, on the queue of one epoch."""

    def __init__(
        self,
        scope: Scope,
        *,
        queue: QueueBackend,
        redis: Any,
        registry: Registry,
        peers: Peers,
        consumer: str,
        log: Any,
    ) -> None:
        self._scope = scope
        self._queue = queue
        self._redis = redis
        self._registry = registry
        self._peers = peers
        self._consumer = consumer
        self._log = log
        self._pending: dict[str, _Pending] = {}
        self._by_sample: dict[str, _Pending] = {}
        self._fetches = asyncio.Semaphore(FETCH_CONCURRENCY)
        self._scored = keys.scored(scope.job_id, scope.epoch)
        self._prompts = keys.prompts(scope.job_id, scope.epoch)
        self._told: set[str] = set()
        """Teachers that have a stream of rollouts."""
        self._taken: set[str] = set()
        """Ids of the entries on `scored` that were taken and not removed."""
        self.last_arrival = time.monotonic()
        self.num_failed = 0
        self.num_ended = 0

    async def open(self) -> None:
        """Create the epoch's streams, but those of teachers."""
        job_id, epoch = self._scope.job_id, self._scope.epoch
        await close_epochs(self._redis, self._queue, job_id, through=epoch - 1)
        await self._open(self._prompts, keys.SAMPLERS_GROUP)
        await self._open(self._scored, keys.TRAINERS_GROUP)

    async def open_teachers(self, tasks: Mapping[str, rollout_pb2.TeacherTask]) -> None:
        """Create the streams of teachers that have none yet, and tell them about it."""
        for name, task in tasks.items():
            if name in self._told:
                continue
            stream = keys.rollouts(self._scope.job_id, self._scope.epoch, name)
            await self._open(stream, keys.TEACHERS_GROUP)
            await self._redis.hset(keys.teacher(task.model_sha256), stream, task.SerializeToString())
            await self._redis.sadd(keys.TEACHERS, task.model_sha256)
            self._told.add(name)

    async def _open(self, stream: str, group: str) -> None:
        if await self._queue.open_stream(self._scope, stream, group) is Outcome.CLOSED:
            raise _closed(self._scope)

    async def close(self) -> None:
        """Take the epoch's streams away: late work of others finds them closed."""
        await close_epochs(self._redis, self._queue, self._scope.job_id, through=self._scope.epoch)
        for pending in self._pending.values():
            pending.future.cancel()

    def idle_s(self) -> float:
        """Seconds without a score although groups are in flight."""
        return time.monotonic() - self.last_arrival if self._pending else 0.0

    @property
    def groups_in_flight(self) -> int:
        return len(self._pending)

    async def plan(self, group: rollout_pb2.PromptGroup) -> asyncio.Future[ScoredGroup]:
        """Put a group on the queue; the future completes when each of its samples has ended."""
        wanted = {f"{group.group_id}/{index}" for index in group.sample_indices}
        future = self._expect(group.group_id, group.group, wanted)
        mark = f"plan:{group.group_id}:0"
        if await self._queue.add(self._scope, self._prompts, mark, group.SerializeToString()) is Outcome.CLOSED:
            raise _closed(self._scope)
        failpoint("trainer.planned")
        return future

    def expect(self, group: rollout_pb2.PromptGroup) -> asyncio.Future[ScoredGroup]:
        """A group whose completions the trainer itself brings (`bring`); the future is that of `plan`."""
        return self._expect(group.group_id, group.group, {f"{group.group_id}/{i}" for i in group.sample_indices})

    async def bring(self, rollouts: Sequence[rollout_pb2.Rollout], failure: rollout_pb2.Failure | None = None) -> None:
        """Put completions where a sampler's would go: to their teacher, or to their end if no teacher is asked or they
        could not be had. May be repeated: each arrives once.
        """
        for rollout in rollouts:
            stream, mark = self._scored, f"score:{rollout.sample_id}:0"
            message: Any = rollout_pb2.Score(schema_version=1, rollout=rollout)
            if failure is not None:
                message.failed.CopyFrom(failure)
            elif rollout.score.kind == rollout_pb2.SCORE_KIND_NONE:
                message.none.SetInParent()
            else:
                stream = keys.rollouts(self._scope.job_id, self._scope.epoch, rollout.teacher)
                mark, message = f"rollout:{rollout.sample_id}:0", rollout
            if await self._queue.add(self._scope, stream, mark, message.SerializeToString()) is Outcome.CLOSED:
                raise _closed(self._scope)

    async def rescore(self, group: int, scores: Sequence[rollout_pb2.Score]) -> asyncio.Future[ScoredGroup]:
        """Have journalled rollouts scored again (their payloads were not journalled): replay after a takeover."""
        future = self._expect(f"replay-{group}", group, {score.rollout.sample_id for score in scores})
        for score in scores:
            first = rollout_pb2.Rollout()
            first.CopyFrom(score.rollout)
            first.attempt = 0  # an attempt of this epoch: those of the one before are no fault of the sample
            await self._put_back(first)
        return future

    def _expect(self, name: str, group: int, wanted: set[str]) -> asyncio.Future[ScoredGroup]:
        if not self._pending:
            self.last_arrival = time.monotonic()
        pending = _Pending(group, wanted, asyncio.get_running_loop().create_future())
        self._pending[name] = pending
        for sample_id in wanted:
            self._by_sample[sample_id] = pending
        pending.future.add_done_callback(lambda _: self._forget(name))
        return pending.future

    def _forget(self, name: str) -> None:
        pending = self._pending.pop(name, None)
        for sample_id in pending.wanted if pending else ():
            self._by_sample.pop(sample_id, None)

    async def done(self, samples: Sequence[ScoredSample]) -> None:
        """The samples are journalled: their entries leave the queue."""
        await self._remove([sample.entry for sample in samples if sample.entry is not None])
        for sample in samples:
            sample.entry = None

    async def _remove(self, entries: list[Entry]) -> None:
        await self._queue.ack_delete(entries)
        self._taken.difference_update(entry.id for entry in entries)

    async def run(self) -> None:
        """Take scores from the queue until cancelled.

        consumes:     entries of the stream `scored`
        waits for:    an entry to arrive, at most a second at a time
        produces:     completed futures of groups
        unblocked by: a teacher's hand-over
        """
        is_answer_lost = False
        async with asyncio.TaskGroup() as tasks:
            while True:
                try:
                    entries = await self._claim(is_answer_lost)
                except (RedisError, OSError) as error:
                    self._log.warning("queue server does not answer", error=str(error))
                    is_answer_lost = True
                    await asyncio.sleep(0.5)
                    continue
                is_answer_lost = False
                for entry in entries:
                    self._taken.add(entry.id)
                    tasks.create_task(self._arrive(entry), name=f"arrive {entry.id}")

    async def _claim(self, is_answer_lost: bool) -> list[Entry]:
        """New scores; after a lost answer also those that it delivered, for which nobody else would ask."""
        entries: list[Entry] = []
        if is_answer_lost:
            entries = await self._queue.reclaim(self._scored, keys.TRAINERS_GROUP, self._consumer, 0.0, RECLAIM_COUNT)
        entries += await self._queue.claim([self._scored], keys.TRAINERS_GROUP, self._consumer, CLAIM_COUNT)
        return [entry for entry in entries if entry.id not in self._taken]

    async def _arrive(self, entry: Entry) -> None:
        failpoint("trainer.score_taken")
        score = rollout_pb2.Score.FromString(entry.payload)
        sample = ScoredSample(score, entry)
        pending = self._by_sample.get(sample.sample_id)
        if pending is None or pending.future.done() or sample.sample_id in pending.arrived:
            # nobody waits for it: a group that was given up, or a second score of the same sample
            await self._remove([entry])
            return
        if _is_elsewhere(score):
            try:
                async with self._fetches:
                    await self._fetch(sample)
            except (StillhouseError, RedisError) as error:
                await self._retry_scoring(sample, str(error))
                return
        self._settle(pending, sample)

    def _settle(self, pending: _Pending, sample: ScoredSample) -> None:
        self.last_arrival = time.monotonic()
        self.num_ended += 1
        self.num_failed += sample.is_failed
        pending.arrived[sample.sample_id] = sample
        if pending.arrived.keys() >= pending.wanted and not pending.future.done():
            samples = sorted(pending.arrived.values(), key=lambda sample: sample.score.rollout.index)
            pending.future.set_result(ScoredGroup(pending.group, samples))

    async def _fetch(self, sample: ScoredSample) -> None:
        """Complete a sample with the payload that the teacher holds."""
        score = sample.score
        payload: Payload = getattr(score, score.WhichOneof("result") or "")
        blob = payload.blob
        info = await self._registry.find("teacher", blob.instance)
        peer = self._peers.get(info.address, teacher_pb2_grpc.TeacherServiceStub, f"teacher {blob.instance}")
        request = teacher_pb2.FetchScoreRequest(blob=blob, release=True)
        parts = peer.stream("FetchScore", request, timeout_s=FETCH_TIMEOUT_S)
        data = await collect((part.chunk async for part in parts), blob.size_bytes, sample.sample_id)
        if xxh3(data) != blob.xxh3_128:
            raise WireError(f"sample {sample.sample_id}: the payload does not match its checksum")
        if isinstance(payload, rollout_pb2.HiddenScore):
            sample.hidden = from_bytes(data, payload.dtype, payload.shape)
        else:
            payload.ParseFromString(bytes(data))  # takes the place of the message with the reference

    async def _retry_scoring(self, sample: ScoredSample, error: str) -> None:
        rollout = sample.score.rollout
        self._log.warning("score payload is gone", sample_id=rollout.sample_id, attempt=rollout.attempt, error=error)
        if rollout.attempt + 1 >= MAX_ATTEMPTS:
            failure = rollout_pb2.Failure(
                reason="payload_lost", message=error, service="trainer", attempts=rollout.attempt + 1
            )
            sample.score.failed.CopyFrom(failure)
            pending = self._by_sample.get(sample.sample_id)
            if pending is not None:
                self._settle(pending, sample)
            return
        await asyncio.sleep(RETRY_PAUSES_S[min(rollout.attempt, len(RETRY_PAUSES_S) - 1)])
        await self._put_back(rollout)
        if sample.entry is not None:
            await self._remove([sample.entry])

    async def _put_back(self, rollout: rollout_pb2.Rollout) -> None:
        again = rollout_pb2.Rollout()
        again.CopyFrom(rollout)
        again.attempt += 1
        again.epoch = self._scope.epoch
        stream = keys.rollouts(self._scope.job_id, self._scope.epoch, rollout.teacher)
        mark = f"rollout:{again.sample_id}:{again.attempt}"
        if await self._queue.add(self._scope, stream, mark, again.SerializeToString()) is Outcome.CLOSED:
            raise _closed(self._scope)

    def check_failures(self, max_fraction: float) -> None:
        """Fail the job when too many samples failed.

        Raises:
            JobFailedError: says how many of how many, and the bound.
        """
        if self.num_failed > max_fraction * max(self.num_ended, 1):
            raise JobFailedError(
                f"{self.num_failed} of {self.num_ended} samples failed, more than max_failed_fraction "
                f"{max_fraction:g}; the events of the job name the reasons"
            )


def _is_elsewhere(score: rollout_pb2.Score) -> bool:
    """Its payload is with the teacher: hidden states always are, lists when they are too big for the queue."""
    kind = score.WhichOneof("result")
    return kind == "hidden" or (kind in ("topk", "targets") and getattr(score, kind).HasField("blob"))


def _closed(scope: Scope) -> StillhouseError:
    return LeaseLostError(f"job {scope.job_id}: epoch {scope.epoch} is closed")
