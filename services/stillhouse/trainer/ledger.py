"""What is behind the weights, carried beside them: a chain over every sample that the learner consumed.

    h_0 = ""        h_{k+1} = sha256(h_k, k, (sample id, xxh3-128 of its completion ids) of each sample of step k)

It is made from what the learner was given, not from the journal, and is committed with the weights. So a checker that
computes the same chain from the journals of the lineage proves that each journalled sample was trained exactly once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from stillhouse.core.blobs import xxh3


@dataclass(slots=True)
class Ledger:
    """Sums over the steps behind some weights."""

    chain: str = ""
    """h_k, hex."""
    num_steps: int = 0
    num_samples: int = 0
    num_tokens: int = 0
    """Completion tokens."""
    skipped_steps: list[int] = field(default_factory=list)
    """Steps whose samples were consumed without an update, because their gradient was not finite."""

    def add(self, step: int, samples: Iterable[tuple[str, np.ndarray]], *, is_skipped: bool = False) -> None:
        """Note a step; `samples` are (sample id, completion ids) in the order of the journal."""
        digest = hashlib.sha256(f"{self.chain} {step}\n".encode())
        for sample_id, completion_ids in samples:
            ids = np.ascontiguousarray(completion_ids, dtype="<i4")
            digest.update(f"{sample_id} {xxh3(ids.tobytes())}\n".encode())
            self.num_samples += 1
            self.num_tokens += len(ids)
        self.chain = digest.hexdigest()
        self.num_steps += 1
        if is_skipped:
            self.skipped_steps.append(step)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)
