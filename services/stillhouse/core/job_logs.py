"""What services log about a job, kept beside its artifacts: `jobs/{id}/logs/{service}-{instance}.jsonl`.

A line of a log that names a job goes there, too; so does the traceback of a crash, to the job that the process works
for. A thread writes, so that a slow or full disk holds nobody up: then lines are dropped. A file that is full becomes
`....old.jsonl`, in place of the one before.

An id is `{nanoseconds}-{tag}`: of one process ever larger, of several in the order of their clocks. The tag is the
file's.
"""

from __future__ import annotations

import itertools
import json
import os
import queue
import re
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final

from stillhouse.core.blobs import Artifacts, append_lines

MAX_FILE_BYTES: Final = 4 << 20
"""Of one process and job there are two such files at most: some 50,000 lines."""
MAX_TEXT: Final = 16_000
"""Longest value in a line, characters: of a longer traceback the end says more."""
MAX_WAITING: Final = 2_000
"""Lines that wait for the disk; further ones are dropped."""
TAIL_BYTES: Final = 1 << 20
"""Read of each file when only its last lines are wanted."""
NEAR_BYTES: Final = 1 << 16
"""So near to a place in a file is good enough: what is read too much is left out."""
_JOB: Final = re.compile(r"job_[a-z0-9]{8,40}")  # what does not match never becomes a path
_APART: Final = frozenset({"event", "level", "timestamp", "service", "instance", "job_id"})


