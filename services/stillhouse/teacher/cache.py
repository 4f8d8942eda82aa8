"""Scores that were computed before: a sample that is scored again (a lost payload, a replay) costs nothing.

Kept by what they depend on: the model, its weights and element type, prompt, completion, what was asked. Least
recently used first out. The last bits of a score depend on what else was in its batch: deterministic jobs do without.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import fields, replace
from typing import Final

import numpy as np

from stillhouse.core.metrics import CACHE_BYTES, CACHE_HITS, CACHE_MISSES
from stillhouse.teacher.engines.base import Scored, ScoreItem

MAX_SHARE: Final = 1 / 8
"""Largest part of the cache that one score may take: long hidden states must not push out everything else."""

ENTRY_BYTES: Final = 512
"""What a score takes beside its arrays' bytes: key, objects, its place in the order. Measured: 400 of a sampled one."""


class ScoreCache:
    """`Scored` by everything it depends on, within a budget of bytes. 0 = keeps nothing."""

    def __init__(self, budget_bytes: int) -> None:
        self._budget_bytes = budget_bytes
        self._scores: OrderedDict[bytes, Scored] = OrderedDict()
        self.size_bytes = 0
        self.hits = 0

    def find(self, model: tuple[str, ...], item: ScoreItem) -> Scored | None:
        """The score of `item` by a model (sha256 of its files, of its weights, dtype), if it is here."""
        key = _key(model, item) if self._scores else b""
        found = self._scores.get(key)
        if found is None:
            CACHE_MISSES.inc()
            return None
        self._scores.move_to_end(key)
        self.hits += 1
        CACHE_HITS.inc()
        return replace(found, key=item.key)

    def keep(self, model: tuple[str, ...], item: ScoreItem, scored: Scored) -> None:
        """Remember a score; what has used the room for longest leaves."""
        size = _size_bytes(scored)
        if size > self._budget_bytes * MAX_SHARE:
            return
        key = _key(model, item)
        if key in self._scores:
            self.size_bytes -= _size_bytes(self._scores.pop(key))
        self._scores[key] = scored
        self.size_bytes += size
        while self.size_bytes > self._budget_bytes:
            self.size_bytes -= _size_bytes(self._scores.popitem(last=False)[1])
        CACHE_BYTES.set(self.size_bytes)


def _size_bytes(scored: Scored) -> int:
    arrays = (getattr(scored, field.name) for field in fields(scored))
    return ENTRY_BYTES + sum(array.nbytes for array in arrays if isinstance(array, np.ndarray))


def _key(model: tuple[str, ...], item: ScoreItem) -> bytes:
    """The prompt is hashed as the teacher reads it, so another template or system prompt is another key."""
    asked = (item.kind, item.temperature or 1.0, item.top_k, item.half, len(item.prompt_ids), len(item.completion_ids))
    digest = hashlib.sha256(repr((model, asked)).encode())
    digest.update(np.array([*item.prompt_ids, *item.completion_ids], dtype=np.int64).tobytes())
    if item.target_ids is not None:
        digest.update(item.target_ids.astype(np.int64).tobytes())
    return digest.digest()
