"""/v1/files: prompts as JSONL."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import FileResponse
from pydantic import BaseModel, ConfigDict, Field

from stillhouse.core.errors import MediaTypeError, NotFoundError, SpecError, StillhouseError
from stillhouse.core.schemas import File, FileDeleted, Page
from stillhouse.gateway import files, multipart
from stillhouse.gateway.deps import ByCaller, Ctx
from stillhouse.gateway.middleware import check_declared_length, drain, too_large

router = APIRouter(prefix="/v1/files", tags=["files"])
FileId = Annotated[str, Path(pattern=r"^file_[a-z0-9]{8,40}$", max_length=45)]
PURPOSE = "fine-tune"
_FORM: dict[str, Any] = {
    "type": "object",
    "required": ["file"],
    "properties": {"purpose": {"enum": [PURPOSE]}, "file": {"type": "string", "format": "binary"}},
    "additionalProperties": False,
}
_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "One row per line, as in `data.rows` of a job",
        "content": {kind: {"schema": {"type": "string"}} for kind in sorted(files.MEDIA_TYPES)}
        | {multipart.MEDIA_TYPE: {"schema": _FORM}},
    }
}


class FilesQuery(BaseModel):
    """Which files to list."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    limit: int = Field(default=20, ge=1, le=10_000)
    """Files in the answer, at most."""
    order: Literal["asc", "desc"] = "desc"
    """By the time of upload; desc = newest first."""
    purpose: Literal["fine-tune"] | None = None
    """OpenAI's filter; all files have this one."""
    after: str = Field(default="", pattern=r"^(file_[a-z0-9]{8,40})?$")
    """Last id of the page before."""


@router.post("", status_code=201, openapi_extra=_BODY)
async def upload_file(ctx: Ctx, caller: ByCaller, request: Request) -> File:
    """Upload prompts. Every line is checked as it arrives; wrong ones refuse the file, up to 20 are named."""
    content_type = request.headers.get("content-type", "")
    kind = content_type.partition(";")[0].strip().lower()
    if kind not in files.MEDIA_TYPES and kind != multipart.MEDIA_TYPE:
        known = ", ".join([*sorted(files.MEDIA_TYPES), multipart.MEDIA_TYPE])
        raise MediaTypeError(f"the content type is '{kind or 'not given'}'; send one of {known}")
    limit = int(ctx.settings.max_file_mib * (1 << 20))
    await check_declared_length(request.scope, request.receive, limit, "file", "max_file_mib")
    upload = files.Upload(ctx.artifacts)
    form = multipart.Form(content_type, upload.feed) if kind == multipart.MEDIA_TYPE else None
    try:
        await _receive(request, form.feed if form else upload.feed, limit)
        if form:
            form.finish()
            _check_purpose(form.fields)
        return await files.finish(ctx, upload, caller, form.filename if form else "")
    finally:
        upload.abort()


def _check_purpose(fields: dict[str, str]) -> None:
    unknown = [name for name in fields if name != "purpose"]
    if unknown:
        raise SpecError("the form may have the fields 'purpose' and 'file'", param=unknown[0])
    if fields.get("purpose", PURPOSE) != PURPOSE:
        raise SpecError(
            f"'{fields['purpose']}' is no purpose here; files of prompts are for '{PURPOSE}'", param="purpose"
        )


async def _receive(request: Request, feed: Callable[[bytes], None], limit: int) -> None:
    """Feed the body to the upload; on an error read on for a while, so that the client gets to see the answer."""
    size = 0
    try:
        async for block in request.stream():
            size += len(block)
            if size > limit:
                raise too_large(size, limit, "file", "max_file_mib")
            feed(block)
    except StillhouseError:
        if not request._stream_consumed:  # else nothing comes any more, and waiting for it would hold the answer
            await drain(request.receive)
        raise


@router.get("")
async def list_files(ctx: Ctx, caller: ByCaller, query: Annotated[FilesQuery, Query()]) -> Page[File]:
    """Uploaded files, by the time of upload."""
    found = await asyncio.to_thread(files.list_files, ctx.artifacts, caller)
    if query.order == "asc":
        found.reverse()
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
