"""Every objective against its definition, over random shapes: probability space, float64, gradients by autograd.

The oracles here materialise p and q, know nothing of chunks or logs, and let autograd differentiate the formula as it
stands in the papers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stillhouse.core.spec import FullVocabularyLoss
from stillhouse.trainer.losses import make_objective, packed_loss
from stillhouse.trainer.objectives.base import Head, Signals
from stillhouse.trainer.objectives.full_vocabulary import (
    EntropyMix,
    ForwardKL,
    GeneralisedJSD,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
)


def kl(a: Tensor, b: Tensor) -> Tensor:
    """KL(a || b) with 0 log 0 = 0."""
    return torch.where(a > 0, a * (a / b).log(), torch.zeros_like(a)).sum(-1)


def jsd(p: Tensor, q: Tensor, beta: float) -> Tensor:
    mixture = beta * q + (1 - beta) * p
    return beta * kl(q, mixture) + (1 - beta) * kl(p, mixture)


def entropy_mix(p: Tensor, q: Tensor, threshold: float, weight: float) -> Tensor:
    entropy = -(q * q.log()).sum(-1)
    return kl(p, q) + weight * (entropy > threshold) * kl(q, p)


CASES: list[tuple[Any, Callable[[Tensor, Tensor], Tensor]]] = [
    (ReverseKL(), lambda p, q: kl(p, q)),
    (ForwardKL(), lambda p, q: kl(q, p)),
    *[(GeneralisedJSD(b), lambda p, q, b=b: jsd(p, q, b)) for b in (0.01, 0.3, 0.5, 0.99)],
    (GeneralisedJSD(0.2, rescale=True), lambda p, q: jsd(p, q, 0.2) / 0.16),
    *[(SkewForwardKL(a), lambda p, q, a=a: kl(q, a * q + (1 - a) * p)) for a in (0.1, 0.9)],
    *[(SkewReverseKL(a), lambda p, q, a=a: kl(p, (1 - a) * q + a * p)) for a in (0.1, 0.9)],
    (EntropyMix(1.0, 0.7), lambda p, q: entropy_mix(p, q, 1.0, 0.7)),
]
NAMES = [str(objective) for objective, _ in CASES]


class Problem:
    """Random student and teacher heads over the same vocabulary, some rows without weight."""

    def __init__(self, rows: int, vocab: int, width: int, temperature: float, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw, dtype=torch.float64)

        self.hidden = normal(rows, width).requires_grad_()
        self.weight = (2 * normal(vocab, width)).requires_grad_()
        self.teacher = Signals(None, normal(rows, width + 1), Head(2 * normal(vocab, width + 1)))
        self.ids = torch.randint(vocab, (rows,), generator=draw)
        self.weights = torch.rand(rows, generator=draw, dtype=torch.float64) * (torch.rand(rows, generator=draw) > 0.3)
        self.temperature = temperature

    def p(self) -> Tensor:
        return (self.hidden @ self.weight.T / self.temperature).softmax(-1)

    def q(self) -> Tensor:
        assert self.teacher.hidden is not None
        assert self.teacher.head is not None
        return (self.teacher.hidden @ self.teacher.head.weight.T / self.temperature).softmax(-1)


problems = st.builds(
    Problem,
    rows=st.integers(1, 9),
    vocab=st.integers(2, 17),
    width=st.integers(1, 6),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    seed=st.integers(0, 2**31),
)


@pytest.mark.parametrize(("objective", "definition"), CASES, ids=NAMES)
@given(problem=problems)
def test_value_and_gradient_are_those_of_the_definition(
    objective: Any, definition: Callable[[Tensor, Tensor], Tensor], problem: Problem
) -> None:
    expected = definition(problem.p(), problem.q())
    leaves = (problem.hidden, problem.weight)
    expected_grads = torch.autograd.grad((expected * problem.weights).sum(), leaves)
    result = packed_loss(
        objective,
        problem.hidden,
        Head(problem.weight),
        problem.ids,
        problem.weights,
        problem.teacher,
        problem.temperature,
    )
    grads = torch.autograd.grad(result.loss, leaves)
    torch.testing.assert_close(result.values, expected.detach(), rtol=1e-6, atol=1e-10)
    torch.testing.assert_close(result.reverse_kl, kl(problem.p(), problem.q()).detach(), rtol=1e-6, atol=1e-10)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        # next to large elements the oracle itself loses the small ones to cancellation
        size = float(expected_grad.abs().max())
        torch.testing.assert_close(grad, expected_grad, rtol=1e-6, atol=1e-8 * size + 1e-12)


@pytest.mark.parametrize(("objective", "definition"), CASES, ids=NAMES)
@given(problem=problems)
def test_equal_models_give_no_loss_and_no_gradient(objective: Any, definition: Any, problem: Problem) -> None:
    teacher = Signals(None, problem.hidden.detach(), Head(problem.weight.detach()))
    result = packed_loss(
        objective, problem.hidden, Head(problem.weight), problem.ids, problem.weights, teacher, problem.temperature
    )
    assert result.values.abs().max() < 1e-10
    for grad in torch.autograd.grad(result.loss, (problem.hidden, problem.weight)):
        assert grad.abs().max() < 1e-10


@pytest.mark.parametrize(("objective", "definition"), CASES, ids=NAMES)
@given(problem=problems)
def test_a_divergence_is_never_negative(objective: Any, definition: Any, problem: Problem) -> None:
    result = packed_loss(
        objective,
        problem.hidden,
        Head(problem.weight),
        problem.ids,
        problem.weights,
        problem.teacher,
        problem.temperature,
    )
    assert result.values.min() > -1e-12


# numpy default_rng(0), V = 50, logits 1.5 * normal: student first, teacher second
JSD_VALUES = {0.001: 0.00170, 0.01: 0.01597, 0.1: 0.12417, 0.5: 0.30487, 0.9: 0.13264, 0.99: 0.01773, 0.999: 0.00187}


def example() -> tuple[Tensor, Tensor]:
    import numpy as np

    draw = np.random.default_rng(0)
    return tuple(torch.from_numpy(1.5 * draw.normal(size=50)) for _ in range(2))  # type: ignore[return-value]


def value(objective: Any) -> float:
    student, teacher = example()
    identity = torch.eye(50, dtype=torch.float64)
    rows = Signals(None, teacher[None], Head(identity))
    result = packed_loss(
        objective, student[None], Head(identity), torch.zeros(1, dtype=torch.long), torch.ones(1).double(), rows
    )
    return float(result.values[0])


def test_the_known_example() -> None:
    assert value(ForwardKL()) == pytest.approx(1.7209, abs=5e-5)
    assert value(ReverseKL()) == pytest.approx(1.8860, abs=5e-5)
    for beta, expected in JSD_VALUES.items():
        assert value(GeneralisedJSD(beta)) == pytest.approx(expected, abs=6e-6)


def test_rescaled_jsd_joins_the_two_kls_without_a_jump() -> None:
    assert value(GeneralisedJSD(1e-6, rescale=True)) == pytest.approx(value(ForwardKL()), rel=1e-4)
    assert value(GeneralisedJSD(1 - 1e-6, rescale=True)) == pytest.approx(value(ReverseKL()), rel=1e-4)


def test_small_skews_are_the_plain_kls() -> None:
    assert value(SkewForwardKL(1e-7)) == pytest.approx(value(ForwardKL()), rel=1e-4)
    assert value(SkewReverseKL(1e-7)) == pytest.approx(value(ReverseKL()), rel=1e-4)


def test_the_spec_names_every_divergence_and_refuses_idle_knobs() -> None:
    def spec(**fields: Any) -> FullVocabularyLoss:
        return FullVocabularyLoss.model_validate({"objective": "full_vocabulary", **fields})

    assert make_objective(spec()) == ReverseKL()
    assert make_objective(spec(divergence="jsd", beta=0.25, beta_rescale=True)) == GeneralisedJSD(0.25, rescale=True)
    assert make_objective(spec(divergence="skew_forward_kl", alpha=0.2)) == SkewForwardKL(0.2)
    assert make_objective(spec(divergence="skew_reverse_kl")) == SkewReverseKL(0.1)
    assert make_objective(spec(divergence="entropy_mix", entropy_threshold=2.0)) == EntropyMix(2.0, 1.0)
    with pytest.raises(ValueError, match="'beta' belongs to jsd, the divergence is reverse_kl"):
        spec(beta=0.3)
    again = FullVocabularyLoss.model_validate(spec(divergence="jsd", beta=0.3).model_dump(mode="json"))
    assert again.beta == 0.3, "defaults written out are no idle knobs"
