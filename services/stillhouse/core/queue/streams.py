"""The work queue: Redis Streams with consumer groups, where nothing is lost and nothing counts twice.

Life of an entry:  added -> claimed (pending) -> handed over | failed        moved by whoever holds the claim
                              ^      |
                              |      +- holder dies or hands back: claimable again after `lease_s`, or at once

* A result and the removal of its source are ONE script (`hand_over`), which also checks that the epoch is still open
  and that this (stage, sample id, attempt) was not handed over before. So a crash leaves the source or the result.
* A holder renews its claims (`renew`); who is silent for `lease_s` loses them to whoever asks next (`reclaim`).
  Renewing and handing back touch only what is still the holder's: who wakes up late takes nothing back.
* What a worker has of an entry so far may lie beside it (`append_partial`): whoever holds it next goes on from there.
* A server that is out of memory refuses a script at its first write, so that a hand-over is done or not done there too.
* Work streams are never trimmed. Entries leave by acknowledge-and-delete only, so XLEN is the work outstanding.

Every operation may be repeated after a lost reply, except `claim`: what it delivered stays pending for its consumer,
who finds it again by `reclaim`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, Protocol

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from stillhouse.core.errors import TooLargeError
from stillhouse.core.queue import keys, scripts
from stillhouse.core.queue.client import BLOCK_MS, text

PAYLOAD: Final = "p"
"""Field of an entry that holds the serialized message."""
MAX_ENTRY_BYTES: Final = 1 << 20
"""Largest entry: bulk goes from service to service, never through the queue."""
MAX_DELIVERIES: Final = 5
"""Deliveries of an entry before it is given up: five crashes in a row on the same sample are its own fault."""
SUSPECT_DELIVERIES: Final = 2
"""After so many, an entry is worked on alone: if it is what ends its workers, it takes no others along."""
HAND_BACK_CONSUMER: Final = "handback"
HAND_BACK_IDLE_MS: Final = 86_400_000
"""Idle time given to entries that are handed back: a day, so that any reclaim finds them at once."""


class Outcome(StrEnum):
    """What a hand-over did."""

    DONE = "DONE"
    """The result was added."""
    DUPLICATE = "DUP"
    """It had been handed over before; nothing was added, the source is gone."""
    CLOSED = "CLOSED"
    """The epoch is closed; nothing was done. Drop the work."""
    LOST = "LOST"
    """The claim is another worker's by now; nothing was done. Leave the work to it."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A claimed entry of a stream."""

    stream: str
    group: str
    id: str
    payload: bytes
    deliveries: int = 1
    """How often it was delivered since it last made progress, this time included."""
    was_held: bool = False
    """Another worker held it before: it may have begun."""

    @property
    def is_exhausted(self) -> bool:
        """Delivered too often: give it up instead of trying again."""
        return self.deliveries > MAX_DELIVERIES

    @property
    def is_suspect(self) -> bool:
        """Its last workers died with it in their hands, among other entries."""
        return self.deliveries > SUSPECT_DELIVERIES


@dataclass(frozen=True, slots=True)
class Scope:
    """A job under one claim: what fences all work."""

    job_id: str
    epoch: int


class QueueBackend(Protocol):
    """What the services need of a queue; `WorkQueue` is the real one, tests have one in memory."""

    async def open_stream(self, scope: Scope, stream: str, group: str) -> Outcome:
        """Create a work stream of the epoch and its consumer group (from the first entry on)."""
        ...

    async def add(self, scope: Scope, stream: str, mark: str, payload: bytes) -> Outcome:
        """Add an entry once; `mark` names it within the epoch."""
        ...

    async def claim(
        self, streams: Sequence[str], group: str, consumer: str, count: int, block_ms: int = BLOCK_MS
    ) -> list[Entry]:
        """New entries of the streams; waits up to `block_ms` for the first."""
        ...

    async def reclaim(self, stream: str, group: str, consumer: str, min_idle_s: float, count: int) -> list[Entry]:
        """Entries whose holder was silent for `min_idle_s`, or which were handed back."""
        ...

    async def renew(self, entries: Iterable[Entry], consumer: str) -> list[Entry]:
        """Show that the holder of the claims is alive; gives those that are no longer its own, which stay untouched."""
        ...

    async def hand_over(
        self,
        scope: Scope,
        source: Entry,
        target: str,
        mark: str,
        payload: bytes,
        *,
        last: bool = True,
        dead: bytes = b"",
    ) -> Outcome:
        """Add a result and, if `last`, remove its source, in one step. `dead` also goes to the dead-letter stream."""
        ...

    async def append_partial(self, scope: Scope, source: Entry, consumer: str, num_parts: int, part: bytes) -> Outcome:
        """Keep what the work on a claimed entry has gained, beside `num_parts` parts that are there.

        Its deliveries count anew. All parts are gone once the entry is, or with the epoch.
        """
        ...

    async def partials(self, source: Entry) -> list[bytes]:
        """The parts of a claimed entry, in order."""
        ...

    async def hand_back(self, entries: Iterable[Entry], consumer: str) -> None:
        """Return claims unfinished: the next reclaim finds them at once, and the delivery does not count.

        What another consumer took over meanwhile stays with it.
        """
        ...

    async def ack_delete(self, entries: Sequence[Entry]) -> int:
        """Remove entries whose content is durable elsewhere or of no use, and what lies beside them; returns how many
        were still there.
        """
        ...

    async def length(self, stream: str) -> int:
        """Work outstanding: entries waiting or claimed."""
        ...

    async def waiting(self, streams: Sequence[str], group: str, min_idle_s: float) -> dict[str, int]:
        """Work that a worker could claim or take over, by stream; at least 1 where there is any. Streams that are gone
        are left out.
        """
        ...

    async def close_epoch(self, scope: Scope) -> None:
        """Delete all streams and marks of the epoch."""
        ...

    async def marked(self, scope: Scope, marks: Sequence[str]) -> set[str]:
        """Those of `marks` under which something was handed over."""
        ...


