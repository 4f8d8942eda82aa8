"""A safetensors file by hand: header, bounds, and whether every number is finite. Without torch or the library.

uint64 N (little-endian) | N bytes of JSON {name: {dtype, shape, data_offsets}} | data
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import xxhash

from stillhouse.core.errors import CorruptError

MAX_HEADER_BYTES: Final = 8 << 20
BLOCK_ELEMENTS: Final = 1 << 21
"""Elements looked at at once."""
_SIZES: Final = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
# dtype -> (unsigned view, exponent bits): all of them set = NaN or infinity
_EXPONENTS: Final[dict[str, tuple[str, int]]] = {
    "F64": ("<u8", 0x7FF0_0000_0000_0000),
    "F32": ("<u4", 0x7F80_0000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor of a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    """Offset of its first byte in the file."""
    end: int


def read_header(path: Path) -> list[TensorEntry]:
    """The tensors of a file.

    Raises:
        CorruptError: the file is not what its header says.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        prefix = stream.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise CorruptError(f"{path}: a header of {length} bytes in a file of {size}")
        raw = stream.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        entries = [_entry(path, name, facts, 8 + length, size) for name, facts in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptError(f"{path}: the header does not parse: {error}") from None
    position = 8 + length
    for entry in sorted(entries, key=lambda entry: entry.begin):
        if entry.begin != position:
            raise CorruptError(f"{path}: '{entry.name}' begins at byte {entry.begin}, expected {position}")
        position = entry.end
    if position != size:
        raise CorruptError(f"{path}: {size} bytes, its header describes {position}")
    return entries


def _entry(path: Path, name: str, facts: dict[str, Any], start: int, size: int) -> TensorEntry:
    begin, end = (int(offset) + start for offset in facts["data_offsets"])
    dtype, shape = facts["dtype"], tuple(int(n) for n in facts["shape"])
    width = _SIZES.get(dtype)
    if width is not None and end - begin != math.prod(shape) * width:
        raise CorruptError(f"{path}: '{name}' has {end - begin} bytes for {dtype} {list(shape)}")
    if not start <= begin <= end <= size:
        raise CorruptError(f"{path}: '{name}' lies at {begin}..{end} of {size} bytes")
    return TensorEntry(name, dtype, shape, begin, end)


def non_finite(path: Path) -> dict[str, int]:
    """Tensor name -> how many of its elements are NaN or infinite; empty = all is finite."""
    found = {}
    for entry in read_header(path):
        number = sum(_count(block, entry.dtype) for block in _blocks(path, entry))
        if number:
            found[entry.name] = number
    return found


def _count(block: np.ndarray, dtype: str) -> int:
    if dtype not in _EXPONENTS:
        return 0
    view, mask = _EXPONENTS[dtype]
    bits = block.view(view)
    return int(np.count_nonzero((bits & bits.dtype.type(mask)) == bits.dtype.type(mask)))


def _blocks(path: Path, entry: TensorEntry) -> Iterator[np.ndarray]:
    """The bytes of a tensor in blocks of whole elements."""
    step = BLOCK_ELEMENTS * _SIZES.get(entry.dtype, 1)
    with path.open("rb") as stream:
        stream.seek(entry.begin)
        left = entry.end - entry.begin
        while left:
            data = stream.read(min(step, left))
            if not data:
                raise CorruptError(f"{path} ends inside '{entry.name}'")
            left -= len(data)
            yield np.frombuffer(data, dtype=np.uint8)


def differing(one: Path, parts: Sequence[Path]) -> tuple[int, list[str]]:
    """(tensors with equal name, type and shape on both sides, the names of those whose bytes differ).

    The other side is a set of tensors split by rows over `parts`, in their order: bytes that follow each other.
    """
    others: dict[str, list[tuple[Path, TensorEntry]]] = {}
    for part in parts:
        for entry in read_header(part):
            others.setdefault(entry.name, []).append((part, entry))
    candidates = [(entry, others.get(entry.name, [])) for entry in read_header(one)]
    pairs = [(mine, theirs) for mine, theirs in candidates if _is_like(mine, [entry for _, entry in theirs])]
    different = [mine.name for mine, theirs in pairs if _digest([(one, mine)]) != _digest(theirs)]
    return len(pairs), different


def _is_like(whole: TensorEntry, parts: Sequence[TensorEntry]) -> bool:
    """The parts, one after the other, have the type and shape of the whole."""
    if not parts or any(part.dtype != whole.dtype or part.shape[1:] != whole.shape[1:] for part in parts):
        return False
    if len(parts) == 1:
        return parts[0].shape == whole.shape
    return sum(part.shape[0] for part in parts) == whole.shape[0]


def _digest(parts: Sequence[tuple[Path, TensorEntry]]) -> bytes:
    digest = xxhash.xxh3_128()
    for path, entry in parts:
        for block in _blocks(path, entry):
            digest.update(block.data)
    return digest.digest()
