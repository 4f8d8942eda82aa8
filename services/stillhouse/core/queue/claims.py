"""What a worker holds of the queue: claims that stay alive while it works, and go back when it stops.

    taken -> finished (its results are handed over)
          -> handed back (leaving the block)          moved by the worker that took it
          -> lost (we were silent for a lease)        moved by the worker that took it over

Sampler and teacher use it in the same way: `async with Claims(...) as claims: entries = await claims.take(...)`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final, Self

from redis.exceptions import RedisError

from stillhouse.core.errors import StillhouseError
from stillhouse.core.queue.client import BLOCK_MS
from stillhouse.core.queue.streams import Entry, Outcome, QueueBackend, Scope
from stillhouse.core.tasks import cancel_all

RENEWALS_PER_LEASE: Final = 3
"""Claims are renewed so often per `lease_s`: two renewals may fail before another worker takes over."""
NO_WAIT_MS: Final = 1
"""Shortest blocking read (0 would mean for ever)."""
QUEUE_ERRORS: Final = (RedisError, OSError)
"""What a queue server that is gone, restarting or slow looks like."""


class Claims:
    """The entries this worker holds. Renewed in the background; what is left at the end of the block is handed back."""

    def __init__(self, queue: QueueBackend, consumer: str, lease_s: float, log: Any) -> None:
        self._queue = queue
        self._consumer = consumer
        self._lease_s = lease_s
        self._log = log
        self._held: dict[tuple[str, str], Entry] = {}
        self._renewal: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._renewal = asyncio.create_task(self._renew(), name="renew claims")
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._renewal is not None:
            await cancel_all([self._renewal])
        if not self._held:
            return
        try:
            await self._queue.hand_back([_counted(entry, kind) for entry in self._held.values()], self._consumer)
        except QUEUE_ERRORS as error:
            # nothing is lost: the claims run out and another worker takes them
            self._log.warning("claims not handed back", num_entries=len(self._held), error=str(error))

    async def take(self, streams: Sequence[str], group: str, count: int, block_ms: int = BLOCK_MS) -> list[Entry]:
        """Up to `count` new entries; waits up to `block_ms` for the first."""
        return self._hold(await self._queue.claim(streams, group, self._consumer, count, max(block_ms, NO_WAIT_MS)))

    async def take_over(self, stream: str, group: str, count: int) -> list[Entry]:
        """Up to `count` entries that were handed back, or whose holder was silent for a lease."""
        return self._hold(await self._queue.reclaim(stream, group, self._consumer, self._lease_s, count))

    async def append_partial(self, scope: Scope, entry: Entry, num_parts: int, part: bytes) -> Outcome:
        """Keep what the work on the entry has gained: its deliveries count anew."""
        outcome = await self._queue.append_partial(scope, entry, self._consumer, num_parts, part)
        name = (entry.stream, entry.id)
        if outcome is Outcome.DONE and name in self._held:
            self._held[name] = replace(self._held[name], deliveries=1)
        return outcome

    def finish(self, entry: Entry) -> None:
        """Its results are handed over: nothing to renew or hand back."""
        self._held.pop((entry.stream, entry.id), None)

    @property
    def num_held(self) -> int:
        """Entries that this worker holds."""
        return len(self._held)

    def drop(self) -> None:
        """Forget everything: the epoch is closed and its streams are gone."""
        self._held.clear()

    def _hold(self, entries: list[Entry]) -> list[Entry]:
        self._held.update({(entry.stream, entry.id): entry for entry in entries})
        return entries

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(self._lease_s / RENEWALS_PER_LEASE)
            try:
                lost = await self._queue.renew(list(self._held.values()), self._consumer)
            except QUEUE_ERRORS as error:
                self._log.warning("claims not renewed", num_entries=len(self._held), error=str(error))
                continue
            for entry in lost:  # work on it goes on: what it hands over is a duplicate at worst, by its mark
                if self._held.get((entry.stream, entry.id)) is entry:
                    del self._held[(entry.stream, entry.id)]
                    self._log.warning("claim lost: another worker took it over", stream=entry.stream, entry=entry.id)


def _counted(entry: Entry, kind: type[BaseException] | None) -> Entry:
    """The entry as it goes back after an exception of `kind`. One that nobody expects is a crash, and perhaps the
    entry's fault: then its delivery counts, or it would crash one worker after the other for ever. So is a
    cancellation: a worker that stops returns by itself, and one whose computation hangs is cancelled.
    """
    is_crash = kind is not None and not issubclass(kind, (StillhouseError, *QUEUE_ERRORS))
    return replace(entry, deliveries=entry.deliveries + 1) if is_crash else entry
