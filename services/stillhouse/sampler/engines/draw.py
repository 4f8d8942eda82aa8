"""Drawing tokens: inverse CDF over cumulative float64 sums, driven by one stream of uniforms per sample.

Axes: B batch, V vocab, K candidates. A sample's uniforms depend on (seed, token index) only, so its draws do not depend
on what else is in the batch, on the policy version or on the process that draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from stillhouse.sampler.engines.base import SampleRequest

CANDIDATES: Final = 1024
"""Likeliest tokens that top_p looks at before it sorts the whole vocabulary, which takes ten times as long."""


def uniforms(seed: int, count: int) -> np.ndarray:
    """[count] float64 in [0, 1): the uniform of token t is element t, whatever `count` is."""
    return np.random.Generator(np.random.Philox(key=seed)).random(count)


@dataclass(frozen=True, slots=True)
class Distributions:
    """softmax(logits / temperature) of some rows, without truncation."""

    scores_BV: Tensor
    """float32 logits / temperature (1 for greedy), less the row's largest."""
    weights_BV: Tensor
    """float32 exp(scores): the likeliest token has weight 1."""
    cumulative_BV: Tensor
    """float64 sums of the weights up to each token. In float32, sums over 50k tokens are off by 1e-4."""

    @classmethod
    def of(cls, logits_BV: Tensor, requests: Sequence[SampleRequest]) -> Distributions:
        """Of the next tokens; one request per row."""
        temperatures = [request.temperature or 1.0 for request in requests]
        scores = logits_BV.float()
        if any(temperature != 1.0 for temperature in temperatures):
            scores = scores / torch.tensor(temperatures, device=scores.device)[:, None]
        scores = scores - scores.amax(-1, keepdim=True)
        weights = scores.exp()
        return cls(scores, weights, weights.cumsum(-1, dtype=torch.float64))

    @property
    def total_B(self) -> Tensor:
        """float64 sums of the weights."""
        return self.cumulative_BV[:, -1]

    def logprobs(self, ids_B: Tensor) -> Tensor:
        """[B] float64, nats."""
        return self.scores_BV.gather(1, ids_B[:, None])[:, 0].double() - self.total_B.log()

    def entropies(self) -> Tensor:
        """[B] float64, nats; a token of probability 0 adds nothing."""
        terms = torch.where(self.weights_BV > 0, self.weights_BV * self.scores_BV, 0.0)
        return self.total_B.log() - terms.sum(-1, dtype=torch.float64) / self.total_B

    def likeliest(self, count: int) -> Tensor:
        """[B, count] int64 ids, likeliest first."""
        return self.scores_BV.topk(count).indices

    def draw(self, requests: Sequence[SampleRequest], uniforms_B: Sequence[float]) -> Tensor:
        """[B] int64 token ids, each from what its request's truncation leaves."""
        sampled = [row for row, request in enumerate(requests) if request.temperature > 0]
        is_greedy = len(sampled) < len(requests)
        ids = self.scores_BV.argmax(-1) if is_greedy else torch.zeros_like(self.total_B, dtype=torch.long)
        cut = [row for row in sampled if _truncates(requests[row], self.scores_BV.shape[1])]
        whole = sorted(set(sampled) - set(cut))
        u_B = torch.tensor(uniforms_B, dtype=torch.float64, device=ids.device)
        if whole:
            rows = slice(None) if len(whole) == len(requests) else torch.tensor(whole, device=ids.device)
            ids[rows] = _inverse_cdf(self.cumulative_BV[rows], u_B[rows])
        if cut:
            rows = torch.tensor(cut, device=ids.device)
            kept_ids, weights = _truncate(self.weights_BV[rows], self.total_B[rows], [requests[row] for row in cut])
            ids[rows] = kept_ids.gather(1, _inverse_cdf(weights.cumsum(-1), u_B[rows])[:, None])[:, 0]
        return ids


def _truncates(request: SampleRequest, vocab_size: int) -> bool:
    return request.min_p > 0 or request.top_p < 1 or 0 < request.top_k < vocab_size


def _inverse_cdf(cumulative_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """[B] first index whose cumulative weight exceeds u times the total: never one of weight 0."""
    total = cumulative_BV[:, -1]
    # u * total may round up to the total, which no cumulative weight exceeds
    target = torch.minimum(uniforms_B * total, torch.nextafter(total, torch.zeros_like(total)))
    # among NaNs the search may end one past the last index
    return torch.searchsorted(cumulative_BV, target[:, None], right=True)[:, 0].clamp(max=cumulative_BV.shape[1] - 1)


def _truncate(weights_BV: Tensor, total_B: Tensor, requests: Sequence[SampleRequest]) -> tuple[Tensor, Tensor]:
    """([B, K] ids in ascending order, [B, K] their weights, 0 for what top_k, top_p and min_p exclude).

    min_p is relative to the likeliest token; top_k counts what min_p leaves, top_p is a share of what both leave, as
    with Hugging Face and vLLM.
    """
    vocab_size = weights_BV.shape[1]
    top_k = [request.top_k if 0 < request.top_k < vocab_size else vocab_size for request in requests]
    top_k_B1 = _column(top_k, weights_BV)
    top_p_B1 = _column([request.top_p for request in requests], weights_BV)
    min_p_B1 = _column([request.min_p for request in requests], weights_BV)
    count = min(vocab_size, max(CANDIDATES, *(k if k < vocab_size else 0 for k in top_k), 0))
    while True:
        values, ids = weights_BV.topk(count)
        values = values.double()
        values = torch.where((values >= min_p_B1) & (torch.arange(count, device=ids.device) < top_k_B1), values, 0.0)
        cumulative = values.cumsum(-1)
        # behind the candidates there is nothing more, or only what top_p excludes
        is_all_B1 = (values[:, -1:] == 0) | (top_k_B1 <= count)
        mass_B1 = torch.where(is_all_B1, cumulative[:, -1:], total_B[:, None])
        is_enough_B1 = (min_p_B1 == 0) & (top_p_B1 < 1) & (cumulative[:, -1:] >= top_p_B1 * mass_B1)
        if count == vocab_size or bool((is_all_B1 | is_enough_B1).all()):
            break
        count = vocab_size
    # the token that crosses the threshold stays, so at least one does; 1 = off whatever the sums round to
    values = torch.where((cumulative - values < top_p_B1 * mass_B1) | (top_p_B1 >= 1), values, 0.0)
    ids, order = ids.sort(-1)
    return ids, values.gather(1, order)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    """[B, 1] float64, beside `like`."""
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]
