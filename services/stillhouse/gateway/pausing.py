"""Pause and resume. What a paused job promises is in docs/jobs.md.

The record changes first, by compare-and-set; then the wish is written beside job.json, so that a queue server that
lost everything does not wake a job that was put to rest. Between the two a process may die: nobody had an answer yet,
and the sweeper brings the file in line with the record (`keep_wish`).
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Final

from stillhouse.core.blobs import JobArtifacts, is_no_space, sealed, write_json
from stillhouse.core.checkpoints import newest
from stillhouse.core.errors import ConflictError
from stillhouse.core.failpoints import failpoint
from stillhouse.core.queue.jobs import JobRecord
from stillhouse.core.service import Context

PAUSABLE: Final = ("queued", "validating", "starting", "running", "stalled", "resuming")
RESTING: Final = ("pausing", "paused")


async def pause(ctx: Context, job_id: str) -> JobRecord:
    """Put a job to rest: at once if no trainer ever had it, otherwise by asking its trainer (`pausing`). Twice is once.

    Raises:
        ConflictError: it is finished, or about to be cancelled.
    """
    record = await ctx.jobs.get(job_id)
    if record.status not in RESTING:
        await _request_pause(ctx, job_id)
        failpoint("gateway.pause_requested")
        record = await ctx.jobs.get(job_id)
        if record.status in RESTING:  # else its trainer was at its end before it saw the wish
            data = {"status": record.status, "reason": "user"}
            await ctx.jobs.event(job_id, "job.status", f"{record.status} on request", **data)
    await _write_wish(ctx, record)
    return record


async def _request_pause(ctx: Context, job_id: str) -> None:
    try:
        await ctx.jobs.request(
            job_id,
            allowed=("queued",),
            only_epoch=0,
            status="paused",
            status_reason="user",
            status_message="paused before it started; resume it to start",
        )
    except ConflictError:
        await ctx.jobs.request(
            job_id,
            allowed=(*PAUSABLE, *RESTING[:1]),
            status="pausing",
            status_reason="user",
            status_message="waiting for the trainer to stop between two steps",
        )


async def resume(ctx: Context, job_id: str) -> JobRecord:
    """Let a paused job go on from its last step. A job that is not paused, and not finished, goes on anyway.

    Raises:
        ConflictError: it is finished, or about to be cancelled.
    """
    record = await ctx.jobs.get(job_id)
    if record.status not in PAUSABLE:
        await ctx.jobs.request(
            job_id,
            allowed=RESTING,
            status="resuming",
            status_reason="user",
            status_message="waiting for a trainer",
        )
        failpoint("gateway.resume_requested")
        record = await ctx.jobs.get(job_id)
        data = {"status": "resuming", "reason": "user"}
        await ctx.jobs.event(job_id, "job.status", "resuming on request", **data)
    await _write_wish(ctx, record)
    return record


async def _write_wish(ctx: Context, record: JobRecord) -> None:
    try:
        await asyncio.to_thread(keep_wish, ctx.artifacts.job(record.id), record)
    except OSError as error:
        if not is_no_space(error):
            raise
        ctx.log.warning("the wish to pause is not on disk yet", job_id=record.id, error=str(error))


def keep_wish(job: JobArtifacts, record: JobRecord) -> None:
    """Make `paused.json` say what the record says."""
    is_there = job.paused.exists()
    if record.status in RESTING and not is_there and job.root.is_dir():
        write_json(job.paused, sealed({"reason": record.status_reason, "paused_at": round(time.time(), 3)}))
    elif record.status not in RESTING and is_there:
        job.paused.unlink(missing_ok=True)


def rebuilt_paused(job: JobArtifacts, record: JobRecord) -> JobRecord:
    """The record of a paused job that the queue server lost."""
    step = int(newest(job).partition("-")[2][:8] or 0)
    return replace(
        record,
        status="paused",
        step=step,
        committed_step=step,
        status_reason="user",
        status_message="paused on request; resume it to go on from its last step",
    )
