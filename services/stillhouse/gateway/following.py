"""Followers of jobs' events: each event is read and formatted once, however many follow, and handed to all of them.

One task per process reads all followed jobs by one blocking command on a connection of its own. A follower first reads
the history up to its end and then takes what the task hands out; what it cannot take in time it reads from the history
again. Neither a slow follower nor a new one can miss an event or get it twice.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Final

from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from redis.exceptions import RedisError

from stillhouse.core.errors import NotFoundError
from stillhouse.core.metrics import SSE_FOLLOWERS
from stillhouse.core.queue import keys
from stillhouse.core.queue.jobs import TERMINAL
from stillhouse.core.queue.streams import pairs
from stillhouse.core.service import Context
from stillhouse.gateway.events import is_last, order, parse, read_events
from stillhouse.gateway.views import event_view

BLOCK_MS: Final = 250
"""A read waits so long for events, and so long a job that nobody followed before waits to be part of one."""
LOOK_S: Final = 1.0
"""Time between looks for jobs that have ended without a last event."""
KEEPALIVE_S: Final = 15.0
"""A comment after so much silence, so that proxies do not cut the stream."""
LAST_WORDS_S: Final = 3.0
"""A finished job's record may be a moment ahead of its last event: so long the stream waits for it."""
PAGE: Final = 500
"""Events read at once."""
MOST_HELD: Final = 1000
"""Events that wait for one follower; beyond that it reads them from the history when it gets to it."""


@dataclass(frozen=True, slots=True)
class Piece:
    """An event as it goes over the wire."""

    id: str
    text: bytes
    is_last: bool


@dataclass(eq=False, slots=True)
class Follower:
    """What waits for one stream."""

    held: deque[Piece] = field(default_factory=deque)
    woken: asyncio.Event = field(default_factory=asyncio.Event)
    is_behind: bool = True
    """It reads the history, and goes on here when that has nothing new."""
    is_over: bool = False
    """Nothing will come any more."""

    def offer(self, pieces: list[Piece]) -> None:
        if len(self.held) + len(pieces) > MOST_HELD:
            self.held.clear()
            self.is_behind = True
        else:
            self.held.extend(pieces)
        self.woken.set()

    def end(self) -> None:
        self.is_over = True
        self.woken.set()


@dataclass(eq=False, slots=True)
class Tail:
    """A followed job."""

    followers: set[Follower] = field(default_factory=set)
    position: str | None = None
    """Id of the last event that was handed out; None until that is asked for."""
    ended_at: float | None = None
    """When its record was first seen to be final."""


class Tails:
    """The followed jobs of a process."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self._tails: dict[str, Tail] = {}
        self._task: asyncio.Task[None] | None = None
        self._looked_at = 0.0

    async def stream(self, job_id: str, after: str) -> AsyncIterator[bytes]:
        """Server-sent events from `after` on, until the job's last one.

        waits for:    new events
        produces:     each event once, in order; its SSE id is its id, so that Last-Event-ID resumes exactly
        unblocked by: the job's last event; the job being finished for LAST_WORDS_S; shutdown or a lost queue server,
                      after which the client reconnects, perhaps to another replica
        """
        follower = Follower()
        tail = self._tails.setdefault(job_id, Tail())
        SSE_FOLLOWERS.inc()
        tail.followers.add(follower)  # before the history is read: what comes meanwhile is held
        try:
            await self._start(job_id, tail)
            while not follower.is_over:
                pieces = await self._next(job_id, follower, after)
                if pieces:
                    after = pieces[-1].id
                    yield b"".join(piece.text for piece in pieces)
                    if pieces[-1].is_last:
                        return
                elif not await _wait(follower):
                    yield KEEPALIVE_COMMENT
        except (RedisError, OSError, NotFoundError) as error:
            self._ctx.log.warning("event stream cut", job_id=job_id, error=str(error))
        finally:
            SSE_FOLLOWERS.dec()
            tail.followers.discard(follower)
            if not tail.followers and self._tails.get(job_id) is tail:
                del self._tails[job_id]

    async def _start(self, job_id: str, tail: Tail) -> None:
        if tail.position is None:  # from the newest event, whatever the follower knows: others may join
            newest: Any = await self._ctx.redis.xrevrange(keys.events(job_id), count=1)
            tail.position = tail.position or (newest[0][0].decode() if newest else "0-0")
        if self._task is None:
            self._task = asyncio.create_task(self._read(), name="followed events")

    async def _next(self, job_id: str, follower: Follower, after: str) -> list[Piece]:
        """The follower's next events, up to the job's last; none = it has them all."""
        if follower.is_behind:
            follower.is_behind = False  # unless too much comes while we read
            pieces = [_piece(event) for event in await read_events(self._ctx, job_id, after, PAGE)]
            follower.is_behind |= len(pieces) == PAGE
        else:
            pieces = [piece for piece in follower.held if order(piece.id) > order(after)]
            follower.held.clear()
        last = next((index for index, piece in enumerate(pieces) if piece.is_last), len(pieces))
        return pieces[: last + 1]

    async def _read(self) -> None:
        """Hand out events while anybody follows.

        consumes:     the event streams of all followed jobs
        unblocked by: BLOCK_MS; no follower; shutdown; an error of the queue server, which ends all streams
        """
        try:
            while not self._ctx.stop.is_set():
                started = {keys.events(job_id): tail for job_id, tail in self._started()}
                if not started:
                    return
                positions: dict[Any, Any] = {key: tail.position for key, tail in started.items()}
                answer: Any = await self._ctx.blocking.xread(positions, count=PAGE, block=BLOCK_MS)
                for key, entries in pairs(answer):
                    _hand_out(started[key.decode()], entries)
                await self._look_for_ends()
        except (RedisError, OSError) as error:
            self._ctx.log.warning("followed events cannot be read", error=str(error))
        finally:
            self._task = None
            for job_id, tail in self._started():
                del self._tails[job_id]
                for follower in tail.followers:
                    follower.end()

    def _started(self) -> list[tuple[str, Tail]]:
        return [(job_id, tail) for job_id, tail in self._tails.items() if tail.position is not None]

    async def _look_for_ends(self) -> None:
        """End the streams of jobs that are finished, or gone, and have said nothing about it."""
        now = time.monotonic()
        if now - self._looked_at < LOOK_S:
            return
        self._looked_at = now
        started = self._started()
        async with self._ctx.redis.pipeline(transaction=False) as at_once:
            for job_id, _ in started:
                at_once.hget(keys.job(job_id), "status")
            statuses = await at_once.execute()
        for (_, tail), status in zip(started, statuses, strict=True):
            if status is not None and status.decode() not in TERMINAL:
                tail.ended_at = None
            elif tail.ended_at is None:
                tail.ended_at = now
            elif now - tail.ended_at > LAST_WORDS_S:
                for follower in tail.followers:
                    follower.end()


async def _wait(follower: Follower) -> bool:
    """Until there is something for a follower; False = it was silent for KEEPALIVE_S."""
    try:
        async with asyncio.timeout(KEEPALIVE_S):
            await follower.woken.wait()
    except TimeoutError:
        return False
    follower.woken.clear()
    return True


def _hand_out(tail: Tail, entries: list[Any]) -> None:
    pieces = [_piece(parse(*entry)) for entry in entries]
    tail.position = pieces[-1].id
    for follower in tail.followers:
        follower.offer(pieces)


def _piece(event: dict[str, Any]) -> Piece:
    text = format_sse_event(data_str=event_view(event).model_dump_json(), event=event["type"], id=event["id"])
    return Piece(event["id"], text, is_last(event))
