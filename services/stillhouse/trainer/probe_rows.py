"""What a pre-flight asks of the student on this device: log-probabilities at several temperatures, likeliest tokens.

Letters: R completion tokens, C temperatures, K tokens per position, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from stillhouse.trainer.objectives.base import Head

CHUNK: Final = 64
"""Rows whose logits are in memory at once: 40 MB for a vocabulary of 150,000."""


def probe_rows(
    hidden_RD: Tensor, head: Head, ids_R: Tensor, named_RK: Tensor | None, temperatures: Sequence[float], top_k: int
) -> dict[str, Tensor]:
    """By name: `logprobs` [R, C] of the tokens at each temperature; at the first one `named` [R, K], of the tokens that
    a teacher names; `top_ids` [R, top_k], the student's likeliest, likeliest first."""
    parts: list[dict[str, Tensor]] = []
    for start in range(0, len(ids_R), CHUNK):
        rows = slice(start, start + CHUNK)
        logits_CV = head.logits(hidden_RD[rows])
        ids = ids_R[rows, None]
        at = [(logits_CV / t).log_softmax(-1).gather(1, ids) for t in temperatures]
        part = {"logprobs": torch.cat(at, dim=1)}
        part["top_ids"] = logits_CV.topk(min(top_k, logits_CV.shape[1]), dim=1).indices
        if named_RK is not None:
            part["named"] = (logits_CV / temperatures[0]).log_softmax(-1).gather(1, named_RK[rows])
        parts.append(part)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
