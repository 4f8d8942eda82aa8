"""Drawing tokens: inverse CDF over float64 probabilities, driven by one stream of uniforms per sample.

Axes: B batch, V vocab. A sample's uniforms depend on (seed, token index) only, so its draws do not depend on what else
is in the batch, on the policy version or on the process that draws.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from stillhouse.sampler.engines.base import SampleRequest


def uniforms(seed: int, count: int) -> np.ndarray:
    """[count] float64 in [0, 1): the uniform of token t is element t, whatever `count` is."""
    return np.random.Generator(np.random.Philox(key=seed)).random(count)


def log_probs(logits_BV: Tensor, requests: Sequence[SampleRequest]) -> Tensor:
    """[B, V] float64 log-softmax(logits / temperature), nats, without truncation; one request per row.

    float64: in float32 the cumulative sum over 50k tokens is off by 1e-4, and rounding would depend on the batch.
    """
    temperatures = torch.tensor([request.temperature or 1.0 for request in requests], dtype=torch.float64)
    return torch.log_softmax(logits_BV.double() / temperatures[:, None], dim=-1)


def draw(logprobs_BV: Tensor, requests: Sequence[SampleRequest], uniforms_B: Sequence[float]) -> Tensor:
    """[B] int64 token ids, from the `log_probs` of the requests."""
    ids = logprobs_BV.argmax(-1)
    sampled = [row for row, request in enumerate(requests) if request.temperature > 0]
    if sampled:
        rows = torch.tensor(sampled)
        probs = _truncate(logprobs_BV[rows].exp(), [requests[row] for row in sampled])
        ids[rows] = _inverse_cdf(probs, torch.tensor([uniforms_B[row] for row in sampled], dtype=torch.float64))
    return ids


def entropies(logprobs_BV: Tensor) -> Tensor:
    """[B] float64 entropy, nats; a token of probability 0 adds nothing."""
    return torch.special.entr(logprobs_BV.exp()).sum(-1)


def _inverse_cdf(weights_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """[B] first id whose cumulative weight exceeds u times the total: never one of weight 0."""
    cumulative = weights_BV.cumsum(-1)
    total = cumulative[:, -1]
    # u * total may round up to the total, which no cumulative weight exceeds
    target = torch.minimum(uniforms_B * total, torch.nextafter(total, torch.zeros_like(total)))
    # among NaNs the search may end one past the last id
    return torch.searchsorted(cumulative, target[:, None], right=True)[:, 0].clamp(max=weights_BV.shape[-1] - 1)


def _truncate(probs_BV: Tensor, requests: Sequence[SampleRequest]) -> Tensor:
    """[B, V] probabilities with what top_k, top_p and min_p exclude set to 0 (not renormalised).

    top_k first, then top_p over what is left, as Hugging Face and vLLM do; min_p is relative to the likeliest token.
    """
    vocab_size = probs_BV.shape[-1]
    for row, request in enumerate(requests):
        probs = probs_BV[row]
        if request.min_p > 0:
            probs = torch.where(probs >= request.min_p * probs.max(), probs, 0.0)
        if 0 < request.top_k < vocab_size or request.top_p < 1:
            kept = request.top_k if 0 < request.top_k < vocab_size else vocab_size
            values, ids = probs.topk(kept)
            if request.top_p < 1:
                before = values.cumsum(0) - values
                # the token that crosses the threshold stays, so at least one does
                values = torch.where(before < request.top_p * values.sum(), values, 0.0)
            probs = torch.zeros_like(probs).scatter(0, ids, values)
        probs_BV[row] = probs
    return probs_BV
