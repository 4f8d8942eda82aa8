"""Uploaded prompts: streamed to disk line by line, each checked as a `Row`, named by their content.

Named by content, so an upload that is repeated after a lost answer gives the same id, and two owners of one content
share a file: it goes when the last of them deletes it. `{id}.json` holds the facts, owners among them, and is written
before `{id}.jsonl` appears: where there is data there are facts. Files from before there were owners are everybody's.
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

from stillhouse.core.blobs import Artifacts, fsync_dir, locked, read_json, write_json
from stillhouse.core.errors import ConflictError, CorruptError, NotFoundError, SpecError
from stillhouse.core.explain import MAX_FINDINGS, Finding, explain
from stillhouse.core.queue.jobs import JobRecord
from stillhouse.core.schemas import File
from stillhouse.core.service import Context
from stillhouse.core.spec import Row
from stillhouse.gateway import limits
from stillhouse.gateway.deps import Caller
from stillhouse.gateway.problems import InvalidError
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
        self._findings: list[Finding] = []
        self.size = 0
        self.num_rows = 0

    def feed(self, block: bytes) -> None:
        """Take the next bytes.

        Raises:
            InvalidError: MAX_FINDINGS lines are no rows, or one is beyond all bounds; names the lines.
        """
        self._stream.write(block)
        self._digest.update(block)
        self.size += len(block)
        *lines, self._rest = (self._rest + block).split(b"\n")
        for line in lines:
            self._check(line)
        if len(self._rest) > MAX_LINE_BYTES:
            self._line += 1
            self._refuse(f"longer than {MAX_LINE_BYTES} bytes", "write one JSON object per line", is_last=True)

    def finish(self, owner: str, filename: str = "") -> File:
        """Make it durable under its name; blocks while the disk writes.

        Raises:
            InvalidError: lines are no rows; names them.
            SpecError: there is no row.
        """
        if self._rest:
            self._check(self._rest)
        if self._findings:
            raise InvalidError(self._findings)
        if self.num_rows == 0:
            raise SpecError('the file has no rows; send one JSON object per line, for example {"prompt": "Hello"}')
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        digest, file_id = self._digest.hexdigest(), self.file_id()
        target = self._artifacts.file(file_id)
        facts = {"num_rows": self.num_rows, "sha256": digest, "size_bytes": self.size, "created_at": time.time()}
        facts |= {"owners": [owner], "filename": filename}
        with locked(_lock(target.parent)):
            if target.is_file():
                facts = _facts(target)
                facts["owners"] = sorted({*facts["owners"], owner}) if facts.get("owners") else []
            write_json(_facts_path(target), facts)
            self._temp.rename(target)
            fsync_dir(target.parent)
        return _view(file_id, facts)

    def file_id(self) -> str:
        """The name of what has come so far."""
        return f"file_{self._digest.hexdigest()[:20]}"

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
            self._refuse(*_reason(error))
            return
        self.num_rows += 1
        if self.num_rows > MAX_ROWS:
            self._refuse(f"a file holds at most {MAX_ROWS} rows", "train on the rest in another job", is_last=True)

    def _refuse(self, message: str, fix: str, *, is_last: bool = False) -> None:
        """Note what is wrong with a line; enough is enough."""
        self._findings.append(Finding(f"line {self._line}", message, fix))
        if is_last or len(self._findings) == MAX_FINDINGS:
            raise InvalidError(self._findings)


async def finish(ctx: Context, upload: Upload, caller: Caller, filename: str = "") -> File:
    """`Upload.finish` off the event loop, if its owner has room: a disk may take long to write.

    Raises:
        QuotaError: all files of the owner together would be too large.
    """

    def run() -> File:
        used = used_bytes(ctx.artifacts, caller.owner, without=upload.file_id())
        limits.check_room(ctx.settings, caller, used, upload.size)
        return upload.finish(caller.owner, filename)

    return await asyncio.to_thread(run)


# -- what is there -----------------------------------------------------------------------------------------------------


def find(artifacts: Artifacts, file_id: str, caller: Caller) -> Path:
    """Where a file lies that the caller may see.

    Raises:
        NotFoundError: no such file, or it is another owner's.
    """
    path = artifacts.file(file_id)
    if not path.is_file() or not _is_seen(_facts(path), caller):
        raise NotFoundError(f"no file '{file_id}'; upload one with POST /v1/files")
    return path


def get_file(artifacts: Artifacts, file_id: str, caller: Caller) -> File:
    """Facts of an uploaded file.

    Raises:
        NotFoundError: no such file.
    """
    return _view(file_id, _facts(find(artifacts, file_id, caller)))


def list_files(artifacts: Artifacts, caller: Caller) -> list[File]:
    """The files that a caller may see, newest first."""
    found = []
    for path in (artifacts.root / "files").glob("file_*.jsonl"):
        try:
            facts = _facts(path)
        except (NotFoundError, CorruptError):  # deleted meanwhile, or damaged: nothing to offer
            continue
        if _is_seen(facts, caller):
            found.append((facts["created_at"], path.stem, facts))
    return [_view(file_id, facts) for _, file_id, facts in sorted(found, key=lambda item: item[:2], reverse=True)]


def used_bytes(artifacts: Artifacts, owner: str, *, without: str = "") -> int:
    """Size of an owner's files together."""
    total = 0
    for path in (artifacts.root / "files").glob("file_*.jsonl"):
        with suppress(NotFoundError, CorruptError):
            facts = _facts(path)
            total += facts["size_bytes"] if owner in facts.get("owners", ()) and path.stem != without else 0
    return total


