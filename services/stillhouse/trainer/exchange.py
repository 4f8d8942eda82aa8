"""The loop's view of samplers and teachers: `start` a group, get it back scored. Over the queue of one epoch.

A sample's life here:  planned -> waiting -> arrived (score, payload fetched) -> handed to the loop with its group
                                     ^          |
                                     +----------+  payload gone with its teacher: put back for scoring, attempt + 1

A sample that a mixture of teachers judges comes back from the first of them; then it goes to all others at once. It
ends when each has answered, or with the first failure.

Bulk never crosses the queue: hidden states are fetched from the teacher that holds them, as soon as the score arrives.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

from redis.exceptions import OutOfMemoryError, RedisError

from stillhouse.core import tracing
from stillhouse.core.blobs import xxh3
from stillhouse.core.errors import JobFailedError, LeaseLostError, StillhouseError, WireError
from stillhouse.core.failpoints import failpoint
from stillhouse.core.queue import keys
from stillhouse.core.queue.epochs import close_epochs
from stillhouse.core.queue.registry import Registry
from stillhouse.core.queue.streams import Entry, Outcome, QueueBackend, Scope
from stillhouse.core.rollouts import rollout_for, rollout_mark, sample_id, score_mark, scores_of
from stillhouse.core.rpc import Peers, collect
from stillhouse.core.tensors import from_bytes
from stillhouse.trainer.again import RETRY_STRIDE, alone, attempted, mark_again, why_not
from stillhouse.trainer.scored import PendingGroup, ScoredGroup, ScoredSample
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
FULL_PAUSE_S: Final = 2.0
"""Pause before a full queue server is asked again."""
RETRY_PAUSES_S: Final = (0.0, 1.0, 4.0, 10.0)
"""Pause before the next attempt, by attempt: a teacher that died costs nothing, a link that is down for a while no
sample."""


Payload = rollout_pb2.HiddenScore | rollout_pb2.TopKScore | rollout_pb2.TargetsScore
"""Scores that may stay with the teacher until they are fetched."""


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
        self._pending: dict[str, PendingGroup] = {}
        self._by_sample: dict[str, PendingGroup] = {}
        self._collected: dict[str, PendingGroup] = {}
        """Sample -> its group, complete, whose step is not put together yet."""
        self._attempts: Counter[str] = Counter()
        """Sample -> times that a user had it tried again: each has marks of its own."""
        self._fetches = asyncio.Semaphore(FETCH_CONCURRENCY)
        self._scored = keys.scored(scope.job_id, scope.epoch)
        self._prompts = keys.prompts(scope.job_id, scope.epoch)
        self._told: set[str] = set()
        """Teachers that have a stream of rollouts."""
        self._taken: set[str] = set()
        """Ids of the entries on `scored` that were taken and not removed."""
        self.last_arrival = time.monotonic()
        self.num_failed = 0
        self.last_failure = rollout_pb2.Failure()
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
        with tracing.span("plan", kind="producer", attributes=tracing.SENT_PROMPTS, group=group.group_id):
            group.traceparent = tracing.traceparent()
            future = self.expect(group, for_samplers=True)
            await self._add(self._prompts, f"plan:{group.group_id}:0", group)
        failpoint("trainer.planned")
        return future

    def expect(self, group: rollout_pb2.PromptGroup, *, for_samplers: bool = False) -> asyncio.Future[ScoredGroup]:
        """A group whose completions the trainer itself brings (`bring`); the future is that of `plan`."""
        is_scored = group.score.kind != rollout_pb2.SCORE_KIND_NONE
        further = list(group.further) if is_scored else []
        teachers = [group.teacher, *(other.teacher for other in further)]
        wanted = {sample_id(group, index): teachers for index in group.sample_indices}
        message = group if for_samplers else None
        is_measured = group.purpose == rollout_pb2.PURPOSE_EVALUATE
        pending = PendingGroup(group.group_id, group.group, wanted, further, message=message, is_measured=is_measured)
        return self._expect(pending)

    async def bring(self, rollouts: Sequence[rollout_pb2.Rollout], failure: rollout_pb2.Failure | None = None) -> None:
        """Put completions where a sampler's would go: to their teacher, or to their end if no teacher is asked or they
        could not be had. May be repeated: each arrives once.
        """
        for rollout in rollouts:
            if failure is None and rollout.score.kind != rollout_pb2.SCORE_KIND_NONE:
                await self._ask(rollout)
                continue
            end = rollout_pb2.Score(schema_version=1, rollout=rollout)
            if failure is not None:
                end.failed.CopyFrom(failure)
            else:
                end.none.SetInParent()
            await self._add(self._scored, score_mark(rollout.sample_id, rollout.teacher), end)

    async def rescore(self, group: int, scores: Sequence[rollout_pb2.Score]) -> asyncio.Future[ScoredGroup]:
        """Have journalled rollouts scored again (their payloads were not journalled): replay after a takeover."""
        wanted = {s.rollout.sample_id: [each.rollout.teacher for each in scores_of(s)] for s in scores}
        future = self._expect(PendingGroup(f"replay-{group}", group, wanted, (), is_journalled=True))
        for score in scores:
            for each in scores_of(score):
                # attempts count anew: those of the epoch before are no fault of the sample
                await self._put_back(rollout_for(score.rollout, each.rollout))
        return future

    def _expect(self, pending: PendingGroup) -> asyncio.Future[ScoredGroup]:
        if not self._pending:
            self.last_arrival = time.monotonic()
        self._wait_for(pending)
        pending.future.add_done_callback(lambda _: self._forget(pending))
        return pending.future

    def _wait_for(self, pending: PendingGroup) -> None:
        self._pending[pending.name] = pending
        for each in pending.wanted:
            self._by_sample[each] = pending

    def _forget(self, pending: PendingGroup) -> None:
        """Nothing is in flight for a group; one that is collected for a step may still be tried again."""
        if not (pending.complete.is_set() or pending.future.cancelled()):  # tried again in this very moment
            return
        self._pending.pop(pending.name, None)
        is_kept = not (pending.is_journalled or pending.is_measured or pending.future.cancelled())
        for each in pending.wanted:
            self._by_sample.pop(each, None)
            if is_kept:
                self._collected[each] = pending

    async def settled(self, groups: Sequence[ScoredGroup]) -> None:
        """Wait until none of the groups' samples is being tried again; from now on none will be."""
        names = {sample.sample_id for group in groups for sample in group.samples}
        found = [self._by_sample.get(name) or self._collected.get(name) for name in names]
        while trying := [pending for pending in found if pending is not None and not pending.complete.is_set()]:
            await trying[0].complete.wait()
        for name in names:
            self._collected.pop(name, None)

    async def retry(self, sample_id: str) -> str:
        """Have a sample that failed tried again as a new attempt; gives why not, for people, or ''.

        What failed with its completion is scored again, what has none is written again. A sample stays failed if the
        queue does not take it: then a later attempt has other marks, and whatever comes of this one is late.
        """
        pending = self._by_sample.get(sample_id) or self._collected.get(sample_id)
        failed = None if pending is None else pending.arrived.get(sample_id)
        reason = why_not(pending, failed)
        if reason or pending is None or failed is None:
            return reason
        self._attempts[sample_id] += 1
        attempt = failed.score.rollout.attempt + RETRY_STRIDE * self._attempts[sample_id]
        pending.reopen(failed)
        self._wait_for(pending)
        mark_again(failed.score.rollout, attempt)
        self.num_ended -= 1
        self.num_failed -= 1
        try:
            if failed.score.rollout.completion_ids.data:
                await self._ask(attempted(failed.score.rollout, attempt, self._scope.epoch))
            else:
                group = alone(pending.message, failed.score.rollout, attempt)
                await self._add(self._prompts, f"plan:{sample_id}:{attempt}", group)
        except BaseException:
            await self._settle(pending, failed)
            raise
        self._log.info("sample is tried again", sample_id=sample_id, attempt=attempt)
        await self._remove(failed.entries)
        return ""

    async def done(self, samples: Sequence[ScoredSample]) -> None:
        """The samples are journalled: their entries leave the queue."""
        await self._remove([entry for sample in samples for entry in sample.entries])
        for sample in samples:
            sample.entries.clear()
            self._collected.pop(sample.sample_id, None)

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
        answer = ScoredSample(score, [entry])
        pending = self._by_sample.get(answer.sample_id)
        if pending is None or not pending.waits_for(answer):
            # nobody waits for it: a group that was given up, or a second word of the same teacher
            await self._remove([entry])
            return
        await self._ask_others(pending, score)
        if _is_elsewhere(score):
            try:
                async with self._fetches:
                    await self._fetch(answer)
            except (StillhouseError, RedisError) as error:
                await self._retry_scoring(pending, answer, str(error))
                return
        await self._settle(pending, answer)

    async def _ask_others(self, pending: PendingGroup, score: rollout_pb2.Score) -> None:
        """The first teacher has answered, so the completion is there for the others of its mixture. May be repeated."""
        is_first = score.rollout.teacher not in [other.teacher for other in pending.further]
        if is_first and score.WhichOneof("result") != "failed":
            for other in pending.further:
                await self._ask(rollout_for(score.rollout, other))

    async def _settle(self, pending: PendingGroup, answer: ScoredSample) -> None:
        """A teacher has said its word on a sample."""
        if not pending.waits_for(answer):  # it has ended while the payload was fetched
            await self._remove(answer.entries)
            return
        self.last_arrival = time.monotonic()
        sample = pending.take(answer)
        if sample is not None:
            self.num_ended += 1
            if sample.is_failed:
                self.num_failed, self.last_failure = self.num_failed + 1, sample.score.failed
            if pending.future.done():
                self._forget(pending)

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
            sample.hidden[sample.teacher] = from_bytes(data, payload.dtype, payload.shape)
        else:
            payload.ParseFromString(bytes(data))  # takes the place of the message with the reference

    async def _retry_scoring(self, pending: PendingGroup, sample: ScoredSample, error: str) -> None:
        rollout = sample.score.rollout
        self._log.warning("score payload is gone", sample_id=rollout.sample_id, attempt=rollout.attempt, error=error)
        if rollout.attempt % RETRY_STRIDE + 1 >= MAX_ATTEMPTS:
            failure = rollout_pb2.Failure(
                reason="payload_lost", message=error, service="trainer", attempts=rollout.attempt + 1
            )
            sample.score.failed.CopyFrom(failure)
            await self._settle(pending, sample)
            return
        await asyncio.sleep(RETRY_PAUSES_S[min(rollout.attempt % RETRY_STRIDE, len(RETRY_PAUSES_S) - 1)])
        await self._put_back(rollout)
        await self._remove(sample.entries)

    async def _put_back(self, rollout: rollout_pb2.Rollout) -> None:
        mark_again(rollout, rollout.attempt + 1)
        await self._ask(attempted(rollout, rollout.attempt + 1, self._scope.epoch))

    async def _ask(self, rollout: rollout_pb2.Rollout) -> None:
        """Put a rollout on the stream of its teacher, once in each attempt; waits while the queue server is full.

        Not by `Space.insist`: this runs beside the loop, which may only be interrupted between steps. Whoever ends the
        claim ends the waiting.
        """
        stream = keys.rollouts(self._scope.job_id, self._scope.epoch, rollout.teacher)
        mark = rollout_mark(rollout.sample_id, rollout.teacher, rollout.attempt)
        while True:
            try:
                return await self._add(stream, mark, rollout)
            except OutOfMemoryError as error:
                self._log.error("no room to ask a teacher", sample_id=rollout.sample_id, error=str(error))
                await asyncio.sleep(FULL_PAUSE_S)

    async def _add(self, stream: str, mark: str, message: Any) -> None:
        if await self._queue.add(self._scope, stream, mark, message.SerializeToString()) is Outcome.CLOSED:
            raise _closed(self._scope)

    def check_failures(self, max_fraction: float) -> None:
        """Fail the job when too many samples failed.

        Raises:
            JobFailedError: says how many of how many, and the bound.
        """
        if self.num_failed > max_fraction * max(self.num_ended, 1):
            last = self.last_failure
            raise JobFailedError(
                f"{self.num_failed} of {self.num_ended} samples failed, over max_failed_fraction {max_fraction:g}; "
                f"the last one by the {last.service}, {last.reason}: {last.message}; see the events sample.failed"
            )


def _is_elsewhere(score: rollout_pb2.Score) -> bool:
    """Its payload is with the teacher: hidden states always are, lists when they are too big for the queue."""
    kind = score.WhichOneof("result")
    return kind == "hidden" or (kind in ("topk", "targets") and getattr(score, kind).HasField("blob"))


def _closed(scope: Scope) -> StillhouseError:
    return LeaseLostError(f"job {scope.job_id}: epoch {scope.epoch} is closed")
