"""The tokens that a top-k divergence looks at, where teacher and student name them together. No torch here.

Letters: R rows, K tokens that the teacher names, S tokens that the student names (`targets`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Support(NamedTuple):
    """Tokens of each row and the teacher's log-probabilities of them; rows have different sizes."""

    ids: np.ndarray
    """[R, K + S] int64; 0 where the place is empty."""
    logprobs: np.ndarray
    """[R, K + S] float32, nats, under the teacher's whole distribution; 0 where the place is empty."""
    mask: np.ndarray
    """[R, K + S] bool, False = the place is empty."""


def union(
    topk_ids: np.ndarray, topk_logprobs: np.ndarray, target_ids: np.ndarray, target_logprobs: np.ndarray
) -> Support:
    """Each row's set of tokens that teacher [R, K] or student [R, S] names, no token twice.

    All log-probabilities are the teacher's. Where both name a token, the teacher's place is kept. Every row with K >= 1
    has a token. Costs R (K + S) log(K + S), not R K S.
    """
    ids = np.concatenate([topk_ids, target_ids], axis=1).astype(np.int64)
    logprobs = np.concatenate([topk_logprobs, target_logprobs], axis=1).astype(np.float32)
    # stable: of equal ids the one further left comes first
    order = np.argsort(ids, axis=1, kind="stable")
    ordered = np.take_along_axis(ids, order, axis=1)
    is_first = np.ones(ids.shape, dtype=bool)
    is_first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    mask = np.empty(ids.shape, dtype=bool)
    np.put_along_axis(mask, order, is_first, axis=1)
    return Support(np.where(mask, ids, 0), np.where(mask, logprobs, np.float32(0)), mask)
