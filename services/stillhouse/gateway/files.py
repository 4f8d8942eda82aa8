"""Uploaded prompts: streamed to disk line by line, each checked as a `Row`, named by their content.

Named by content, so an upload that is repeated after a lost answer gives the same id. `{id}.json` holds the facts and
is written before `{id}.jsonl` appears: where there is data there are facts.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Final

from pydantic import ValidationError

from stillhouse.core.blobs import Artifacts, fsync_dir, read_json, write_json
from stillhouse.core.errors import NotFoundError, SpecError
from stillhouse.core.explain import explain
from stillhouse.core.schemas import File
from stillhouse.core.spec import Row
from stillhouse.gateway.views import timestamp

MEDIA_TYPES: Final = frozenset({"application/jsonl", "application/x-ndjson", "application/x-jsonlines"})
MAX_LINE_BYTES: Final = 4 << 20
"""Longest line: more text than any model reads, and what one upload may hold in memory."""


MAX_ROWS: Final = 200_000
"""Most rows of a file: pre-flight and trainer hold them all in memory, about 2 KiB each."""


class Upload:
    """An upload in progress: feed it blocks, then finish or abort.

    OPEN -> finish() -> STORED, or OPEN -> abort() -> gone.
    """

    def __init__(self, artifacts: Artifacts) -> None:
        self._artifacts = artifacts
        folder = artifacts.root / "files"
        folder.mkdir(parents=True, exist_ok=True)
        self._temp = folder / f".upload.{secrets.token_hex(8)}.tmp"
        self._stream: BinaryIO = self._temp.open("xb")
        self._digest = hashlib.sha256()
        self._rest = b""
        self._line = 0
        self.size = 0
        self.num_rows = 0

    def feed(self, block: bytes) -> None:
        """Take the next bytes.

        Raises:
            SpecError: a line is not a row; names the line.
        """
        self._stream.write(block)
        self._digest.update(block)
        self.size += len(block)
        *lines, self._rest = (self._rest + block).split(b"\n")
        for line in lines:
            self._check(line)
        if len(self._rest) > MAX_LINE_BYTES:
            raise self._error(f"longer than {MAX_LINE_BYTES} bytes; is it one JSON object per line?", self._line + 1)

    def finish(self) -> File:
        """Make it durable under its name; blocks while the disk writes.

        Raises:
            SpecError: the last line is wrong, or there is no row.
        """
        if self._rest:
            self._check(self._rest)
        if self.num_rows == 0:
            raise SpecError('the file has no rows; send one JSON object per line, for example {"prompt": "Hello"}')
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        digest = self._digest.hexdigest()
        file_id = f"file_{digest[:20]}"
        target = self._artifacts.file(file_id)
        if target.is_file():
            self._temp.unlink()
            return get_file(self._artifacts, file_id)
        facts = {"num_rows": self.num_rows, "sha256": digest, "size_bytes": self.size, "created_at": time.time()}
        write_json(_facts_path(target), facts)
        self._temp.rename(target)
        fsync_dir(target.parent)
        return _view(file_id, facts)

    def abort(self) -> None:
        """Forget it; harmless after `finish`."""
        with suppress(OSError):  # on a full disk the rest of the buffer cannot be written either
            self._stream.close()
        self._temp.unlink(missing_ok=True)

    def _check(self, line: bytes) -> None:
        self._line += 1
        if not line.strip():
            return
        try:
            Row.model_validate_json(line)
        except ValidationError as error:
            raise self._error(_reason(error), self._line) from None
        self.num_rows += 1
        if self.num_rows > MAX_ROWS:
            raise self._error(f"a file holds at most {MAX_ROWS} rows; train on the rest in another job", self._line)

    @staticmethod
    def _error(reason: str, line: int) -> SpecError:
        return SpecError(f"line {line}: {reason}", param=f"line {line}")


async def finish(upload: Upload) -> File:
    """`Upload.finish` off the event loop: a disk may take long to write."""
    return await asyncio.to_thread(upload.finish)


def get_file(artifacts: Artifacts, file_id: str) -> File:
    """Facts of an uploaded file.

    Raises:
        NotFoundError: no such file.
    """
    path = artifacts.file(file_id)
    if not path.is_file():
        raise NotFoundError(f"no file '{file_id}'; upload one with POST /v1/files")
    return _view(file_id, read_json(_facts_path(path)))


def _facts_path(target: Path) -> Path:
    return target.with_suffix(".json")


def _view(file_id: str, facts: dict[str, Any]) -> File:
    fields = {name: facts[name] for name in ("num_rows", "sha256", "size_bytes")}
    return File(id=file_id, created_at=timestamp(facts["created_at"]), **fields)


def _reason(error: ValidationError) -> str:
    errors = [{**item, "loc": ("body", *item["loc"])} for item in error.errors()]
    if errors[0]["type"] == "json_invalid":
        return f"{errors[0]['msg']}; write one JSON object per line"
    return explain(errors, None, Row)[0].text()
