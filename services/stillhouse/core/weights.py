"""The identity of a set of weights: what a `WeightsRef.sha256` is computed over, the same for maker and reader; and
which of two sets is newer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Protocol

from stillhouse.core.tensors import dtype_name
from stillhouse.v1 import weights_pb2


class NamedTensor(Protocol):
    """The part of a `v1.TensorEntry` that identity rests on."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> int: ...
    @property
    def shape(self) -> Sequence[int]: ...
    @property
    def xxh3_128(self) -> str: ...


def weights_sha256(entries: Iterable[NamedTensor]) -> str:
    """sha256 (hex) over the sorted lines "name dtype shape xxh3_128": independent of order and offsets of the payload.

    It hashes the tensors' hashes, so that naming 270 MiB of weights costs an xxh3 pass and not a sha256 pass.
    """
    lines = sorted(
        f"{entry.name} {dtype_name(entry.dtype)} {','.join(str(size) for size in entry.shape)} {entry.xxh3_128}\n"
        for entry in entries
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def order(ref: weights_pb2.WeightsRef) -> tuple[int, int]:
    """What weights of a job are ordered by; equal = the same set."""
    return ref.epoch, ref.policy_version