async def delete_file(ctx: Context, file_id: str, caller: Caller) -> None:
    """Delete a file for its caller, and its data if it is nobody else's. An administrator deletes it for all.

    Raises:
        NotFoundError: no such file.
        ConflictError: a job that has not ended reads it; says which.
    """
    path = find(ctx.artifacts, file_id, caller)
    users = [record for record in await active_jobs(ctx) if file_id in files_of(record)]
    if own := [record.id for record in users if caller.may_see(record.owner)]:
        raise ConflictError(f"file {file_id} is read by {', '.join(own[:5])}; wait for the end, or cancel first")
    await asyncio.to_thread(_delete, path, caller, is_used=bool(users))


def _other_owners(facts: dict[str, Any], caller: Caller) -> list[str]:
    """Those who keep a file that its caller deletes; an administrator who does not own it deletes it for all."""
    owners = facts.get("owners") or []
    return [owner for owner in owners if owner != caller.owner] if caller.owner in owners else []


def _delete(path: Path, caller: Caller, *, is_used: bool) -> None:
    with locked(_lock(path.parent)):
        facts = _facts(path)
        if others := _other_owners(facts, caller):
            write_json(_facts_path(path), {**facts, "owners": others})
            return
        if is_used:
            raise ConflictError(f"file {path.stem} is read by a job of another owner; try again when it has ended")
        path.unlink(missing_ok=True)  # first the data: facts alone are no file
        _facts_path(path).unlink(missing_ok=True)
        fsync_dir(path.parent)


def _lock(folder: Path) -> Path:
    """Of the files' owners: replicas change them, and two owners may have one file."""
    return folder.with_name(f".{folder.name}.lock")


async def active_jobs(ctx: Context) -> list[JobRecord]:
    """Jobs that have not ended."""
    found = []
    for job_id in await ctx.jobs.active_ids():
        with suppress(NotFoundError):
            found.append(await ctx.jobs.get(job_id))
    return found


def files_of(record: JobRecord) -> set[str]:
    """Ids of the files that a job reads."""
    evaluation = (record.spec.get("evaluation") or {}).get("data") or {}
    sources = [stage.get("data") or {} for stage in record.spec.get("stages", [])]
    return {file_id for source in (*sources, evaluation) if (file_id := source.get("file"))}


def _is_seen(facts: dict[str, Any], caller: Caller) -> bool:
    owners = facts.get("owners") or []
    return not owners or any(caller.may_see(owner) for owner in owners)


def _facts(path: Path) -> dict[str, Any]:
    return read_json(_facts_path(path))


def _facts_path(target: Path) -> Path:
    return target.with_suffix(".json")


def _view(file_id: str, facts: dict[str, Any]) -> File:
    fields = {name: facts[name] for name in ("num_rows", "sha256", "size_bytes")}
    return File(
        id=file_id,
        uploaded_at=timestamp(facts["created_at"]),
        created_at=int(facts["created_at"]),
        bytes=facts["size_bytes"],
        filename=facts.get("filename") or f"{file_id}.jsonl",
        **fields,
    )


def _reason(error: ValidationError) -> tuple[str, str]:
    """(what is wrong with a line, what helps)."""
    errors = [{**item, "loc": ("body", *item["loc"])} for item in error.errors()]
    if errors[0]["type"] == "json_invalid":
        return errors[0]["msg"], "write one JSON object per line"
    finding = explain(errors, None, Row)[0]
    return f"{finding.param}: {finding.message}" if finding.param else finding.message, finding.fix
