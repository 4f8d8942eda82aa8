"""A job's events and metrics: from Redis, and what Redis no longer has from the files beside the job's artifacts."""

from __future__ import annotations

import asyncio
import csv
import io
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from redis.exceptions import RedisError

from stillhouse.core.blobs import read_jsonl
from stillhouse.core.errors import NotFoundError
from stillhouse.core.queue import keys
from stillhouse.core.queue.jobs import TERMINAL
from stillhouse.core.schemas import MetricPoint
from stillhouse.core.service import Context
from stillhouse.gateway.views import event_view

POLL_S: Final = 0.25
"""Time between looks for new events: one XRANGE each, so a hundred readers cost 400 cheap commands a second."""
KEEPALIVE_S: Final = 15.0
"""A comment after so much silence, so that proxies do not cut the stream."""
LAST_WORDS_S: Final = 3.0
"""A finished job's record may be a moment ahead of its last event: so long the stream waits for it."""
PAGE: Final = 500


async def read_events(ctx: Context, job_id: str, after: str, limit: int) -> list[dict[str, Any]]:
    """Up to `limit` events after the one with id `after`, oldest first."""
    first: Any = await ctx.redis.xrange(keys.events(job_id), count=1)
    first_id = first[0][0].decode() if first else ""
    older: list[dict[str, Any]] = []
    if not first_id or _order(after) < _order(first_id):
        older = await asyncio.to_thread(_events_on_disk, ctx, job_id, after, first_id, limit)
    if len(older) >= limit:
        return older
    return older + await ctx.jobs.events(job_id, after=after, limit=limit - len(older))


def _events_on_disk(ctx: Context, job_id: str, after: str, before: str, limit: int) -> list[dict[str, Any]]:
    found = []
    for event in read_jsonl(ctx.artifacts.job(job_id).events):
        if _order(event["id"]) > _order(after) and (not before or _order(event["id"]) < _order(before)):
            found.append(event)
            if len(found) == limit:
                break
    return found


def _order(event_id: str) -> tuple[int, int]:
    milliseconds, _, number = event_id.partition("-")
    return (int(milliseconds), int(number or 0)) if milliseconds else (-1, 0)


def is_last(event: dict[str, Any]) -> bool:
    """The event that ends a job's history."""
    kind = str(event["type"])
    return event["data"].get("status") in TERMINAL or (
        kind.startswith("job.") and kind.removeprefix("job.") in TERMINAL
    )


async def stream_events(ctx: Context, job_id: str, after: str) -> AsyncIterator[bytes]:
    """Server-sent events from `after` on, until the job's last one.

    waits for:    new events, POLL_S at a time
    produces:     each event once, in order; its SSE id is its id, so that Last-Event-ID resumes exactly
    unblocked by: the job's last event; the job being finished for LAST_WORDS_S; shutdown or a lost queue server, after
                  which the client reconnects, perhaps to another replica
    """
    spoken_at = time.monotonic()
    finished_at: float | None = None
    while not ctx.stop.is_set():
        try:
            events = await read_events(ctx, job_id, after, PAGE)
            for event in events:
                after = event["id"]
                yield format_sse_event(data_str=event_view(event).model_dump_json(), event=event["type"], id=after)
                if is_last(event):
                    return
            now = time.monotonic()
            if events:
                spoken_at = now
                continue
            if finished_at is None and (await ctx.jobs.get(job_id)).is_terminal:
                finished_at = now
        except (RedisError, OSError, NotFoundError) as error:
            ctx.log.warning("event stream cut", job_id=job_id, error=str(error))
            return
        if finished_at is not None and now - finished_at > LAST_WORDS_S:
            return
        if now - spoken_at > KEEPALIVE_S:
            spoken_at = now
            yield KEEPALIVE_COMMENT
        await _pause(ctx)


async def _pause(ctx: Context) -> None:
    try:
        async with asyncio.timeout(POLL_S):
            await ctx.stop.wait()
    except TimeoutError:
        return


async def read_metrics(ctx: Context, job_id: str, step_from: int, step_to: int | None) -> list[dict[str, Any]]:
    """Metric points by step; of steps that were trained again after a takeover the newest."""
    points = await ctx.jobs.metrics(job_id, step_from=step_from, step_to=step_to)
    if points and points[0]["step"] <= max(step_from, 1):
        return points
    older = await asyncio.to_thread(_metrics_on_disk, ctx, job_id, step_from, step_to)
    merged = {point["step"]: point for point in [*older, *points]}
    return [merged[step] for step in sorted(merged)]


def _metrics_on_disk(ctx: Context, job_id: str, step_from: int, step_to: int | None) -> list[dict[str, Any]]:
    return [
        point
        for point in read_jsonl(ctx.artifacts.job(job_id).metrics)
        if point["step"] >= step_from and (step_to is None or point["step"] <= step_to)
    ]


def metrics_csv(points: Sequence[MetricPoint]) -> str:
    """epoch, first and last step, stage, created_at and one column per metric; empty where a step lacks it."""
    names = sorted({name for point in points for name in point.values})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["epoch", "first_step", "step", "stage", "created_at", *names])
    for point in points:
        cells = [point.values.get(name) for name in names]
        row = [point.epoch, point.first_step, point.step, point.stage, point.created_at]
        writer.writerow([*row, *("" if cell is None else cell for cell in cells)])
    return text.getvalue()
