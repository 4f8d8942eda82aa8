"""Checkpoints of a job as they lie in its artifacts, and their download as a tar that is never held in memory."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

from stillhouse.core.blobs import JobArtifacts, read_json, sha256_file
from stillhouse.core.errors import CorruptError, NotFoundError
from stillhouse.core.queue.jobs import JobRecord
from stillhouse.core.schemas import Checkpoint
from stillhouse.gateway.views import timestamp

EXPORT_ID: Final = "ckpt_export"
"""The finished student."""
READ_BYTES: Final = 1 << 20
"""Bytes per read and write of a download."""


def list_checkpoints(job_id: str, artifacts: JobArtifacts, record: JobRecord) -> list[Checkpoint]:
    """Committed checkpoints, oldest first, the export last."""
    found = []
    for manifest in artifacts.epochs.glob("*/manifests/*/manifest.json"):
        epoch, name = manifest.parent.parent.parent.name, manifest.parent.name
        if not epoch.isdigit() or name.startswith("tmp."):
            continue
        try:
            document: dict[str, Any] = read_json(manifest)
            digest = sha256_file(manifest)
        except (NotFoundError, FileNotFoundError, CorruptError):  # deleted meanwhile, or damaged: nothing to offer
            continue
        found.append(
            Checkpoint(
                id=f"ckpt_{epoch}-{name}",
                job_id=job_id,
                kind="checkpoint",
                step=int(document["step"]),
                stage=_stage_name(record, int(document.get("stage", 0))),
                epoch=int(document["epoch"]),
                policy_version=int(document["policy_version"]),
                created_at=timestamp(document["created_at"]),
                size_bytes=int(document["size_bytes"]),
                sha256=digest,
            )
        )
    found.sort(key=lambda checkpoint: (checkpoint.epoch, checkpoint.step))
    return found + _export(job_id, artifacts, record)


def _stage_name(record: JobRecord, index: int) -> str:
    stages = record.spec.get("stages", [])
    return str(stages[index].get("name", "")) if index < len(stages) else ""


def _export(job_id: str, artifacts: JobArtifacts, record: JobRecord) -> list[Checkpoint]:
    folder = artifacts.export(record.epoch)
    if not folder.is_dir():
        return []
    return [
        Checkpoint(
            id=EXPORT_ID,
            job_id=job_id,
            kind="export",
            step=record.step,
            stage=_stage_name(record, len(record.spec.get("stages", [])) - 1),
            epoch=record.epoch,
            policy_version=int((record.weights or {}).get("policy_version", record.step)),
            created_at=timestamp(folder.stat().st_mtime),
            size_bytes=sum(path.stat().st_size for path in _files(folder)),
            sha256="",
        )
    ]


def checkpoint_folder(job_id: str, artifacts: JobArtifacts, record: JobRecord, checkpoint: str) -> Path:
    """Where a checkpoint lies.

    Raises:
        NotFoundError: there is no such checkpoint (any more).
    """
    # the pattern keeps ids from becoming paths elsewhere
    match = re.fullmatch(r"ckpt_([0-9]{1,9})-([a-z0-9-]{1,80})", checkpoint)
    folder = None
    if checkpoint == EXPORT_ID:
        folder = artifacts.export(record.epoch)
    elif match:
        folder = artifacts.manifests(int(match[1])) / match[2]
        folder = folder if (folder / "manifest.json").is_file() else None
    if folder is None or not folder.is_dir():
        raise NotFoundError(
            f"job {job_id} has no checkpoint '{checkpoint}' (any more); see /v1/jobs/{job_id}/checkpoints"
        )
    return folder


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


@dataclass(frozen=True, slots=True)
class _Member:
    header: bytes
    stream: BinaryIO
    size: int


class TarStream:
    """A folder as a tar: its exact size beforehand, then its bytes block by block.

    The files are opened at once, so a checkpoint that is deleted during the download still arrives whole.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._stack = ExitStack()
        self._members: list[_Member] = []
        try:
            for path in _files(folder):
                self._members.append(self._open(path, f"{name}/{path.relative_to(folder)}"))
        except BaseException:
            self._stack.close()
            raise
        self.size = sum(len(m.header) + m.size + _padding(m.size) for m in self._members) + 2 * tarfile.BLOCKSIZE

    def _open(self, path: Path, name: str) -> _Member:
        stream = self._stack.enter_context(path.open("rb"))
        info = tarfile.TarInfo(name)
        info.size = path.stat().st_size
        info.mtime = int(path.stat().st_mtime)
        return _Member(info.tobuf(tarfile.PAX_FORMAT), stream, info.size)

    def close(self) -> None:
        """Close the files; harmless when repeated."""
        self._stack.close()

    def __iter__(self) -> Iterator[bytes]:
        with self._stack:
            for member in self._members:
                yield member.header
                left = member.size
                while left:
                    block = member.stream.read(min(READ_BYTES, left))
                    if not block:
                        raise CorruptError("a file of the checkpoint became shorter during its download")
                    left -= len(block)
                    yield block
                yield b"\0" * _padding(member.size)
            yield b"\0" * (2 * tarfile.BLOCKSIZE)


def _padding(size: int) -> int:
    return -size % tarfile.BLOCKSIZE
