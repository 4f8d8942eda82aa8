"""A job's events by id: from Redis, and what Redis no longer has from events.jsonl, which is never read as a whole."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any, BinaryIO, Final

from stillhouse.core.queue import keys
from stillhouse.core.queue.jobs import TERMINAL
from stillhouse.core.service import Context

DISORDER_LINES: Final = 64
"""Gateway, trainer and sweeper append by themselves: so many lines may stand before one of an older event, at most."""
MOST_ON_DISK: Final = 1_000_000
"""Events of a file that is read backwards: that is rare, so it is read from the start."""
DISORDER_BYTES: Final = 64 << 10
"""And so many bytes."""


async def read_events(ctx: Context, job_id: str, after: str, limit: int) -> list[dict[str, Any]]:
    """Up to `limit` events after the one with id `after`, oldest first."""
    async with ctx.redis.pipeline() as at_once:  # one moment: nothing is trimmed between the two
        at_once.xrange(keys.events(job_id), count=1)
        at_once.xrange(keys.events(job_id), min=f"({after}" if after else "-", count=limit)
        first, entries = await at_once.execute()
    first_id = first[0][0].decode() if first else ""
    older: list[dict[str, Any]] = []
    if not first_id or order(after) < order(first_id):
        path = ctx.artifacts.job(job_id).events
        older = await asyncio.to_thread(events_on_disk, path, after, first_id, limit)
    return [*older, *(parse(entry_id, fields) for entry_id, fields in entries[: limit - len(older)])]


async def newest_events(ctx: Context, job_id: str, before: str, limit: int) -> list[dict[str, Any]]:
    """Up to `limit` events before the one with id `before` ('' = the newest), newest first."""
    entries: Any = await ctx.redis.xrevrange(keys.events(job_id), max=f"({before}" if before else "+", count=limit)
    found = [parse(entry_id, fields) for entry_id, fields in entries]
    if len(found) < limit:
        path = ctx.artifacts.job(job_id).events
        bound = found[-1]["id"] if found else before
        older = await asyncio.to_thread(events_on_disk, path, "", bound, MOST_ON_DISK)
        found += older[::-1][: limit - len(found)]
    return found


def parse(entry_id: bytes, fields: dict[bytes, bytes]) -> dict[str, Any]:
    """An event from its entry in the queue server."""
    return {"id": entry_id.decode(), **json.loads(fields[b"event"])}


def order(event_id: str) -> tuple[int, int]:
    """Sorts ids as the queue server does; '' comes before all."""
    milliseconds, _, number = event_id.partition("-")
    return (int(milliseconds), int(number or 0)) if milliseconds else (-1, 0)


def is_last(event: dict[str, Any]) -> bool:
    """The event that ends a job's history."""
    kind = str(event["type"])
    return event["data"].get("status") in TERMINAL or (
        kind.startswith("job.") and kind.removeprefix("job.") in TERMINAL
    )


def events_on_disk(path: Path, after: str, before: str, limit: int) -> list[dict[str, Any]]:
    """Up to `limit` events with after < id < before ('' = no bound), oldest first; torn lines are skipped."""
    low, high = order(after), order(before) if before else None
    found: dict[tuple[int, int], dict[str, Any]] = {}
    beyond = 0
    try:
        stream = path.open("rb")
    except FileNotFoundError:
        return []
    with stream:
        stream.seek(_start(stream, low) if after else 0)
        for line in stream:
            event = _event(line)
            if event is None or (place := order(event["id"])) <= low:
                continue
            if high is not None and place >= high:
                beyond += 1
            else:
                found[place] = event
            if max(beyond, len(found) - limit) > DISORDER_LINES:
                break
    return [found[place] for place in sorted(found)[:limit]]


def _start(stream: BinaryIO, low: tuple[int, int]) -> int:
    """Where to begin reading for ids above `low`: the start of a line, by binary search, with room for disorder."""
    begin, end = 0, os.fstat(stream.fileno()).st_size
    while end - begin > DISORDER_BYTES:
        middle = (begin + end) // 2
        stream.seek(middle)
        stream.readline()
        event = None
        while event is None and (line := stream.readline()):
            event = _event(line)
        if event is not None and order(event["id"]) <= low:
            begin = middle
        else:
            end = middle
    stream.seek(max(0, begin - DISORDER_BYTES))
    if stream.tell():
        stream.readline()
    return stream.tell()


def _event(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return value if isinstance(value, dict) and "id" in value else None
