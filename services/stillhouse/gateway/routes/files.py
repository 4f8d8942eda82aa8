"""/v1/files: prompts as JSONL."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import FileResponse
from pydantic import BaseModel, ConfigDict, Field

from stillhouse.core.errors import MediaTypeError, NotFoundError, StillhouseError
from stillhouse.core.schemas import File, FileDeleted, Page
from stillhouse.gateway import files
from stillhouse.gateway.deps import ByCaller, Ctx
from stillhouse.gateway.middleware import check_declared_length, drain, too_large

router = APIRouter(prefix="/v1/files", tags=["files"])
FileId = Annotated[str, Path(pattern=r"^file_[a-z0-9]{8,40}$", max_length=45)]
_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "One row per line, as in `data.rows` of a job",
        "content": {kind: {"schema": {"type": "string"}} for kind in sorted(files.MEDIA_TYPES)},
    }
}


class FilesQuery(BaseModel):
    """Which files to list."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    limit: int = Field(default=20, ge=1, le=1000)
    """Files in the answer, at most."""
    after: str = Field(default="", pattern=r"^(file_[a-z0-9]{8,40})?$")
    """Last id of the page before."""


@router.post("", status_code=201, openapi_extra=_BODY)
async def upload_file(ctx: Ctx, caller: ByCaller, request: Request) -> File:
    """Upload prompts. Every line is checked as it arrives; wrong ones refuse the file, up to 20 are named."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type not in files.MEDIA_TYPES:
        known = " or ".join(sorted(files.MEDIA_TYPES))
        raise MediaTypeError(f"the content type is '{content_type or 'not given'}'; send {known}")
    limit = int(ctx.settings.max_file_mib * (1 << 20))
    await check_declared_length(request.scope, request.receive, limit, "file", "max_file_mib")
    upload = files.Upload(ctx.artifacts)
    try:
        await _receive(request, upload, limit)
        return await files.finish(upload, caller.owner)
    finally:
        upload.abort()


async def _receive(request: Request, upload: files.Upload, limit: int) -> None:
    """Feed the body to the upload; on an error read on for a while, so that the client gets to see the answer."""
    try:
        async for block in request.stream():
            if upload.size + len(block) > limit:
                raise too_large(upload.size + len(block), limit, "file", "max_file_mib")
            upload.feed(block)
    except StillhouseError:
        await drain(request.receive)
        raise


@router.get("")
async def list_files(ctx: Ctx, caller: ByCaller, query: Annotated[FilesQuery, Query()]) -> Page[File]:
    """Uploaded files, newest first."""
    found = await asyncio.to_thread(files.list_files, ctx.artifacts, caller)
    if query.after:
        ids = [file.id for file in found]
        if query.after not in ids:
            raise NotFoundError(f"no file '{query.after}' (any more)", param="after")
        found = found[ids.index(query.after) + 1 :]
    return Page(data=found[: query.limit], has_more=len(found) > query.limit)


@router.get("/{file_id}")
async def get_file(ctx: Ctx, caller: ByCaller, file_id: FileId) -> File:
    """Facts of an uploaded file."""
    return files.get_file(ctx.artifacts, file_id, caller)


@router.get(
    "/{file_id}/content",
    response_class=FileResponse,
    responses={200: {"content": {"application/jsonl": {"schema": {"type": "string"}}}, "description": "The rows"}},
)
async def get_content(ctx: Ctx, caller: ByCaller, file_id: FileId) -> FileResponse:
    """The file as it was uploaded; understands Range."""
    path = files.find(ctx.artifacts, file_id, caller)
    headers = {"ETag": f'"{files.get_file(ctx.artifacts, file_id, caller).sha256}"'}
    return FileResponse(path, media_type="application/jsonl", filename=path.name, headers=headers)


@router.delete("/{file_id}")
async def delete_file(ctx: Ctx, caller: ByCaller, file_id: FileId) -> FileDeleted:
    """Delete an uploaded file; 409 while a job that has not ended reads it."""
    await files.delete_file(ctx, file_id, caller)
    return FileDeleted(id=file_id)
