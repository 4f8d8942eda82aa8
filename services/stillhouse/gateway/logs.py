"""A job's log lines, as a page and as a stream."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final

from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from redis.exceptions import RedisError

from stillhouse.core.errors import NotFoundError
from stillhouse.core.job_logs import LogReader, order
from stillhouse.core.schemas import LogLine, Page
from stillhouse.core.service import Context
from stillhouse.core.worker import pause
from stillhouse.gateway.views import timestamp

POLL_S: Final = 0.5
"""Time between looks for new lines."""
HOLD_S: Final = 1.0
"""Lines wait so long for those of other processes: they write a moment later, and clocks differ."""
KEEPALIVE_S: Final = 15.0
"""A comment after so much silence, so that proxies do not cut the stream."""
LAST_WORDS_S: Final = 5.0
"""Services still write about a job that has ended: so long the stream goes on."""


def log_view(line: Mapping[str, Any]) -> LogLine:
    """A line."""
    names = ("id", "service", "instance", "level", "message", "data")
    return LogLine(created_at=timestamp(line["created_at"]), **{name: line[name] for name in names})


def read_logs(ctx: Context, job_id: str, *, service: str, after: str, tail: int) -> Page[LogLine]:
    """The last `tail` lines, or the next ones after an id; oldest first."""
    reader = LogReader(ctx.artifacts.job(job_id).logs, service)
    if not after:
        return Page(data=[log_view(line) for line in reader.read(only_tails=True)[-tail:]])
    lines = reader.read(after=after, most=tail + 1)
    return Page(data=[log_view(line) for line in lines[:tail]], has_more=len(lines) > tail)


async def follow_logs(ctx: Context, job_id: str, *, service: str, after: str, tail: int) -> AsyncIterator[bytes]:
    """Server-sent lines: the last `tail` ones, or those after an id; then each as it comes.

    waits for:    new lines, POLL_S at a time
    produces:     each line once, in the order of ids; the SSE id is the line's
    unblocked by: the end of the job and LAST_WORDS_S of silence; shutdown or a lost queue server, after which the
                  client reconnects with the last id
    """
    reader = LogReader(ctx.artifacts.job(job_id).logs, service)
    waiting = await asyncio.to_thread(reader.read, only_tails=not after, after=after)
    waiting = waiting if after else waiting[-tail:]
    spoken_at = heard_at = time.monotonic()
    while not ctx.stop.is_set():
        held_from = time.time_ns() - int(HOLD_S * 1e9)
        ready = [line for line in waiting if order(line["id"])[0] <= held_from]
        waiting = waiting[len(ready) :]
        for line in ready:
            after = line["id"]
            yield format_sse_event(data_str=log_view(line).model_dump_json(), event="log", id=after)
        now = time.monotonic()
        spoken_at = now if ready else spoken_at
        heard_at = now if waiting or ready else heard_at
        if now - heard_at > LAST_WORDS_S and await _has_ended(ctx, job_id):
            return
        if now - spoken_at > KEEPALIVE_S:
            spoken_at = now
            yield KEEPALIVE_COMMENT
        await pause(ctx.stop, POLL_S)
        new = await asyncio.to_thread(reader.read)
        waiting = sorted([*waiting, *new], key=lambda line: order(line["id"]))


async def _has_ended(ctx: Context, job_id: str) -> bool:
    try:
        return (await ctx.jobs.get(job_id)).is_terminal
    except (NotFoundError, RedisError, OSError):
        return True  # the client asks again
