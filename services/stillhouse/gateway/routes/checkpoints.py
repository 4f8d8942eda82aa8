"""/v1/jobs/{id}/checkpoints: what a job committed: look at, download, mark as best, delete."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Response
from fastapi.responses import StreamingResponse
from starlette.background import BackgroundTask

from stillhouse.core.schemas import Checkpoint, Page
from stillhouse.gateway import checkpoints
from stillhouse.gateway.deps import Ctx, OwnJob
from stillhouse.gateway.ranges import wanted_range
from stillhouse.gateway.routes.deadline import DeadlineRoute
from stillhouse.gateway.tar import TarStream

router = APIRouter(prefix="/v1/jobs/{job_id}/checkpoints", tags=["checkpoints"], route_class=DeadlineRoute)
CheckpointId = Annotated[str, Path(pattern=r"^ckpt_[a-z0-9-]{1,90}$", max_length=95)]
_TAR: dict[int | str, dict[str, Any]] = {
    status: {"content": {"application/x-tar": {"schema": {"type": "string", "format": "binary"}}}, "description": what}
    for status, what in ((200, "The checkpoint's folder as a tar"), (206, "The bytes of it that Range names"))
}


@router.get("")
async def list_checkpoints(ctx: Ctx, record: OwnJob) -> Page[Checkpoint]:
    """Committed checkpoints, oldest first, and at the end the finished student (`ckpt_export`)."""
    job = ctx.artifacts.job(record.id)
    return Page(data=await asyncio.to_thread(checkpoints.list_checkpoints, record.id, job, record))


@router.get("/{checkpoint_id}")
async def get_checkpoint(ctx: Ctx, record: OwnJob, checkpoint_id: CheckpointId) -> Checkpoint:
    """A checkpoint."""
    return await asyncio.to_thread(checkpoints.get_checkpoint, ctx.artifacts.job(record.id), record, checkpoint_id)


@router.delete("/{checkpoint_id}", status_code=204)
async def delete_checkpoint(ctx: Ctx, record: OwnJob, checkpoint_id: CheckpointId) -> None:
    """Delete a checkpoint; 409 where a recovery or another job needs it, or it is marked as best."""
    await asyncio.to_thread(checkpoints.delete_checkpoint, ctx.artifacts, record, checkpoint_id)


@router.put("/{checkpoint_id}/best")
async def mark_best(ctx: Ctx, record: OwnJob, checkpoint_id: CheckpointId) -> Checkpoint:
    """Mark a checkpoint as best: nothing deletes it until the mark is taken back. The last one that was marked counts;
    those marked before stay, too."""
    return await asyncio.to_thread(checkpoints.mark_best, ctx.artifacts.job(record.id), record, checkpoint_id)


@router.delete("/{checkpoint_id}/best")
async def unmark_best(ctx: Ctx, record: OwnJob, checkpoint_id: CheckpointId) -> Checkpoint:
    """Take the mark back."""
    return await asyncio.to_thread(checkpoints.unmark_best, ctx.artifacts.job(record.id), record, checkpoint_id)


@router.get("/{checkpoint_id}/download", response_class=StreamingResponse, responses=_TAR)
async def download_checkpoint(
    ctx: Ctx,
    record: OwnJob,
    checkpoint_id: CheckpointId,
    range_: Annotated[str, Header(alias="Range", max_length=200, description="One range, to go on: bytes=1000-")] = "",
    if_range: Annotated[str, Header(max_length=200, description="ETag of the download that is gone on with")] = "",
) -> Response:
    """A checkpoint as a tar, streamed; Content-Length tells whether it came whole."""
    tar, headers = await _open(ctx, record, checkpoint_id)
    try:
        part = wanted_range(range_, if_range, tar.etag, tar.size)
    except BaseException:
        tar.close()
        raise
    wanted = part if part is not None else range(tar.size)
    headers["Content-Length"] = str(len(wanted))
    if part is not None:
        headers["Content-Range"] = f"bytes {part.start}-{part.stop - 1}/{tar.size}"
    return StreamingResponse(
        tar.read(wanted),
        status_code=200 if part is None else 206,
        media_type="application/x-tar",
        headers=headers,
        background=BackgroundTask(tar.close),
    )


@router.head("/{checkpoint_id}/download", response_class=Response, responses=_TAR)
async def measure_checkpoint(ctx: Ctx, record: OwnJob, checkpoint_id: CheckpointId) -> Response:
    """How long the download is, and its ETag."""
    tar, headers = await _open(ctx, record, checkpoint_id)
    tar.close()
    return Response(media_type="application/x-tar", headers={**headers, "Content-Length": str(tar.size)})


async def _open(ctx: Ctx, record: OwnJob, checkpoint: str) -> tuple[TarStream, dict[str, str]]:
    folder = checkpoints.checkpoint_folder(record.id, ctx.artifacts.job(record.id), record, checkpoint)
    name = f"{record.id}-{checkpoint.removeprefix('ckpt_')}"
    tar = await asyncio.to_thread(TarStream, folder, name)
    disposition = f'attachment; filename="{name}.tar"'
    return tar, {"Accept-Ranges": "bytes", "ETag": tar.etag, "Content-Disposition": disposition}
