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
    hidden_RD: Tensor, head: Head, ids_R: Tensor, temperatures: Sequence[float], top_k: int
) -> dict[str, Tensor]:
    """By name: `logprobs` [R, C] of the tokens at each temperature; at the first one `top_ids` and `top_logprobs`
    [R, top_k] of the student's likeliest tokens, likeliest first."""
    parts: list[dict[str, Tensor]] = []
    for start in range(0, len(ids_R), CHUNK):
        rows = slice(start, start + CHUNK)
        logits_CV = head.logits(hidden_RD[rows])
        ids = ids_R[rows, None]
        at = [(logits_CV / t).log_softmax(-1).gather(1, ids) for t in temperatures]
        part = {"logprobs": torch.cat(at, dim=1)}
        likeliest = (logits_CV / temperatures[0]).log_softmax(-1).topk(min(top_k, logits_CV.shape[1]), dim=1)
        part |= {"top_ids": likeliest.indices, "top_logprobs": likeliest.values}
        parts.append(part)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
