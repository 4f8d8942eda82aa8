"""/v1/files: prompts as JSONL."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path, Request

from stillhouse.core.errors import MediaTypeError, StillhouseError
from stillhouse.core.schemas import File
from stillhouse.gateway import files
from stillhouse.gateway.deps import Ctx
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


@router.post("", status_code=201, openapi_extra=_BODY)
async def upload_file(ctx: Ctx, request: Request) -> File:
    """Upload prompts. Every line is checked as it arrives; the first wrong one refuses the file and is named."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type not in files.MEDIA_TYPES:
        known = " or ".join(sorted(files.MEDIA_TYPES))
        raise MediaTypeError(f"the content type is '{content_type or 'not given'}'; send {known}")
    limit = int(ctx.settings.max_file_mib * (1 << 20))
    await check_declared_length(request.scope, request.receive, limit, "file", "max_file_mib")
    upload = files.Upload(ctx.artifacts)
    try:
        await _receive(request, upload, limit)
        return await files.finish(upload)
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


@router.get("/{file_id}")
async def get_file(ctx: Ctx, file_id: FileId) -> File:
    """Facts of an uploaded file."""
    return files.get_file(ctx.artifacts, file_id)
