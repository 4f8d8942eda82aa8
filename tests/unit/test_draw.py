"""Laws of drawing: distribution, truncation, seeds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from stillhouse.sampler.engines import draw
from stillhouse.sampler.engines.base import SampleRequest
from stillhouse.sampler.engines.draw import Distributions, uniforms


def one(**options: Any) -> SampleRequest:
    return SampleRequest("x", [1], 1, 0, **options)


def draws(logits: torch.Tensor, request: SampleRequest, count: int) -> list[int]:
    """Ids at evenly spread uniforms."""
    requests = [request] * count
    distributions = Distributions.of(logits.expand(count, -1), requests)
    return distributions.draw(requests, [(n + 0.5) / count for n in range(count)]).tolist()


def truncated(probs: np.ndarray, request: SampleRequest) -> np.ndarray:
    """[V] what is left, renormalised; plain loops."""
    order = [int(token) for token in np.argsort(-probs, kind="stable") if probs[token] >= request.min_p * probs.max()]
    order = order[: request.top_k or None]
    mass = sum(probs[token] for token in order)
    kept: list[int] = []
    while order and (request.top_p >= 1 or sum(probs[token] for token in kept) < request.top_p * mass):
        kept.append(order.pop(0))
    result = np.zeros_like(probs)
    result[kept] = probs[kept]
    return result / result.sum()


def test_logprobs_and_entropies_are_those_of_the_softmax() -> None:
    logits = 10 * torch.randn(4, 5000, generator=torch.Generator().manual_seed(0))
    requests = [one(temperature=temperature) for temperature in (0.0, 0.5, 1.0, 2.0)]
    found = Distributions.of(logits, requests)
    for row, temperature in enumerate((1.0, 0.5, 1.0, 2.0)):
        truth = torch.log_softmax(logits[row].double() / temperature, -1)
        ids = torch.tensor([7, 7, 7, 7])
        torch.testing.assert_close(found.logprobs(ids)[row], truth[7], atol=1e-5, rtol=0)
        torch.testing.assert_close(found.entropies()[row], -(truth.exp() * truth).sum(), atol=1e-5, rtol=0)
    assert found.draw(requests, [0.5] * 4)[0] == logits[0].argmax()


def test_entropy_counts_impossible_tokens_as_nothing() -> None:
    logits = torch.tensor([[0.0, 0.0, -torch.inf], [0.0, -torch.inf, -torch.inf]])
    found = Distributions.of(logits, [one(), one()]).entropies()
    torch.testing.assert_close(found, torch.tensor([np.log(2), 0.0], dtype=torch.float64))


def test_every_token_is_drawn_and_none_behind_the_last() -> None:
    assert set(draws(torch.zeros(1, 4), one(), 9)) == {0, 1, 2, 3}
    requests = [one()]
    last = float(np.nextafter(1.0, 0.0))
    assert int(Distributions.of(torch.zeros(1, 4), requests).draw(requests, [last])) == 3


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    requests = [one(), one()]
    found = Distributions.of(logits.expand(2, -1), requests).draw(requests, [0.0, float(np.nextafter(1.0, 0.0))])
    assert found.tolist() == [1, 3]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 2},
        {"top_k": 40},
        {"top_p": 0.75},
        {"top_p": 0.999},
        {"top_p": 1e-9},
        {"min_p": 0.3},
        {"min_p": 1e-4},
        {"top_k": 30, "top_p": 0.8},
        {"top_k": 30, "top_p": 0.8, "min_p": 0.01},
        {"top_p": 0.9, "min_p": 0.001},
    ],
    ids=str,
)
@pytest.mark.parametrize("candidates", [8, 1024])
def test_draws_follow_what_truncation_leaves(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], candidates: int
) -> None:
    """Few candidates make it look at the whole vocabulary after all."""
    monkeypatch.setattr(draw, "CANDIDATES", candidates)
    logits = 2 * torch.randn(1, 60, generator=torch.Generator().manual_seed(3))
    request, count = one(temperature=0.7, **options), 20_000
    truth = truncated(torch.softmax(logits[0].double() / 0.7, -1).numpy(), request)
    frequencies = np.bincount(draws(logits, request, count), minlength=60) / count
    # inverse CDF at evenly spread points: exact but for one point at either end of a token's stretch
    np.testing.assert_allclose(frequencies, truth, atol=1.5 / count)


def test_rows_keep_their_own_settings() -> None:
    logits = torch.randn(5, 3000, generator=torch.Generator().manual_seed(3))
    options: list[dict[str, Any]] = [{}, {"top_k": 1}, {"temperature": 0.0}, {"top_p": 0.5}, {"min_p": 0.5}]
    requests, points = [one(**each) for each in options], [0.3, 0.9, 0.9, 0.7, 0.6]
    together = Distributions.of(logits, requests).draw(requests, points).tolist()
    for row, request in enumerate(requests):
        assert Distributions.of(logits[row : row + 1], [request]).draw([request], [points[row]]).tolist() == [
            together[row]
        ]


def test_equal_weights_are_cut_by_number_not_by_weight() -> None:
    """In bfloat16 many logits are equal: top_k = 2 of four equal ones keeps two."""
    assert len(set(draws(torch.zeros(1, 4), one(top_k=2), 40))) == 2
    assert len(set(draws(torch.zeros(1, 4), one(top_p=0.5), 40))) == 2


def test_uniforms_depend_on_seed_and_index_only() -> None:
    assert uniforms(7, 3).tolist() == uniforms(7, 10)[:3].tolist()
    assert uniforms(7, 3).tolist() != uniforms(8, 3).tolist()
    assert uniforms(2**64 - 1, 1)[0] < 1
