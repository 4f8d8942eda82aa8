"""Bytes on disk: hashes, atomic durable writes, and where everything of a job lies.

Layout below the artifacts folder:

    files/{file_id}.jsonl                       uploaded prompts
    jobs/{job_id}/job.json                      the spec as accepted; written before the create call answers
                  references.json               which checkpoints and models the job's references mean
                  events.jsonl metrics.jsonl    the job's history
                  evaluations/{step}.json       held-out measurements
                  epochs/{epoch}/opened.json    which manifest this claim opened from; created exclusively
                                 steps/{step}.journal     what the step trained on, fsynced before training
                                 manifests/{step}-{sha8}/ manifest.json, weights, optimizer, random states
                                 export/                  the finished student, if this claim ended the job
                                 closed.json              how the claim ended, if its trainer lived to say it
                  models/ckpt_...{.json,/}      checkpoints that jobs use as models: see core/checkpoints.py
                  pinned.json                   checkpoints that were marked as best
                  logs/{service}-{instance}.jsonl  what services logged about the job: see core/job_logs.py
                  paused.json                   the user's wish that the job rests, until it is resumed
                  best_checkpoint.json          the best by held-out evaluation so far: core/evaluations.py
                  stop.json                     after how many steps evaluations end the job early
                  final.json                    how the job ended
                  report.json report.html       the same and all that led there, for people

    deleted/{job_id}/                           a job that is being deleted

Nothing here knows about models or queues.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import xxhash

from stillhouse.core.errors import CorruptError, NotFoundError
from stillhouse.core.failpoints import failpoint

HASH_BLOCK_BYTES = 1 << 22
"""Read size while hashing: large enough that Python's overhead vanishes, small enough to stay in cache."""


def new_id(prefix: str) -> str:
    """A fresh, unguessable id such as `job_3f9c...` (80 random bits)."""
    return f"{prefix}_{secrets.token_hex(10)}"


def sha256_file(path: Path) -> str:
    """sha256 of a file, hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def sha256_bytes(data: bytes) -> str:
    """sha256 of bytes, hex."""
    return hashlib.sha256(data).hexdigest()


def xxh3(data: bytes | bytearray | memoryview) -> str:
    """xxh3-128 of bytes, hex: the integrity check of payloads in transit, 18 times faster than sha256."""
    return xxhash.xxh3_128_hexdigest(data)


def fsync_dir(path: Path) -> None:
    """Make renames and creations in a folder durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_file(path: Path) -> None:
    """Make a file that another library wrote durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_dirs(folder: Path) -> None:
    """Create a folder and those above it, durably: a folder whose name is not synced is lost with its files."""
    if folder.is_dir():
        return
    make_dirs(folder.parent)
    folder.mkdir(exist_ok=True)
    fsync_dir(folder.parent)


def write_atomic(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Replace `path` by `data`, durably: temp, fsync, rename, fsync of the folder. A reader sees old or new."""
    make_dirs(path.parent)
    temp = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(fd, "wb") as stream:
            stream.write(data)
            stream.flush()
            failpoint("disk.written", path.name)
            os.fsync(stream.fileno())
        failpoint("disk.synced", path.name)
        temp.rename(path)
        failpoint("disk.renamed", path.name)
    except BaseException:
        temp.unlink(missing_ok=True)
        raise
    fsync_dir(path.parent)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock that lies in a file, against other processes and threads: for what is read, changed and written
    again. Blocks; the kernel gives it back at any kind of death."""
    make_dirs(path.parent)
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def write_json(path: Path, value: Any, *, mode: int = 0o644) -> None:
    """`write_atomic` of pretty JSON."""
    write_atomic(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode(), mode=mode)


def read_json(path: Path) -> Any:
    """JSON of a file.

    Raises:
        NotFoundError: there is none.
        CorruptError: it does not parse.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise NotFoundError(f"{path} does not exist") from None
    except ValueError as error:
        raise CorruptError(f"{path} is not valid JSON: {error}") from None


SEAL = "sha256"
"""Key of a sealed document's own hash."""


def sealed(document: dict[str, Any]) -> dict[str, Any]:
    """The document with the hash of everything else in it, for files that nothing else names by hash."""
    return {**document, SEAL: _seal(document)}


def sealed_line(texts: Mapping[str, str]) -> bytes:
    """A sealed document in one line, of the JSON text of each of its values (keys of objects sorted): what is large
    and known as text is not encoded again."""
    inner = ", ".join(f'"{name}": {texts[name]}' for name in sorted(texts))
    return f'{{{inner}, "{SEAL}": "{sha256_bytes(f"{{{inner}}}".encode())}"}}\n'.encode()


def unsealed(path: Path) -> dict[str, Any]:
    """A sealed document, verified.

    Raises:
        NotFoundError: there is none.
        CorruptError: it does not parse, or its hash does not match.
    """
    document = read_json(path)
    if not isinstance(document, dict) or document.pop(SEAL, None) != _seal(document):
        raise CorruptError(f"{path} does not match its own hash")
    return document


def _seal(document: dict[str, Any]) -> str:
    return sha256_bytes(json.dumps(document, sort_keys=True).encode())


NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
"""A full disk, and a user's share of it that is used up."""
UNWRITTEN_LINES = 10_000
"""Lines of one history file that wait for room on a full disk; older ones are dropped."""
_unwritten: dict[Path, list[bytes]] = {}


