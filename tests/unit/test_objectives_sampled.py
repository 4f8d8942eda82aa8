"""The sampled-token family: gates, clips, return-to-go and k2 against plain definitions and known identities."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stillhouse.core.spec import PolicyGradientLoss, StageSpec
from stillhouse.trainer import losses
from stillhouse.trainer.losses import make_objective, packed_loss
from stillhouse.trainer.objectives.base import Head, Signals
from stillhouse.trainer.objectives.sampled import PolicyGradient, RatioGate

GATES = [
    RatioGate(),
    RatioGate("is"),
    RatioGate("tis", 0.5, 2.0),
    RatioGate("icepop", 0.5, 2.0),
    RatioGate("seq_mask", 0.7, 1.4),
]


class Problem:
    """Three sequences of random lengths; the sampler's policy is near the student's."""

    def __init__(self, lengths: list[int], vocab: int, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        rows = sum(lengths)
        self.lengths = lengths
        self.logits = torch.randn(rows, vocab, generator=draw, dtype=torch.float64).requires_grad_()
        self.ids = torch.randint(vocab, (rows,), generator=draw)
        self.weights = torch.rand(rows, generator=draw, dtype=torch.float64)
        self.log_q = -3 * torch.rand(rows, generator=draw, dtype=torch.float64)
        gap = 0.8 * torch.randn(rows, generator=draw, dtype=torch.float64)
        self.log_mu = self.log_p().detach() + gap
        self.sample = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))

    def log_p(self) -> Tensor:
        return self.logits.log_softmax(-1).gather(1, self.ids[:, None]).squeeze(1)

    def packed(self, objective: Any) -> Any:
        signals = Signals(logprobs=self.log_q, rollout_logprobs=self.log_mu, sample=self.sample)
        head = Head(torch.eye(self.logits.shape[1], dtype=torch.float64))
        return packed_loss(objective, self.logits, head, self.ids, self.weights, signals)


problems = st.builds(
    Problem,
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    vocab=st.integers(2, 8),
    seed=st.integers(0, 2**31),
)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences cross the borders of chunks."""
    monkeypatch.setattr(losses, "CHUNK_ROWS", 2)


def gate_of(gate: RatioGate, ratios: np.ndarray) -> np.ndarray:
    """Weights of one sequence, from the ratios of its tokens."""
    inside = (ratios >= gate.low) & (ratios <= gate.high)
    mean = float(np.prod(ratios) ** (1 / len(ratios)))
    return {
        "none": np.ones_like(ratios),
        "is": ratios,
        "tis": np.clip(ratios, gate.low, gate.high),
        "icepop": np.where(inside, ratios, 0.0),
        "seq_mask": ratios * (gate.low <= mean <= gate.high),
    }[gate.kind]


def coefficients(objective: PolicyGradient, problem: Problem) -> tuple[Tensor, Tensor]:
    """(gates, advantages) by plain loops over sequences."""
    log_p = problem.log_p().detach().numpy()
    gates, advantages, start = [], [], 0
    for length in problem.lengths:
        rows = slice(start, start + length)
        log_mu, log_q = problem.log_mu.numpy()[rows], problem.log_q.numpy()[rows]
        gates.append(gate_of(objective.gate, np.exp(log_p[rows] - log_mu)))
        own = log_q - (log_p[rows] if objective.student_term == "trainer" else log_mu)
        if objective.advantage_clip is not None:
            own = np.clip(own, -objective.advantage_clip, objective.advantage_clip)
        returns = [sum(objective.discount ** (i - t) * own[i] for i in range(t, length)) for t in range(length)]
        advantages.append(np.asarray(returns))
        start += length
    return torch.from_numpy(np.concatenate(gates)), torch.from_numpy(np.concatenate(advantages))


@pytest.mark.parametrize("discount", [0.0, 0.9])
@pytest.mark.parametrize("student_term", ["trainer", "sampler"])
@pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate.kind)
@given(problem=problems)
def test_value_and_gradient_are_those_of_the_definition(
    gate: RatioGate, student_term: Any, discount: float, problem: Problem
) -> None:
    objective = PolicyGradient(0.7, student_term, gate, discount)
    gates, advantages = coefficients(objective, problem)
    expected = -gates * advantages * problem.log_p()
    (expected_grad,) = torch.autograd.grad((expected * problem.weights).sum(), problem.logits)
    result = problem.packed(objective)
    (grad,) = torch.autograd.grad(result.loss, problem.logits)
    torch.testing.assert_close(result.values, expected.detach(), rtol=1e-6, atol=1e-10)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-6, atol=1e-10)
    torch.testing.assert_close(result.gate, gates, rtol=1e-6, atol=1e-10)
    torch.testing.assert_close(result.reverse_kl, problem.log_p().detach() - problem.log_q)


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate.kind)
@given(problem=problems)
def test_k2_is_half_the_squared_log_ratio(gate: RatioGate, problem: Problem) -> None:
    objective = PolicyGradient(gate=gate, estimator="k2")
    gates, _ = coefficients(objective, problem)
    expected = gates * (problem.log_p() - problem.log_q).square() / 2
    (expected_grad,) = torch.autograd.grad((expected * problem.weights).sum(), problem.logits)
    result = problem.packed(objective)
    (grad,) = torch.autograd.grad(result.loss, problem.logits)
    torch.testing.assert_close(result.values, expected.detach(), rtol=1e-6, atol=1e-10)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-6, atol=1e-10)


