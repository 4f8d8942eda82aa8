"""What vLLM's two sides agree on: vllm.py in the sampler, vllm_worker.py in the engine's processes. No vLLM here."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from stillhouse.core.blobs import xxh3

OURS: Final = "stillhouse"
"""Our name in vLLM's registry of weight transfers, and in the `extra_args` of its sampling parameters."""
WORKER_EXTENSION: Final = "stillhouse.sampler.engines.vllm_worker.Extension"
"""What vLLM mixes into its worker class: how our code gets into its processes."""


def pack_notes(entropies_bits: Any, tag: int) -> Any:
    """[B] int64: the weights' tag above the bits of a token's float32 entropy."""
    return (tag << 32) | entropies_bits


def unpack_notes(notes: Sequence[int]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """([N] tags, [N] float32 entropies)."""
    packed = np.asarray(notes, dtype=np.int64)
    return packed >> 32, (packed & 0xFFFFFFFF).astype(np.uint32).view(np.float32)


def hash_file(path: str | Path) -> str:
    """xxh3-128 of a file that is not empty, hex."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return xxh3(memoryview(content))
