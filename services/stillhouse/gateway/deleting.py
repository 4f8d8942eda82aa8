"""DELETE of a job: everything of it goes, and a half-deleted job never comes back.

Its folder is moved out of `jobs/` first: from then on no sweeper rebuilds its record. The record, its histories and the
folder follow; whoever dies in between leaves a folder below `deleted/`, and the sweeper does the rest.
"""

from __future__ import annotations

import asyncio
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from stillhouse.core.blobs import Artifacts, fsync_dir, make_dirs, unsealed
from stillhouse.core.checkpoints import named
from stillhouse.core.errors import ConflictError, CorruptError, NotFoundError
from stillhouse.core.failpoints import failpoint
from stillhouse.core.queue import keys
from stillhouse.core.queue.epochs import close_epochs
from stillhouse.core.queue.jobs import JobRecord
from stillhouse.core.removal import put_aside
from stillhouse.core.service import Context


async def delete(ctx: Context, record: JobRecord) -> None:
    """Delete a finished job.

    Raises:
        ConflictError: it has not ended, or a job that has not ended names a checkpoint of it.
    """
    if not record.is_terminal:
        raise ConflictError(f"job {record.id} is '{record.status}': only a finished job is deleted; cancel it first")
    await asyncio.to_thread(_put_aside, ctx.artifacts, record.id)
    failpoint("gateway.job_put_aside")
    await _finish(ctx, record.id)


def _put_aside(artifacts: Artifacts, job_id: str) -> None:
    folder = artifacts.job(job_id).root
    make_dirs(artifacts.deleted)
    needing = _needed(artifacts, job_id)  # first as it lies: whoever reads it now must not miss it for a moment

    def is_needed() -> bool:  # somebody may have come to need it meanwhile
        needing[:] = _needed(artifacts, job_id)
        return bool(needing)

    if not needing:
        put_aside({folder: artifacts.deleted / job_id}, is_needed)
    if needing:
        raise ConflictError(
            f"job {job_id} stays: a job that has not ended uses {', '.join(needing[:4])}; wait for it, or cancel it"
        )
    fsync_dir(folder.parent)
    fsync_dir(artifacts.deleted)


def _needed(artifacts: Artifacts, job_id: str) -> list[str]:
    """Checkpoints of a job that jobs which have not ended name."""
    return sorted(name for name in named(artifacts) if name.startswith(f"{job_id}/"))


async def finish_deletions(ctx: Context) -> None:
    """Go on with deletions whose process died. What is needed after all is moved back: by its process, or here."""
    for path in await asyncio.to_thread(_put_aside_before, ctx.artifacts):
        if not await asyncio.to_thread(_moved_back, ctx.artifacts, path):
            await _finish(ctx, path.name)


def _put_aside_before(artifacts: Artifacts) -> list[Path]:
    return sorted(artifacts.deleted.iterdir()) if artifacts.deleted.is_dir() else []


def _moved_back(artifacts: Artifacts, path: Path) -> bool:
    if not _needed(artifacts, path.name):
        return False
    with suppress(FileNotFoundError):
        path.rename(artifacts.job(path.name).root)
    return True


async def _finish(ctx: Context, job_id: str) -> None:
    folder = ctx.artifacts.deleted / job_id
    try:
        token = str((await asyncio.to_thread(unsealed, folder / "job.json"))["idempotency"][0])
    except (NotFoundError, CorruptError, KeyError):
        token = ""
    try:
        epoch = (await ctx.jobs.get(job_id)).epoch
    except NotFoundError:
        epoch = 0
    await close_epochs(ctx.redis, ctx.queue, job_id, through=epoch)
    made: Any = await ctx.redis.get(keys.idempotency(token)) if token else None
    if made is not None and made.decode().partition(":")[0] == job_id:
        await ctx.redis.delete(keys.idempotency(token))
    await ctx.jobs.forget(job_id)
    await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
