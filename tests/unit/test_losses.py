"""The kernel that all objectives share: derivatives, measures, ties, precision, padding.

What every single loss is, and the laws they keep: test_objectives.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stillhouse.core.spec import FullVocabularyLoss, PolicyGradientLoss
from stillhouse.trainer import losses
from stillhouse.trainer.losses import exact_reverse_kl, make_objective, packed_loss
from stillhouse.trainer.objectives.base import Head, Signals
from stillhouse.trainer.objectives.full_vocabulary import ForwardKL, ReverseKL
from stillhouse.trainer.objectives.sampled import PolicyGradient
from tests.unit.loss_oracles import probabilities

R, V, D, D_TEACHER = 7, 11, 5, 6
TEMPERATURE = 0.7


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows a chunk, so that seven rows cross two borders."""
    monkeypatch.setattr(losses, "CHUNK_ROWS", 3)


def draw(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


class Case:
    """A random problem in float64."""

    def __init__(self, *, bias: bool = False, scale: float = 1.0, soft_cap: float = 0.0, seed: int = 0) -> None:
        self.hidden = draw(R, D, seed=seed).requires_grad_()
        self.weight = draw(V, D, seed=seed + 1).requires_grad_()
        self.bias = draw(V, seed=seed + 2).requires_grad_() if bias else None
        self.head = Head(self.weight, self.bias, scale, soft_cap)
        teacher_head = Head(
            draw(V, D_TEACHER, seed=seed + 3), draw(V, seed=seed + 4) if bias else None, scale, soft_cap
        )
        self.ids = torch.arange(R) % V
        self.weights = torch.tensor([1.0, 0.0, 0.0, 0.5, 2.0, 0.3, 1.1], dtype=torch.float64)
        self.teacher = Signals(draw(R, seed=seed + 5).abs().neg(), draw(R, D_TEACHER, seed=seed + 6), teacher_head)

    def leaves(self) -> list[Tensor]:
        return [self.hidden, self.weight] + ([self.bias] if self.bias is not None else [])

    def p(self) -> Tensor:
        return probabilities(self.hidden, self.head, TEMPERATURE)

    def q(self) -> Tensor:
        assert self.teacher.head is not None
        assert self.teacher.hidden is not None
        return probabilities(self.teacher.hidden, self.teacher.head, TEMPERATURE)

    @property
    def trained(self) -> Tensor:
        """[R] bool: the rows that have a weight."""
        return self.weights != 0

    def packed(self, objective) -> losses.PackedLoss:
        return packed_loss(objective, self.hidden, self.head, self.ids, self.weights, self.teacher, TEMPERATURE)


OBJECTIVES = [ReverseKL(), ForwardKL(), PolicyGradient(), PolicyGradient(advantage_clip=0.5)]
HEADS = [{}, {"bias": True}, {"scale": 0.3}, {"bias": True, "scale": 1.7, "soft_cap": 2.5}]


@pytest.mark.parametrize("objective", [ReverseKL(), ForwardKL()], ids=str)
def test_gradient_matches_finite_differences(objective) -> None:
    case = Case(bias=True, scale=0.8, soft_cap=3.0)

    def value(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        head = Head(weight, bias, case.head.scale, case.head.soft_cap)
        # times 3: backward must honour the incoming gradient
        return 3 * packed_loss(objective, hidden, head, case.ids, case.weights, case.teacher, TEMPERATURE).loss

    assert torch.autograd.gradcheck(value, tuple(case.leaves()))


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_measures_match_the_definition(objective) -> None:
    case = Case()
    result = case.packed(objective)
    p, q = case.p().detach(), case.q()
    logprobs = p[torch.arange(R), case.ids].log()
    torch.testing.assert_close(result.logprobs, logprobs * case.trained)
    torch.testing.assert_close(result.entropy, -(p * p.log()).sum(-1) * case.trained)
    exact = isinstance(objective, ReverseKL | ForwardKL)
    assert case.teacher.logprobs is not None
    expected = (p * (p / q).log()).sum(-1) if exact else logprobs - case.teacher.logprobs
    torch.testing.assert_close(result.reverse_kl, expected * case.trained)
    assert not result.reverse_kl.requires_grad


@pytest.mark.parametrize("options", HEADS, ids=str)
def test_policy_gradient_averaged_over_the_vocabulary_is_that_of_the_reverse_kl(options: dict) -> None:
    case = Case(**options)
    full = torch.autograd.grad(case.packed(ReverseKL()).loss, case.leaves())
    average = [torch.zeros_like(leaf) for leaf in case.leaves()]
    p, q = case.p().detach(), case.q()
    for token in range(V):
        ids = torch.full((R,), token)
        weights = case.weights * p[:, token]
        teacher = Signals(q[:, token].log())
        result = packed_loss(PolicyGradient(), case.hidden, case.head, ids, weights, teacher, TEMPERATURE)
        for total, grad in zip(average, torch.autograd.grad(result.loss, case.leaves()), strict=True):
            total += grad
    for total, grad in zip(average, full, strict=True):
        torch.testing.assert_close(total, grad)


def test_tied_weights_collect_both_parts_of_the_gradient() -> None:
    """The embedding feeds the body and is the head: the gradient is that of the naive model with one matrix."""
    tokens = torch.tensor([3, 1, 4, 1, 5, 9, 2])
    case = Case()
    embedding = case.weight
    mix = draw(D, D, seed=42)

    naive_p = probabilities(torch.tanh(embedding[tokens] @ mix), Head(embedding), TEMPERATURE)
    naive = ((naive_p * (naive_p / case.q()).log()).sum(-1) * case.weights).sum()
    (expected,) = torch.autograd.grad(naive, [embedding])

    hidden = torch.tanh(embedding[tokens] @ mix)
    result = packed_loss(ReverseKL(), hidden, Head(embedding), case.ids, case.weights, case.teacher, TEMPERATURE)
    (grad,) = torch.autograd.grad(result.loss, [embedding])
    torch.testing.assert_close(grad, expected)


def test_exact_reverse_kl_matches_the_definition_and_carries_no_gradient() -> None:
    case = Case(bias=True, soft_cap=2.0)
    p, q = case.p().detach(), case.q()
    result = exact_reverse_kl(case.hidden, case.head, case.teacher, TEMPERATURE)
    torch.testing.assert_close(result, (p * (p / q).log()).sum(-1))
    assert not result.requires_grad


def test_heads_of_different_padding_compare_on_the_shared_vocabulary() -> None:
    case = Case(bias=True)
    shared = 8
    student, teacher = case.head.first(shared), case.teacher.head.first(shared)  # type: ignore[union-attr]
    assert case.head.first(V) is case.head
    rows = Signals(hidden=case.teacher.hidden, head=teacher)
    ids = case.ids % shared
    result = packed_loss(ReverseKL(), case.hidden, student, ids, case.weights, rows, TEMPERATURE)
    grad_hidden, grad_weight = torch.autograd.grad(result.loss, [case.hidden, case.weight])
    assert grad_hidden.abs().sum() > 0
    assert grad_weight[:shared].abs().sum() > 0
    assert not grad_weight[shared:].any()


@pytest.mark.parametrize("objective", [ReverseKL(), ForwardKL(), PolicyGradient()], ids=str)
def test_bfloat16_gradients_point_the_same_way(objective) -> None:
    case = Case()
    expected = torch.autograd.grad(case.packed(objective).loss, case.leaves())
    hidden = case.hidden.detach().bfloat16().requires_grad_()
    weight = case.weight.detach().bfloat16().requires_grad_()
    logprobs, states, head = case.teacher.logprobs, case.teacher.hidden, case.teacher.head
    teacher = Signals(logprobs.float(), states.half(), Head(head.weight.float()))  # type: ignore[union-attr]
    result = packed_loss(objective, hidden, Head(weight), case.ids, case.weights, teacher, TEMPERATURE)
    assert result.values.dtype == torch.float32
    for grad, exact in zip(torch.autograd.grad(result.loss, [hidden, weight]), expected, strict=True):
        assert grad.dtype == torch.bfloat16
        assert torch.cosine_similarity(grad.double().flatten(), exact.flatten(), dim=0) > 0.995


def test_bfloat16_gradients_of_many_chunks_add_up_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16, which keeps 8 bits, a sum of 600 equal terms stands still after 256 of them."""
    monkeypatch.setattr(losses, "CHUNK_ROWS", 1)
    rows = 600
    torch.manual_seed(0)
    weight = torch.randn(11, 4).bfloat16().requires_grad_()
    row, state, head = torch.randn(1, 4).bfloat16(), torch.randn(1, 4), Head(torch.randn(11, 4))

    def gradient(number: int) -> torch.Tensor:
        teacher = Signals(hidden=state.expand(number, -1), head=head)
        ids, weights = torch.zeros(number, dtype=torch.long), torch.ones(number)
        loss = packed_loss(ReverseKL(), row.expand(number, -1), Head(weight), ids, weights, teacher).loss
        return torch.autograd.grad(loss, weight)[0].float()

    torch.testing.assert_close(gradient(rows), rows * gradient(1), rtol=0.01, atol=0)


def test_objectives_come_from_the_spec() -> None:
    clipped = PolicyGradientLoss(objective="policy_gradient", advantage_clip=2.0)
    assert make_objective(clipped) == PolicyGradient(advantage_clip=2.0)
    assert make_objective(FullVocabularyLoss(objective="full_vocabulary")) == ReverseKL()
    forward = FullVocabularyLoss(objective="full_vocabulary", divergence="forward_kl")
    assert make_objective(forward) == ForwardKL()