class JobLogs:
    """A structlog processor: changes nothing, keeps what concerns a job."""

    def __init__(self, artifacts: Artifacts, service: str, instance: str, secrets: Iterable[str] = ()) -> None:
        self._artifacts = artifacts
        self._service, self._instance = service, instance
        self._name = re.sub(r"[^A-Za-z0-9._-]", "-", f"{service}-{instance}")[:120]
        self._tag = f"{zlib.crc32(self._name.encode()):08x}"
        self._secrets = sorted({secret for secret in secrets if secret}, key=len, reverse=True)
        self._waiting: queue.Queue[tuple[str, bytes]] = queue.Queue(MAX_WAITING)
        self._thread: threading.Thread | None = None
        self._last_ns = 0
        self.current: Callable[[], str] = lambda: ""
        """The job that the process works for."""

    def __call__(self, _logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        job_id = str(event.get("job_id") or (self.current() if "exception" in event else ""))
        if _JOB.fullmatch(job_id):
            try:
                self._waiting.put_nowait((job_id, self._line(event)))
            except queue.Full:
                return event
            if self._thread is None:
                self._thread = threading.Thread(target=self._write_forever, name="job logs", daemon=True)
                self._thread.start()
        return event

    def flush(self, timeout_s: float = 2.0) -> None:
        """Wait until the disk has what was logged, before a process ends."""
        until = time.monotonic() + timeout_s
        while self._waiting.unfinished_tasks and time.monotonic() < until:
            time.sleep(0.01)

    def _line(self, event: Mapping[str, Any]) -> bytes:
        self._last_ns = max(time.time_ns(), self._last_ns + 1)
        line = {
            "id": f"{self._last_ns}-{self._tag}",
            "created_at": self._last_ns / 1e9,
            "service": str(event.get("service", self._service)),
            "instance": str(event.get("instance", self._instance)),
            "level": str(event.get("level", "info")),
            "message": _short(event.get("event", "")),
            "data": {name: _short(value) for name, value in event.items() if name not in _APART},
        }
        text = json.dumps(line, separators=(",", ":"))
        for secret in self._secrets:
            text = text.replace(json.dumps(secret)[1:-1], "***")
        return text.encode() + b"\n"

    def _write_forever(self) -> None:
        """consumes: lines; waits for: the next one; produces: files; unblocked by: a line. Ends with the process."""
        while True:
            job_id, line = self._waiting.get()
            try:
                self._write(job_id, line)
            except OSError:  # a full disk, or a job that is being deleted: its log is the least that is lost
                pass
            finally:
                self._waiting.task_done()

    def _write(self, job_id: str, line: bytes) -> None:
        job = self._artifacts.job(job_id)
        if not job.root.is_dir():
            return
        job.logs.mkdir(exist_ok=True)
        path = job.logs / f"{self._name}.jsonl"
        if path.is_file() and path.stat().st_size + len(line) > MAX_FILE_BYTES:
            path.rename(job.logs / f"{self._name}.old.jsonl")
        append_lines(path, line)


def _short(value: Any) -> Any:
    """As JSON has it, and not too long."""
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if value - value == 0 else str(value)
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= MAX_TEXT else f"... {text[-MAX_TEXT:]}"


# -- reading -----------------------------------------------------------------------------------------------------------


def order(line_id: str) -> tuple[int, str]:
    """Place of a line among all of a job."""
    nanoseconds, _, tag = line_id.partition("-")
    return int(nanoseconds or 0), tag


@dataclass
class LogReader:
    """The lines of a job's services, each once, as they come. `service`: a role or an instance; '' = all."""

    folder: Path
    service: str = ""
    _offsets: dict[int, int] = field(default_factory=dict)
    """inode -> bytes read: a file that is full keeps it under its new name."""

    def read(self, *, only_tails: bool = False, after: str = "", most: int | None = None) -> list[dict[str, Any]]:
        """Lines that came since the last call, in order of their ids.

        The first call may skip what is old: `only_tails` = of long files the end, `after` = lines up to that id. With
        `most`, of each file no more than the first so many.
        """
        found: list[dict[str, Any]] = []
        for path in self.folder.glob("*.jsonl"):
            try:
                lines = self._new_lines(path, TAIL_BYTES if only_tails else 0, after)
                wanted = (line for line in lines if self._is_wanted(line) and order(line["id"]) > order(after))
                found += itertools.islice(wanted, most)
            except FileNotFoundError:  # it has just become the old one: read under that name, or next time
                continue
        return sorted(found, key=lambda line: order(line["id"]))

    def _is_wanted(self, line: Mapping[str, Any]) -> bool:
        return not self.service or self.service in (line["service"], line["instance"])

    def _new_lines(self, path: Path, tail: int, after: str) -> Iterator[dict[str, Any]]:
        facts = path.stat()
        if self._offsets.get(facts.st_ino) == facts.st_size:  # as mostly, when it is followed
            return
        with path.open("rb") as stream:
            facts = os.fstat(stream.fileno())
            begin = self._offsets.get(facts.st_ino, 0)
            if begin > facts.st_size:  # another file with the same inode
                begin = 0
            if after and not begin:
                begin = _behind(stream, facts.st_size, order(after))
            place = max(begin, facts.st_size - tail) if tail else begin
            stream.seek(place)
            while place < facts.st_size and (text := stream.readline()).endswith(b"\n"):
                place += len(text)
                self._offsets[facts.st_ino] = place  # what is being written at this moment comes next time
                if line := _parsed(text):
                    yield line


def _behind(stream: BinaryIO, size: int, after: tuple[int, str]) -> int:
    """Where the lines behind an id begin, or a little before: ids of a file ever grow, so halves are enough to look at.

    A line that does not tell its id counts as one behind.
    """
    low, high = 0, size
    while high - low > NEAR_BYTES:
        middle = (low + high) // 2
        stream.seek(middle)
        stream.readline()  # the rest of a line
        line = _parsed(stream.readline())
        if line is not None and order(line["id"]) <= after:
            low = middle
        else:
            high = middle
    stream.seek(low)
    if low:
        stream.readline()
    return stream.tell()


def _parsed(text: bytes) -> dict[str, Any] | None:
    """None = torn, or no line of ours."""
    try:
        line = json.loads(text)
        order(line["id"])
        return line if isinstance(line["data"], dict) else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
