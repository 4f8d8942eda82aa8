"""A folder as a tar that is never held in memory, nor made on disk: any piece of it can be computed by itself."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from stillhouse.core.errors import CorruptError

READ_BYTES: Final = 1 << 20
"""Bytes per read and write of a download."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """Some bytes of the tar: given, or the content of a file."""

    size: int
    data: bytes = b""
    stream: BinaryIO | None = None

    def read(self, part: range) -> Iterator[bytes]:
        if self.stream is None:
            yield self.data[part.start : part.stop]
            return
        self.stream.seek(part.start)
        left = len(part)
        while left:
            block = self.stream.read(min(READ_BYTES, left))
            if not block:
                raise CorruptError("a file of the checkpoint became shorter during its download")
            left -= len(block)
            yield block


class TarStream:
    """A folder as a tar: its exact size beforehand, then its bytes block by block.

    The files are opened at once, so a checkpoint that is deleted during the download still arrives whole. The same
    folder gives the same bytes every time; `etag` names them: by names, sizes and times of all files, and by the
    manifest, which has their hashes.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._stack = ExitStack()
        self._pieces: list[_Piece] = []
        digest = hashlib.sha256()
        try:
            for path in files_of(folder):
                digest.update(self._add(path, f"{name}/{path.relative_to(folder)}"))
        except BaseException:
            self._stack.close()
            raise
        self._pieces.append(_Piece(2 * tarfile.BLOCKSIZE, bytes(2 * tarfile.BLOCKSIZE)))
        self.size = sum(piece.size for piece in self._pieces)
        self.etag = f'"{digest.hexdigest()[:40]}"'

    def _add(self, path: Path, name: str) -> bytes:
        """Add a file; gives what identifies it."""
        stream = self._stack.enter_context(path.open("rb"))
        facts = path.stat()
        info = tarfile.TarInfo(name)
        info.size, info.mtime = facts.st_size, int(facts.st_mtime)
        header, padding = info.tobuf(tarfile.PAX_FORMAT), bytes(-info.size % tarfile.BLOCKSIZE)
        self._pieces += [
            _Piece(len(header), header),
            _Piece(info.size, stream=stream),
            _Piece(len(padding), padding),
        ]
        manifest = path.read_bytes() if path.name == "manifest.json" else b""
        return header + str(facts.st_mtime_ns).encode() + manifest

    def close(self) -> None:
        """Close the files; harmless when repeated."""
        self._stack.close()

    def __iter__(self) -> Iterator[bytes]:
        return self.read(range(self.size))

    def read(self, wanted: range) -> Iterator[bytes]:
        """These bytes of the tar, block by block; closes the files at the end."""
        with self._stack:
            start = 0
            for piece in self._pieces:
                first, last = max(wanted.start - start, 0), min(wanted.stop - start, piece.size)
                if first < last:
                    yield from piece.read(range(first, last))
                start += piece.size


def files_of(folder: Path) -> list[Path]:
    """The files of a folder, in the order of the tar."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
