"""Score payloads waiting to be fetched: in memory, and on disk when there are many. Lost with the process, on purpose.

A payload lives:  put -> fetched and released | dropped with its epoch | dropped when too old (direct scores only)
Nothing here is a bottleneck by design: admission is the loop's slots, so this store takes what comes and spills.
"""

from __future__ import annotations

import secrets
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from stillhouse.core.blobs import xxh3
from stillhouse.core.errors import NotFoundError
from stillhouse.core.metrics import BLOB_BYTES
from stillhouse.core.queue.streams import Scope
from stillhouse.core.rpc import CHUNK_BYTES, chunks
from stillhouse.core.spill import SpillFolder
from stillhouse.v1 import tensor_pb2


@dataclass(frozen=True, slots=True)
class _Blob:
    scope: Scope
    size_bytes: int
    data: bytes | None
    """None = on disk."""
    path: Path | None
    made_at: float = field(default_factory=time.monotonic)


class BlobStore:
    """Payloads by random key, scoped to job and epoch."""

    def __init__(self, instance: str, memory_bytes: int, spill: Path | None = None) -> None:
        self._instance = instance
        self._spill = spill
        """Where payloads go that memory has no room for; None = where the system puts temporary files."""
        self._memory_bytes = memory_bytes
        self._blobs: dict[str, _Blob] = {}
        self._folder: SpillFolder | None = None
        self.in_memory_bytes = 0
        self.total_bytes = 0

    def put(self, scope: Scope, payload: bytes) -> tensor_pb2.BlobRef:
        """Keep a payload; returns its reference."""
        key = secrets.token_hex(16)
        if self.in_memory_bytes + len(payload) <= self._memory_bytes:
            self._blobs[key] = _Blob(scope, len(payload), payload, None)
            self.in_memory_bytes += len(payload)
        else:
            path = self._spill_folder() / key
            try:
                path.write_bytes(payload)
            except OSError:  # a full disk: the claim goes back, and another teacher or a later time scores it
                path.unlink(missing_ok=True)
                raise
            self._blobs[key] = _Blob(scope, len(payload), None, path)
        self._count(len(payload))
        return tensor_pb2.BlobRef(
            instance=self._instance,
            key=key,
            size_bytes=len(payload),
            xxh3_128=xxh3(payload),
            job_id=scope.job_id,
            epoch=scope.epoch,
        )

    def read(self, ref: tensor_pb2.BlobRef) -> Iterator[tuple[int, bytes]]:
        """(offset, part) pairs of a payload.

        Raises:
            NotFoundError: released, of a closed epoch, of another process, or never there.
        """
        blob = self._blobs.get(ref.key)
        if blob is None or blob.scope != Scope(ref.job_id, ref.epoch):
            raise NotFoundError(
                f"payload {ref.key[:8]} of job {ref.job_id} epoch {ref.epoch} is not (or no longer) held by "
                f"{self._instance}; have the rollout scored again"
            )
        return chunks(blob.data) if blob.data is not None else _read_file(blob.path)

    def release(self, key: str) -> None:
        """Drop a payload."""
        blob = self._blobs.pop(key, None)
        if blob is None:
            return
        if blob.path is not None:
            blob.path.unlink(missing_ok=True)
        else:
            self.in_memory_bytes -= blob.size_bytes
        self._count(-blob.size_bytes)

    def scopes(self) -> set[Scope]:
        """Claims of jobs that payloads are held for."""
        return {blob.scope for blob in self._blobs.values()}

    def drop(self, scope: Scope, older_than_s: float = 0.0) -> int:
        """Drop the payloads of a scope that are at least so old; returns how many."""
        limit = time.monotonic() - older_than_s
        found = [key for key, blob in self._blobs.items() if blob.scope == scope and blob.made_at <= limit]
        for key in found:
            self.release(key)
        return len(found)

    def close(self) -> None:
        """Drop everything."""
        for key in list(self._blobs):
            self.release(key)
        if self._folder is not None:
            self._folder.close()
            self._folder = None

    def _count(self, change: int) -> None:
        self.total_bytes += change
        BLOB_BYTES.set(self.total_bytes)

    def _spill_folder(self) -> Path:
        if self._folder is None:
            parent = self._spill or Path(tempfile.gettempdir()) / "stillhouse-spill"
            self._folder = SpillFolder(parent, "scores")
        return self._folder.path


def _read_file(path: Path | None) -> Iterator[tuple[int, bytes]]:
    assert path is not None, "a payload is in memory or on disk"
    # opened now, so that a release meanwhile does not cut the reader off
    stream = path.open("rb")

    def parts() -> Iterator[tuple[int, bytes]]:
        with stream:
            offset = 0
            while data := stream.read(CHUNK_BYTES):
                yield offset, data
                offset += len(data)

    return parts()
