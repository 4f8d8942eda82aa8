"""Outcome rewards as advantages: what is better than the other completions of its prompt is made likelier.

    std     (r - mean) / std      GRPO (arXiv:2402.03300); std over the group itself, not the estimate of a larger one
    mean    r - mean              keeps the size of the rewards: easy and hard prompts weigh as their rewards differ

Both add up to 0 in every group. A group whose rewards are all equal says nothing and gets 0, also where its rewards
differ by rounding only, which `std` would blow up. The advantage is the same at all tokens of a completion; the
objective adds it, times `reward.weight`, to the teacher's (objectives/sampled.py). No torch here.

Letters: G samples of a group.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

SAME = 1e-6
"""Rewards that differ by less than this share of the largest are equal: a float32, as rewards are sent, is rounded by
up to 6e-8 of its size."""


def group_advantages(rewards_G: np.ndarray, normalise: Literal["std", "mean"] = "std") -> np.ndarray:
    """[G] float64 advantages of one group's rewards; samples without a reward (NaN) are left out and get 0."""
    rewards_G = np.asarray(rewards_G, dtype=np.float64)
    advantages_G = np.zeros(len(rewards_G))
    is_judged_G = ~np.isnan(rewards_G)
    judged = rewards_G[is_judged_G]
    if len(judged) == 0 or np.ptp(judged) <= SAME * np.abs(judged).max():
        return advantages_G
    centred = judged - judged.mean()
    advantages_G[is_judged_G] = centred / centred.std() if normalise == "std" else centred
    return advantages_G
