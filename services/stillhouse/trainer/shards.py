"""Tensors in safetensors files, split by rows: each rank writes its own rows, any number of ranks reads them again.

    model.safetensors                                                     one rank
    model-00001-of-00002.safetensors  model-00002-of-00002.safetensors    two: the first rows and the rest

The names say how many parts there are, the header of each part how many rows of every tensor it holds: together they
are the index. A tensor without dimensions (a step count) is the same in all parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stillhouse.core.blobs import fsync_file
from stillhouse.core.errors import CorruptError


@dataclass(frozen=True, slots=True)
class Share:
    """The rows of every tensor that a process holds: part `rank` of `size` equal ones, the last of them shorter."""

    rank: int = 0
    size: int = 1

    def bounds(self, rows: int) -> tuple[int, int]:
        """First row and the row after the last, of a tensor with so many."""
        part = -(-rows // self.size)
        return min(rows, self.rank * part), min(rows, (self.rank + 1) * part)

    def file(self, stem: str) -> str:
        """Name of the file that holds it."""
        return f"{stem}.safetensors" if self.size == 1 else f"{stem}-{self.rank + 1:05d}-of-{self.size:05d}.safetensors"


def write(folder: Path, stem: str, tensors: Mapping[str, Tensor], share: Share) -> None:
    """Write the rows that are here, durably."""
    path = folder / share.file(stem)
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)
    fsync_file(path)


def read(folder: Path, stem: str, share: Share) -> dict[str, Tensor]:
    """The rows of `share` of all tensors, whatever the number of ranks that wrote them.

    Raises:
        CorruptError: a file is missing or does not read.
    """
    paths = _paths(folder, stem)
    try:
        with ExitStack() as stack:
            parts = [stack.enter_context(safe_open(path, framework="pt")) for path in paths]
            names = list(parts[0].keys())
            if any(set(part.keys()) != set(names) for part in parts):
                raise CorruptError(
                    f"{folder}: the parts of '{stem}' hold different tensors; they are of two checkpoints"
                )
            return {name: _rows([part.get_slice(name) for part in parts], share) for name in names}
    except FileNotFoundError as error:
        raise CorruptError(f"{error}; a checkpoint has all of its files or is none") from None
    except SafetensorError as error:
        raise CorruptError(f"{folder}, '{paths[0].name}' or another part of it, does not read: {error}") from None


def _paths(folder: Path, stem: str) -> list[Path]:
    found = sorted(folder.glob(f"{stem}-*-of-*.safetensors"))
    size = int(found[0].stem.rpartition("-")[2]) if found else 1
    paths = [folder / Share(rank, size).file(stem) for rank in range(size)]
    for path in paths:
        if not path.is_file():
            raise CorruptError(f"{path} is missing; a checkpoint has all of its files or is none")
    return paths


def _rows(parts: Sequence[Any], share: Share) -> Tensor:
    """The rows of `share` of a tensor that lies in these slices, one after the other."""
    if not parts[0].get_shape():
        return parts[0][...]
    counts = [int(part.get_shape()[0]) for part in parts]
    start, stop = share.bounds(sum(counts))
    pieces, first = [], 0
    for part, count in zip(parts, counts, strict=True):
        begin, end = max(start, first) - first, min(stop, first + count) - first
        if begin < end:
            pieces.append(part[begin:end])
        first += count
    return torch.cat(pieces) if pieces else parts[0][0:0]
