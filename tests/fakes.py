"""Small honest machines in place of real services: they follow rules, not scripts."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from stillhouse.core.queue import keys
from stillhouse.core.queue.streams import HAND_BACK_CONSUMER, Entry, Outcome, Scope


@dataclass
class _Claim:
    consumer: str
    since: float
    deliveries: int


@dataclass
class _Stream:
    entries: dict[int, bytes] = field(default_factory=dict)
    next_id: int = 1
    groups: dict[str, dict[int, _Claim]] = field(default_factory=dict)
    delivered_to: dict[str, int] = field(default_factory=dict)


class MemoryQueue:
    """`QueueBackend` in memory, with the semantics of the real one; runs the same contract suite."""

    def __init__(self) -> None:
        self.epochs: dict[str, int] = {}
        self._streams: dict[str, _Stream] = {}
        self._marks: dict[tuple[str, int], set[str]] = {}
        self._of_epoch: dict[tuple[str, int], set[str]] = {}
        self._partials: dict[tuple[str, str], list[bytes]] = {}

    def set_epoch(self, job_id: str, epoch: int) -> None:
        """What a claim of the job does to its record."""
        self.epochs[job_id] = epoch

    def _is_closed(self, scope: Scope) -> bool:
        return self.epochs.get(scope.job_id) != scope.epoch

    async def open_stream(self, scope: Scope, stream: str, group: str) -> Outcome:
        if self._is_closed(scope):
            return Outcome.CLOSED
        self._of_epoch.setdefault((scope.job_id, scope.epoch), set()).add(stream)
        held = self._streams.setdefault(stream, _Stream())
        held.groups.setdefault(group, {})
        held.delivered_to.setdefault(group, 0)
        return Outcome.DONE

    async def add(self, scope: Scope, stream: str, mark: str, payload: bytes) -> Outcome:
        if self._is_closed(scope) or stream not in self._of_epoch.get((scope.job_id, scope.epoch), ()):
            return Outcome.CLOSED
        marks = self._marks.setdefault((scope.job_id, scope.epoch), set())
        if mark in marks:
            return Outcome.DUPLICATE
        marks.add(mark)
        held = self._streams.setdefault(stream, _Stream())
        held.entries[held.next_id] = payload
        held.next_id += 1
        return Outcome.DONE

    async def claim(
        self, streams: Sequence[str], group: str, consumer: str, count: int, block_ms: int = 0
    ) -> list[Entry]:
        found: list[Entry] = []
        for stream in streams:
            held = self._streams.get(stream)
            if held is None or group not in held.groups:
                continue
            fresh = [number for number in sorted(held.entries) if number > held.delivered_to[group]]
            for number in fresh[:count]:
                held.groups[group][number] = _Claim(consumer, time.monotonic(), 1)
                held.delivered_to[group] = number
                found.append(Entry(stream, group, str(number), held.entries[number]))
        return found

    async def reclaim(self, stream: str, group: str, consumer: str, min_idle_s: float, count: int) -> list[Entry]:
        held = self._streams.get(stream)
        found: list[Entry] = []
        for number, claim in sorted(held.groups.get(group, {}).items()) if held else ():
            if len(found) < count and time.monotonic() - claim.since >= min_idle_s:
                claim.consumer, claim.since, claim.deliveries = consumer, time.monotonic(), claim.deliveries + 1
                assert held is not None
                found.append(Entry(stream, group, str(number), held.entries[number], claim.deliveries, was_held=True))
        return found

    async def renew(self, entries: Iterable[Entry], consumer: str) -> list[Entry]:
        lost: list[Entry] = []
        for entry in entries:
            claim = self._claim(entry)
            if claim is None or claim.consumer != consumer:
                lost.append(entry)
            else:
                claim.since = time.monotonic()
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
        outcome = await self.add(scope, target, mark, payload)
        if outcome is Outcome.CLOSED:
            return outcome
        if dead and outcome is Outcome.DONE:
            letters = self._streams.setdefault(keys.dead(scope.job_id, scope.epoch), _Stream())
            letters.entries[letters.next_id] = dead
            letters.next_id += 1
        if last:
            await self.ack_delete([source])
        return outcome

    async def append_partial(self, scope: Scope, source: Entry, consumer: str, num_parts: int, part: bytes) -> Outcome:
        if self._is_closed(scope) or source.stream not in self._of_epoch.get((scope.job_id, scope.epoch), ()):
            return Outcome.CLOSED
        claim = self._claim(source)
        if claim is None or claim.consumer != consumer:
            return Outcome.LOST
        parts = self._partials.setdefault((source.stream, source.id), [])
        if len(parts) == num_parts + 1 and parts[-1] == part:
            return Outcome.DONE
        if len(parts) != num_parts:
            return Outcome.LOST
        parts.append(part)
        claim.since, claim.deliveries = time.monotonic(), 1
        return Outcome.DONE

    async def partials(self, source: Entry) -> list[bytes]:
        return list(self._partials.get((source.stream, source.id), ()))

    async def hand_back(self, entries: Iterable[Entry], consumer: str) -> None:
        for entry in entries:
            claim = self._claim(entry)
            if claim is not None and claim.consumer == consumer:
                claim.consumer, claim.since = HAND_BACK_CONSUMER, float("-inf")
                claim.deliveries = entry.deliveries - 1

    async def ack_delete(self, entries: Sequence[Entry]) -> int:
        removed = 0
        for entry in entries:
            held = self._streams.get(entry.stream)
            if held is not None and held.groups.get(entry.group, {}).pop(int(entry.id), None) is not None:
                held.entries.pop(int(entry.id))
                self._partials.pop((entry.stream, entry.id), None)
                removed += 1
        return removed

    async def length(self, stream: str) -> int:
        held = self._streams.get(stream)
        return len(held.entries) if held else 0

    async def waiting(self, streams: Sequence[str], group: str, min_idle_s: float) -> dict[str, int]:
        found = {}
        for stream in streams:
            held = self._streams.get(stream)
            if held is not None and group in held.groups:
                new = sum(number > held.delivered_to[group] for number in held.entries)
                silent = [
                    claim for claim in held.groups[group].values() if time.monotonic() - claim.since >= min_idle_s
                ]
                found[stream] = new + bool(silent)
        return found

    async def close_epoch(self, scope: Scope) -> None:
        for stream in self._of_epoch.pop((scope.job_id, scope.epoch), set()):
            self._streams.pop(stream, None)
            self._partials = {name: parts for name, parts in self._partials.items() if name[0] != stream}
        self._streams.pop(keys.dead(scope.job_id, scope.epoch), None)
        self._marks.pop((scope.job_id, scope.epoch), None)

    async def marked(self, scope: Scope, marks: Sequence[str]) -> set[str]:
        return set(marks) & self._marks.get((scope.job_id, scope.epoch), set())

    def _claim(self, entry: Entry) -> _Claim | None:
        held = self._streams.get(entry.stream)
        return held.groups.get(entry.group, {}).get(int(entry.id)) if held else None
