"""Uploaded prompts."""

from __future__ import annotations

from pathlib import Path

from stillhouse.client.calls import Call, path
from stillhouse.client.resource import PAGE, Resource, delete
from stillhouse.core.schemas import File, Page


class AsyncFiles(Resource):
    """Files of prompts, which jobs name by id."""

    async def upload(self, file: str | Path) -> File:
        """Upload a JSONL file of rows. The same content always has the same id.

        >>> client.files.upload("prompts.jsonl").num_rows
        5
        """
        place = Path(file)
        headers = {"Content-Type": "application/jsonl", "Content-Length": str(place.stat().st_size)}
        return await self._sender.send(Call("POST", "/v1/files", File, headers=headers, file=place))

    async def list(self, *, limit: int | None = 20, after: str = "") -> list[File]:
        """Up to `limit` files (None = all), newest first."""
        call = Call("GET", "/v1/files", Page[File], {"limit": PAGE, "after": after})
        return [file async for file in self._sender.pages(call, limit=limit)]

    async def get(self, file_id: str) -> File:
        """Facts of an uploaded file."""
        return await self._sender.send(Call("GET", path("/v1/files/{}", file_id), File))

    async def content(self, file_id: str) -> bytes:
        """The rows of a file, as they were uploaded."""
        return await self._sender.send(Call("GET", path("/v1/files/{}/content", file_id), bytes))

    async def delete(self, file_id: str) -> None:
        """Delete a file; jobs that ended have used it up, jobs that run need it."""
        await delete(self._sender, path("/v1/files/{}", file_id))