def expected_gradient(loss: Any, logits: Tensor, q: Tensor) -> Tensor:
    """sum over y of p(y) times the gradient of the loss at y: exact, no sampling."""
    p = logits.detach().softmax(-1)
    total = torch.zeros_like(logits)
    for y in range(len(p)):
        leaf = logits.detach().clone().requires_grad_()
        (grad,) = torch.autograd.grad(loss(leaf.log_softmax(-1)[y], q[y].log()), leaf)
        total += p[y] * grad
    return total


def test_the_table_of_estimators() -> None:
    """k1 differentiated trains nothing; advantage and k2 give the reverse KL; k3 gives the forward KL."""
    draw = np.random.default_rng(0)
    logits, teacher = (torch.from_numpy(1.5 * draw.normal(size=50)) for _ in range(2))
    q = teacher.softmax(-1)

    def divergence_gradient(value: Any) -> Tensor:
        leaf = logits.clone().requires_grad_()
        return torch.autograd.grad(value(leaf.softmax(-1)), leaf)[0]

    reverse = divergence_gradient(lambda p: (p * (p / q).log()).sum())
    forward = divergence_gradient(lambda p: (q * (q / p).log()).sum())
    k1 = expected_gradient(lambda log_p, log_q: log_p - log_q, logits, q)
    k2 = expected_gradient(lambda log_p, log_q: (log_p - log_q).square() / 2, logits, q)
    k3 = expected_gradient(lambda log_p, log_q: (log_q - log_p).exp() - 1 - (log_q - log_p), logits, q)
    advantage = expected_gradient(lambda log_p, log_q: -(log_q - log_p).detach() * log_p, logits, q)
    torch.testing.assert_close(k1, torch.zeros_like(k1), atol=1e-12, rtol=0)
    torch.testing.assert_close(k2, reverse)
    torch.testing.assert_close(advantage, reverse)
    torch.testing.assert_close(k3, forward)
    cosine = float(torch.nn.functional.cosine_similarity(k3, reverse, dim=0))
    assert cosine == pytest.approx(0.67, abs=0.01)


def test_importance_weights_undo_staleness_on_average() -> None:
    """Samples of mu, weighted by p / mu, give the gradient that samples of p would give."""
    draw = torch.Generator().manual_seed(0)
    logits, stale, teacher = (torch.randn(12, generator=draw, dtype=torch.float64) for _ in range(3))
    q, mu = teacher.softmax(-1), stale.softmax(-1)
    vocab = 12
    rows = logits.repeat(vocab, 1).requires_grad_()
    ids = torch.arange(vocab)
    signals = Signals(logprobs=q.log(), rollout_logprobs=mu.log(), sample=ids)
    head = Head(torch.eye(vocab, dtype=torch.float64))
    result = packed_loss(PolicyGradient(gate=RatioGate("is")), rows, head, ids, mu, signals)
    (grad,) = torch.autograd.grad(result.loss, rows)
    leaf = logits.clone().requires_grad_()
    p = leaf.softmax(-1)
    (reverse,) = torch.autograd.grad((p * (p / q).log()).sum(), leaf)
    torch.testing.assert_close(grad.sum(0), reverse)


def test_the_spec_reaches_the_objective_and_refuses_nonsense() -> None:
    def spec(**fields: Any) -> PolicyGradientLoss:
        return PolicyGradientLoss.model_validate({"objective": "policy_gradient", **fields})

    assert make_objective(spec()) == PolicyGradient()
    assert make_objective(spec(ratio_gate="icepop", gate_high=5)) == PolicyGradient(gate=RatioGate("icepop", 0.5, 5))
    assert make_objective(spec(ratio_gate="seq_mask")) == PolicyGradient(gate=RatioGate("seq_mask", 0.999, 1.002))
    assert make_objective(spec(estimator="k2")) == PolicyGradient(estimator="k2")
    with pytest.raises(ValueError, match="the band of the ratio gate is empty: gate_low 3, gate_high 2"):
        spec(ratio_gate="tis", gate_low=3)
    with pytest.raises(ValueError, match="not to is"):
        spec(ratio_gate="is", gate_low=0.1)
    with pytest.raises(ValueError, match="k2 has no advantage"):
        spec(estimator="k2", advantage_clip=1)
    stage = {"data": {"rows": [{"prompt": "x"}]}, "schedule": {"steps": 1}, "sampling": {"top_p": 0.9}}
    with pytest.raises(ValueError, match="sample from another"):
        StageSpec.model_validate({**stage, "loss": {"objective": "policy_gradient", "ratio_gate": "tis"}})