class WorkQueue:
    """`QueueBackend` on Redis 7.0 commands (Valkey 8 and 9 too)."""

    def __init__(self, redis: Redis, blocking: Redis) -> None:
        self._redis = redis
        self._blocking = blocking
        self._open_stream = redis.register_script(scripts.OPEN_STREAM)
        self._add = redis.register_script(scripts.ADD)
        self._hand_over = redis.register_script(scripts.HAND_OVER)
        self._append_partial = redis.register_script(scripts.APPEND_PARTIAL)
        self._renew = redis.register_script(scripts.RENEW)
        self._hand_back = redis.register_script(scripts.HAND_BACK)
        self._ack_delete = redis.register_script(scripts.ACK_DELETE)
        self._close_epoch = redis.register_script(scripts.CLOSE_EPOCH)
        self._waiting = redis.register_script(scripts.WAITING)

    async def open_stream(self, scope: Scope, stream: str, group: str) -> Outcome:
        record, streams = keys.job(scope.job_id), keys.streams(scope.job_id, scope.epoch)
        return _outcome(await self._open_stream(keys=[record, streams, stream], args=[scope.epoch, group]))

    async def add(self, scope: Scope, stream: str, mark: str, payload: bytes) -> Outcome:
        _check_size(stream, payload)
        record, marks = keys.job(scope.job_id), keys.marks(scope.job_id, scope.epoch)
        streams = keys.streams(scope.job_id, scope.epoch)
        return _outcome(await self._add(keys=[record, marks, stream, streams], args=[scope.epoch, mark, payload]))

    async def claim(
        self, streams: Sequence[str], group: str, consumer: str, count: int, block_ms: int = BLOCK_MS
    ) -> list[Entry]:
        if not streams or count < 1:
            return []
        wanted: dict[Any, Any] = dict.fromkeys(streams, ">")
        try:
            answer = await self._blocking.xreadgroup(group, consumer, wanted, count=count, block=block_ms)
        except ResponseError as error:
            if "NOGROUP" in str(error):  # the epoch was closed meanwhile; whoever asks in a loop must not spin
                await asyncio.sleep(block_ms / 1000)
                return []
            raise
        return [
            Entry(text(stream), group, text(entry_id), fields[PAYLOAD.encode()])
            for stream, entries in pairs(answer)
            for entry_id, fields in entries
        ]

    async def reclaim(self, stream: str, group: str, consumer: str, min_idle_s: float, count: int) -> list[Entry]:
        found: list[Entry] = []
        cursor = "0-0"
        while len(found) < count:
            try:
                answer: Any = await self._redis.xautoclaim(
                    stream, group, consumer, int(min_idle_s * 1000), start_id=cursor, count=count - len(found)
                )
            except ResponseError as error:
                if "NOGROUP" in str(error):
                    return found
                raise
            cursor = text(answer[0])
            for entry_id, fields in answer[1]:
                pending: Any = await self._redis.xpending_range(stream, group, entry_id, entry_id, 1)
                deliveries = int(pending[0]["times_delivered"]) if pending else 1
                found.append(Entry(stream, group, text(entry_id), fields[PAYLOAD.encode()], deliveries, was_held=True))
            if cursor == "0-0":
                break
        return found

    async def renew(self, entries: Iterable[Entry], consumer: str) -> list[Entry]:
        lost: list[Entry] = []
        for (stream, group), held in _by_stream(entries).items():
            answer: Any = await self._renew(keys=[stream], args=[group, consumer, *(entry.id for entry in held)])
            ids = {text(entry_id) for entry_id in answer}
            lost += [entry for entry in held if entry.id in ids]
        return lost

    async def hand_over(
        self,
        scope: Scope,
        source: Entry,
        target: str,
        mark: str,
        payload: bytes,
        *,
        last: bool = True,
        dead: bytes = b"",
    ) -> Outcome:
        _check_size(target, payload)
        job_id, epoch = scope.job_id, scope.epoch
        return _outcome(
            await self._hand_over(
                keys=[
                    keys.job(job_id),
                    keys.marks(job_id, epoch),
                    target,
                    source.stream,
                    keys.dead(job_id, epoch),
                    keys.streams(job_id, epoch),
                    keys.partial(source.stream, source.id),
                    keys.partials(job_id, epoch),
                ],
                args=[epoch, mark, payload, source.group, source.id if last else "", dead],
            )
        )

    async def append_partial(self, scope: Scope, source: Entry, consumer: str, num_parts: int, part: bytes) -> Outcome:
        partial = keys.partial(source.stream, source.id)
        _check_size(partial, part)
        record, streams = keys.job(scope.job_id), keys.streams(scope.job_id, scope.epoch)
        return _outcome(
            await self._append_partial(
                keys=[record, streams, source.stream, partial, keys.partials(scope.job_id, scope.epoch)],
                args=[scope.epoch, source.group, source.id, consumer, num_parts, part],
            )
        )

    async def partials(self, source: Entry) -> list[bytes]:
        found: Any = await self._redis.lrange(keys.partial(source.stream, source.id), 0, -1)  # type: ignore[misc]
        return list(found)

    async def hand_back(self, entries: Iterable[Entry], consumer: str) -> None:
        for (stream, group), held in _by_stream(entries).items():
            # the reclaim that follows counts one up again
            counts = [part for entry in held for part in (entry.id, max(entry.deliveries - 1, 0))]
            await self._hand_back(keys=[stream], args=[group, consumer, HAND_BACK_CONSUMER, HAND_BACK_IDLE_MS, *counts])

    async def ack_delete(self, entries: Sequence[Entry]) -> int:
        removed = 0
        for (stream, group), held in _by_stream(entries).items():
            ids = [entry.id for entry in held]
            beside = [keys.partials_beside(stream), *(keys.partial(stream, entry_id) for entry_id in ids)]
            removed += int(await self._ack_delete(keys=[stream, *beside], args=[group, *ids]))
        return removed

    async def length(self, stream: str) -> int:
        return int(await self._redis.xlen(stream))

    async def waiting(self, streams: Sequence[str], group: str, min_idle_s: float) -> dict[str, int]:
        if not streams:
            return {}
        answer: Any = await self._waiting(keys=list(streams), args=[group, int(min_idle_s * 1000)])
        return {stream: int(count) for stream, count in zip(streams, answer, strict=True) if int(count) >= 0}

    async def close_epoch(self, scope: Scope) -> None:
        job_id, epoch = scope.job_id, scope.epoch
        sets = [keys.streams(job_id, epoch), keys.partials(job_id, epoch)]
        await self._close_epoch(keys=[*sets, keys.marks(job_id, epoch), keys.dead(job_id, epoch)])

    async def marked(self, scope: Scope, marks: Sequence[str]) -> set[str]:
        """Those of `marks` under which something was handed over."""
        if not marks:
            return set()
        found: Any = await self._redis.hmget(keys.marks(scope.job_id, scope.epoch), list(marks))
        return {mark for mark, value in zip(marks, found, strict=True) if value is not None}


def _check_size(stream: str, payload: bytes) -> None:
    if len(payload) > MAX_ENTRY_BYTES:
        raise TooLargeError(f"entry of {len(payload)} bytes for {stream}; the queue takes at most {MAX_ENTRY_BYTES}")


def _by_stream(entries: Iterable[Entry]) -> dict[tuple[str, str], list[Entry]]:
    grouped: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        grouped.setdefault((entry.stream, entry.group), []).append(entry)
    return grouped


def pairs(answer: Any) -> Iterable[tuple[Any, Any]]:
    """XREAD and XREADGROUP answer a list of pairs in RESP2 and a mapping in RESP3."""
    if not answer:
        return []
    if isinstance(answer, Mapping):
        return [
            (stream, entries[0] if entries and isinstance(entries[0], list) else entries)
            for stream, entries in answer.items()
        ]
    return answer


def _outcome(answer: Any) -> Outcome:
    return Outcome(text(answer))