def is_no_space(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is a full disk. Libraries in Rust say so in the text of errors only."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            return True
        if any(f"(os error {code})" in str(error) for code in NO_SPACE):
            return True
        error = error.__cause__ or error.__context__
    return False


def append_jsonl(path: Path, values: list[dict[str, Any]]) -> None:
    """Append lines to a history file. Not fsynced: it may lose its last second, truth lies elsewhere.

    On a full disk the lines are kept, up to UNWRITTEN_LINES, and appended by a later call.
    """
    lines = _unwritten.pop(path, [])
    lines += [json.dumps(value, separators=(",", ":")).encode() + b"\n" for value in values]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        written = append_lines(path, b"".join(lines))
    except OSError as error:
        if not is_no_space(error):
            raise
        written = 0
    while lines and written >= len(lines[0]):
        written -= len(lines.pop(0))
    if lines:
        _unwritten[path] = lines[-UNWRITTEN_LINES:]


def append_lines(path: Path, data: bytes) -> int:
    """Append as much as there is room for; returns how many bytes of `data` that was."""
    with path.open("a+b", buffering=0) as stream:
        end = stream.seek(0, os.SEEK_END)
        # a writer that died or had no room in the middle of a line must not spoil ours
        is_torn = end > 0 and os.pread(stream.fileno(), 1, end - 1) != b"\n"
        return max(0, (stream.write(b"\n" + data if is_torn else data) or 0) - is_torn)


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Complete lines of a history file; torn ones are skipped."""
    if not path.is_file():
        return
    with path.open("rb") as stream:
        for line in stream:
            if not line.endswith(b"\n"):
                continue
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict):
                yield value


@dataclass
class Staged:
    """A folder in the making."""

    path: Path
    """Write here."""
    target: Path
    """It becomes this; may be changed until the block ends."""


@contextmanager
def staged_dir(target: Path) -> Iterator[Staged]:
    """A temporary sibling folder that becomes `target` when the block ends well; files in it are fsynced first.

    Raises:
        FileExistsError: `target` exists: committed folders are never overwritten.
    """
    make_dirs(target.parent)
    staged = Staged(target.with_name(f"tmp.{target.name}.{secrets.token_hex(4)}"), target)
    staged.path.mkdir()
    try:
        yield staged
        failpoint("disk.written", staged.target.name)
        for path in sorted(staged.path.rglob("*")):
            if path.is_file():
                fsync_file(path)
        fsync_dir(staged.path)
        if staged.target.exists():
            raise FileExistsError(f"{staged.target} is already committed")
        failpoint("disk.synced", staged.target.name)
        staged.path.rename(staged.target)
        failpoint("disk.renamed", staged.target.name)
    except BaseException:
        shutil.rmtree(staged.path, ignore_errors=True)
        raise
    fsync_dir(target.parent)


def remove_temporaries(folder: Path, until: float) -> int:
    """Delete what writes that never ended left below `folder`, as long as it is not younger than `until` (unix time).

    A process that was only frozen fails when it goes on to rename its file: it had lost its claim long before.
    """
    removed = 0
    for path in [*folder.rglob("tmp.*"), *folder.rglob(".*.tmp")]:
        with suppress(FileNotFoundError):  # it lay in a folder that has just gone
            if path.stat().st_mtime <= until:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                removed += 1
    return removed


class Artifacts:
    """Paths below the artifacts folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def job(self, job_id: str) -> JobArtifacts:
        """The folder of one job."""
        return JobArtifacts(self.root / "jobs" / job_id)

    def file(self, file_id: str) -> Path:
        """An uploaded file."""
        return self.root / "files" / f"{file_id}.jsonl"

    @property
    def deleted(self) -> Path:
        """Folders of jobs that are being deleted, by id."""
        return self.root / "deleted"

    def job_ids(self) -> list[str]:
        """Jobs that have an accepted spec on disk."""
        return sorted(path.parent.name for path in (self.root / "jobs").glob("*/job.json"))


def _below(name: str) -> cached_property[Path]:
    """A path below `root`, made when it is asked for: most callers want one of many."""

    def path(job: JobArtifacts) -> Path:
        return job.root / name

    return cached_property(path)


class JobArtifacts:
    """Paths of one job."""

    job_json = _below("job.json")
    events = _below("events.jsonl")
    metrics = _below("metrics.jsonl")
    evaluations = _below("evaluations")
    epochs = _below("epochs")
    references = _below("references.json")
    models = _below("models")
    logs = _below("logs")
    pinned = _below("pinned.json")
    best_checkpoint = _below("best_checkpoint.json")
    stop = _below("stop.json")
    final = _below("final.json")
    paused = _below("paused.json")
    preflight = _below("preflight.json")

    def __init__(self, root: Path) -> None:
        self.root = root

    def epoch(self, epoch: int) -> Path:
        """Folder of one claim of the job."""
        return self.epochs / str(epoch)

    def highest_epoch(self) -> int:
        """Newest epoch that was opened; 0 = none."""
        if not self.epochs.is_dir():
            return 0
        return max((int(path.name) for path in self.epochs.iterdir() if path.name.isdigit()), default=0)

    def journal(self, epoch: int, step: int) -> Path:
        """Step journal: the samples that step `step` trains on."""
        return self.epoch(epoch) / "steps" / f"{step:08d}.journal"

    def export(self, epoch: int) -> Path:
        """The finished student, written by the claim that ended the job. Of its epoch, so that no zombie's is taken."""
        return self.epoch(epoch) / "export"

    def manifests(self, epoch: int) -> Path:
        """Folder of the checkpoints committed in an epoch."""
        return self.epoch(epoch) / "manifests"
