"""The files of a job, read by code of the oracle's own: what wrote them is what is being checked.

The framing of a journal is described in trainer/journal.py: records of uint32 length, xxh3-128 and message; the first
is a StepHeader, the others are JournalRecords.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import xxhash
from google.protobuf.message import DecodeError

from stillhouse.core.blobs import JobArtifacts, read_json, sha256_file, unsealed
from stillhouse.core.errors import CorruptError, NotFoundError
from stillhouse.v1 import journal_pb2, rollout_pb2

MAX_RECORD_BYTES: Final = 256 << 20
"""A sample of 32,768 tokens with every tensor it may carry is far smaller."""
MAX_JSON_BYTES: Final = 64 << 20
_PREFIX: Final = struct.Struct("<I16s")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder below `manifests/` whose manifest.json has the hash that the folder's name says."""

    epoch: int
    name: str
    sha256: str
    folder: Path

    @property
    def step(self) -> int:
        """Optimizer steps behind it."""
        return int(self.name[:8])


@dataclass(frozen=True, slots=True)
class Base:
    """The checkpoint that an opened.json or a manifest names."""

    epoch: int
    name: str
    sha256: str

    @property
    def step(self) -> int:
        return int(self.name[:8])


@dataclass
class Epoch:
    """One claim of the job, as it lies on disk."""

    number: int
    is_opened: bool = False
    """It has an opened.json, whether that verifies or not."""
    damage: str = ""
    """Why its opened.json does not verify."""
    base: Base | None = None
    replay: dict[int, int] = field(default_factory=dict)
    """Step -> epoch of the journal that it trains again."""
    replay_order: list[int] = field(default_factory=list)
    opened_at: float = 0.0
    journals: set[int] = field(default_factory=set)
    checkpoints: list[Checkpoint] = field(default_factory=list)
    """By name."""
    broken: list[tuple[Path, str]] = field(default_factory=list)
    """Folders that look like checkpoints and are none, and why."""

    @property
    def is_readable(self) -> bool:
        return self.is_opened and not self.damage


def read_journal(
    path: Path, max_bytes: int = MAX_RECORD_BYTES
) -> tuple[journal_pb2.StepHeader, list[rollout_pb2.Score]]:
    """Header and scores of a step's journal.

    Raises:
        CorruptError: missing, torn, altered or of another version.
    """
    try:
        records = _records(path, max_bytes)
    except FileNotFoundError:
        raise CorruptError(f"{path} is missing") from None
    try:
        header = journal_pb2.StepHeader.FromString(records[0]) if records else journal_pb2.StepHeader()
        scores = [journal_pb2.JournalRecord.FromString(record).score for record in records[1:]]
    except DecodeError as error:
        raise CorruptError(f"{path}: a record is no message: {error}") from None
    if header.schema_version != 1:
        raise CorruptError(f"{path} has no header of version 1, got version {header.schema_version}")
    if header.num_samples != len(scores):
        raise CorruptError(f"{path} holds {len(scores)} samples, its header says {header.num_samples}")
    return header, scores


def _records(path: Path, max_bytes: int) -> list[bytes]:
    records: list[bytes] = []
    size = path.stat().st_size
    with path.open("rb") as stream:
        while prefix := stream.read(_PREFIX.size):
            at = stream.tell() - len(prefix)
            if len(prefix) < _PREFIX.size:
                raise CorruptError(f"{path} ends inside a record at byte {at}")
            length, digest = _PREFIX.unpack(prefix)
            if length > min(max_bytes, size - stream.tell()):
                raise CorruptError(f"{path}: the record at byte {at} claims {length} bytes of a file of {size}")
            record = stream.read(length)
            if xxhash.xxh3_128_digest(record) != digest:
                raise CorruptError(f"{path}: the record at byte {at} does not match its checksum")
            records.append(record)
    return records


def read_document(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        NotFoundError, CorruptError: there is none, or it is none.
    """
    if path.is_file() and path.stat().st_size > MAX_JSON_BYTES:
        raise CorruptError(f"{path} has {path.stat().st_size} bytes, at most {MAX_JSON_BYTES} are read")
    value = read_json(path)
    if not isinstance(value, dict):
        raise CorruptError(f"{path} is not a JSON object")
    return value


def as_base(value: Any) -> Base | None:
    """The reference to a checkpoint in a document; None if there is none.

    Raises:
        CorruptError: it is no reference.
    """
    if value is None:
        return None
    try:
        base = Base(int(value["epoch"]), str(value["name"]), str(value["sha256"]))
        _ = base.step
    except (KeyError, TypeError, ValueError):
        raise CorruptError(f"{value!r} names no checkpoint") from None
    return base


def read_epochs(artifacts: JobArtifacts) -> dict[int, Epoch]:
    """Every epoch on disk, by number."""
    if not artifacts.epochs.is_dir():
        return {}
    numbers = sorted(int(path.name) for path in artifacts.epochs.iterdir() if path.name.isdigit() and path.is_dir())
    return {number: _read_epoch(artifacts, number) for number in numbers}


def _read_epoch(artifacts: JobArtifacts, number: int) -> Epoch:
    epoch = Epoch(number)
    folder = artifacts.epoch(number)
    # before the opening is read, so that of a running job nothing is seen that the opening does not explain
    for path in sorted((folder / "manifests").glob("*")):
        _read_checkpoint(epoch, path)
    steps = folder / "steps"
    epoch.journals = {int(path.stem) for path in steps.glob("*.journal") if path.stem.isdigit()}
    try:
        opened = unsealed(folder / "opened.json")
        epoch.is_opened = True
        epoch.base = as_base(opened["opened_from"])
        epoch.replay = {int(step): int(source) for source, step in opened["replay"]}
        epoch.replay_order = [int(step) for _, step in opened["replay"]]
        epoch.opened_at = float(opened["opened_at"])
        if opened["epoch"] != number:
            raise CorruptError(f"{folder / 'opened.json'} is of epoch {opened['epoch']}, it lies in epoch {number}")
    except NotFoundError:
        pass
    except CorruptError as error:
        epoch.is_opened, epoch.damage = True, error.message
    except (KeyError, TypeError, ValueError) as error:
        epoch.is_opened, epoch.damage = True, f"{folder / 'opened.json'} lacks a field: {error!r}"
    return epoch


def _read_checkpoint(epoch: Epoch, path: Path) -> None:
    """Add a folder to the epoch's checkpoints, or to what is broken."""
    name = path.name
    if name.startswith(("tmp.", ".")):
        return
    if not (path.is_dir() and name[:8].isdigit() and name[8:9] == "-"):
        epoch.broken.append((path, "it is no checkpoint"))
        return
    try:
        digest = sha256_file(path / "manifest.json")
    except OSError:
        if path.is_dir():  # else retention took it away this very moment
            epoch.broken.append((path, "it has no manifest.json"))
        return
    if name[9:] != digest[:8]:
        epoch.broken.append((path, f"its manifest.json has sha256 {digest[:8]}, its name says {name[9:]}"))
        return
    epoch.checkpoints.append(Checkpoint(epoch.number, name, digest, path))
