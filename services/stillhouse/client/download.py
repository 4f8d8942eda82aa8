"""Downloads that go on where they were interrupted, in this process or in another one.

    .NAME.part          the bytes that have come, beside the target NAME
    .NAME.part.json     of what: {"source", "etag", "size_bytes"}

The gateway is asked for the rest with Range and If-Range, so that what has changed meanwhile comes anew.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from stillhouse.client import unpack
from stillhouse.client.calls import Call
from stillhouse.client.errors import ApiError
from stillhouse.client.resource import tell
from stillhouse.client.sender import Sender, is_passing
from stillhouse.core.errors import ConflictError, CorruptError, StillhouseError, UnavailableError


class Part:
    """What has come of a download."""

    def __init__(self, target: Path, source: str, stream: BinaryIO) -> None:
        self._stream = stream
        self._facts_file = _facts_file(target)
        self._source = source
        facts = self._facts()
        self.etag = str(facts.get("etag", ""))
        """Strong ETag of what comes; '' = none is known, so that nothing can be continued."""
        self.total: int | None = facts.get("size_bytes")
        """Bytes of the whole; None = not known."""
        self.size = stream.seek(0, os.SEEK_END)
        if not self.etag:
            self.restart()

    def _facts(self) -> dict[str, Any]:
        try:
            facts = json.loads(self._facts_file.read_bytes())
        except (OSError, ValueError):
            return {}
        return facts if isinstance(facts, dict) and facts.get("source") == self._source else {}

    @property
    def is_whole(self) -> bool:
        return self.total is not None and self.size == self.total

    def headers(self) -> dict[str, str]:
        """Asks for what is missing."""
        plain = {"Accept-Encoding": "identity"}
        return plain | ({"Range": f"bytes={self.size}-", "If-Range": self.etag} if self.size else {})

    def accept(self, status: int, headers: Mapping[str, str]) -> None:
        """Prepare for the bytes of an answer: the rest (206), or all of it anew."""
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", headers.get("content-range", ""))
        if status == 206 and found and int(found[1]) == self.size:
            self.total = int(found[2])
            return
        self.restart()
        if status == 206:
            raise UnavailableError(f"asked for bytes from {self.size}, got {headers.get('content-range')}")
        length, etag = headers.get("content-length", ""), headers.get("etag", "")
        self.total = int(length) if length.isdigit() else None
        self.etag = "" if etag.startswith("W/") else etag
        facts = {"source": self._source, "etag": self.etag, "size_bytes": self.total}
        self._facts_file.write_text(json.dumps(facts))

    def write(self, block: bytes) -> None:
        """Add bytes."""
        self._stream.write(block)
        self.size += len(block)

    def restart(self) -> None:
        """Forget what has come."""
        self._stream.seek(0)
        self._stream.truncate()
        self.size, self.total, self.etag = 0, None, ""

    def finish(self) -> None:
        """Everything has come."""
        self._stream.flush()
        os.fsync(self._stream.fileno())


@contextmanager
def open_part(target: Path, source: str) -> Iterator[Part]:
    """The part of a target; for one process at a time. It stays for the next attempt unless it has been used up.

    Raises:
        ConflictError: somebody else downloads to this target.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with part_file(target).open("a+b") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConflictError(f"another download to {target} is going on; choose another place") from None
        yield Part(target, source, stream)


def part_file(target: Path) -> Path:
    """Where the bytes of an interrupted download are."""
    return target.parent / f".{target.name}.part"


def _facts_file(target: Path) -> Path:
    return target.parent / f".{target.name}.part.json"


async def download(
    sender: Sender, call: Call[Any], target: Path, on_progress: Callable[[int, int | None], object] | None
) -> Path:
    """Fetch a tar into the new folder `target`, or as a file `*.tar`."""
    unpack.check_target(target)
    with open_part(target, f"{sender.target.url}{call.path}") as part:
        unpack.check_target(target)  # of another process that was faster
        await _fetch(sender, call, part, on_progress)
        try:
            await sender.transport.work(unpack.place, part_file(target), target)
        except CorruptError:
            part.restart()
            raise
        part_file(target).unlink(missing_ok=True)
        _facts_file(target).unlink(missing_ok=True)
    return target


async def _fetch(
    sender: Sender, call: Call[Any], part: Part, on_progress: Callable[[int, int | None], object] | None
) -> None:
    """All bytes, over as many connections as it takes; each that brings some renews the patience."""
    patience = sender.patience()
    while not part.is_whole:
        begun_at = part.size
        try:
            async with sender.stream(replace(call, headers=part.headers()), patience) as stream:
                part.accept(stream.response.status_code, stream.response.headers)
                async for block in stream.blocks():
                    part.write(block)
                    await tell(on_progress, part.size, part.total)
            if part.is_whole or part.total is None:
                break
            problem: StillhouseError = UnavailableError(f"the download ended after {part.size} of {part.total} bytes")
        except StillhouseError as error:
            if isinstance(error, ApiError) and error.status == 416:  # there is less than we have: begin anew
                part.restart()
            elif not is_passing(error):
                raise
            problem = error
        if part.size > begun_at:
            patience = sender.patience()
        await sender.again(patience, problem)
    await sender.transport.work(part.finish)
