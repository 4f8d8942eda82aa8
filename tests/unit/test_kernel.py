"""What the kernel computes and holds: products linear in the rows that have a weight, memory that forgets the rows.

The right values are the subject of test_losses.py and test_objectives*.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from stillhouse.trainer import losses
from stillhouse.trainer.losses import exact_reverse_kl, packed_loss, sampled_logprobs
from stillhouse.trainer.objectives import base
from stillhouse.trainer.objectives.base import Head, Signals
from stillhouse.trainer.objectives.cross_entropy import CrossEntropy
from stillhouse.trainer.objectives.full_vocabulary import GeneralisedJSD, ReverseKL
from stillhouse.trainer.objectives.sampled import PolicyGradient
from stillhouse.trainer.objectives.topk import TopK

R, V, D, D_TEACHER = 60, 40, 8, 5
K = 3


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Case:
    """Random rows, and everything that any objective may ask of a teacher."""

    def __init__(self, rows: int = R, vocab: int = V) -> None:
        self.hidden = normal(rows, D).requires_grad_()
        self.weight = normal(vocab, D, seed=1).requires_grad_()
        self.bias: Tensor | None = None
        self.ids = torch.arange(rows) % vocab
        self.weights = torch.ones(rows)
        self.teacher = Signals(
            logprobs=-normal(rows, seed=2).abs(),
            hidden=normal(rows, D_TEACHER, seed=3),
            head=Head(normal(vocab, D_TEACHER, seed=4)),
            topk_ids=torch.arange(K).expand(rows, K),
            topk_logprobs=normal(rows, K, seed=5).log_softmax(-1) - 1,
        )

    def packed(self, objective: Any) -> losses.PackedLoss:
        head = Head(self.weight, self.bias)
        return packed_loss(objective, self.hidden, head, self.ids, self.weights, self.teacher, 0.8)


class Products(TorchDispatchMode):
    """Counts the multiply-adds of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[override]
        matrices = [a for a in args if isinstance(a, Tensor) and a.ndim == 2][-2:]
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.count += matrices[0].shape[0] * matrices[0].shape[1] * matrices[1].shape[1]
        return func(*args, **(kwargs or {}))


def products(case: Case, objective: Any) -> int:
    """Multiply-adds of forward and backward."""
    with Products() as counted:
        loss = case.packed(objective).loss
        if loss.requires_grad:
            loss.backward()
    return counted.count


FULL, SAMPLED = [ReverseKL(), GeneralisedJSD(0.5)], [PolicyGradient(), TopK("reverse", "tail"), CrossEntropy()]


@pytest.mark.parametrize("objective", FULL, ids=str)
def test_a_full_divergence_costs_three_products_with_the_head_and_one_with_the_teachers(objective) -> None:
    assert products(Case(), objective) == R * V * (3 * D + D_TEACHER)


@pytest.mark.parametrize("objective", SAMPLED, ids=str)
def test_other_objectives_never_apply_the_teachers_head(objective) -> None:
    assert products(Case(), objective) == R * V * 3 * D


@pytest.mark.parametrize(
    ("hidden", "weight", "expected"), [(True, True, 3), (True, False, 2), (False, True, 2), (False, False, 1)]
)
def test_what_needs_no_gradient_costs_no_product(hidden: bool, weight: bool, expected: int) -> None:
    case = Case()
    both = torch.autograd.grad(case.packed(ReverseKL()).loss, (case.hidden, case.weight))
    case.hidden.requires_grad_(hidden)
    case.weight.requires_grad_(weight)
    assert products(case, ReverseKL()) == R * V * (expected * D + D_TEACHER)
    for leaf, wanted, grad in zip((case.hidden, case.weight), (hidden, weight), both, strict=True):
        assert (leaf.grad is not None) == wanted
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, grad)


def test_a_frozen_bias_next_to_a_trained_weight() -> None:
    case = Case()
    case.bias = normal(V, seed=6)
    grads = torch.autograd.grad(case.packed(ReverseKL()).loss, (case.hidden, case.weight))
    case.bias.requires_grad_()
    with_bias = torch.autograd.grad(case.packed(ReverseKL()).loss, (case.hidden, case.weight, case.bias))
    for grad, expected in zip(grads, with_bias, strict=False):
        torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("chosen", [0, 1, 17, 59])
@pytest.mark.parametrize("objective", [*FULL, *SAMPLED], ids=str)
def test_rows_without_weight_are_not_computed(objective, chosen: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK_ROWS", 20)
    whole = products(Case(), objective)
    case = Case()
    case.weights = torch.zeros(R).index_fill_(0, torch.randperm(R)[:chosen], 0.5)
    assert products(case, objective) * R == whole * chosen
    assert case.hidden.grad is not None
    assert not case.hidden.grad[case.weights == 0].any()
    assert not case.packed(objective).entropy[case.weights == 0].any()


def test_a_batch_without_any_weight_has_loss_and_gradients_of_zero() -> None:
    case = Case()
    case.weights = torch.zeros(R)
    loss = case.packed(ReverseKL()).loss
    loss.backward()
    assert loss.item() == 0
    assert case.hidden.grad is not None
    assert case.weight.grad is not None
    assert not case.hidden.grad.any()
    assert not case.weight.grad.any()


def peak_bytes(case: Case, objective: Any) -> int:
    """Most bytes that tensors made by forward and backward held at once, by the allocator's own record."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        case.packed(objective).loss.backward()
    events = sorted(recorded.profiler.kineto_results.events(), key=lambda event: event.start_ns())  # type: ignore[union-attr]
    held = peak = 0
    for event in events:
        if event.name() == "[memory]":
            held += event.nbytes()  # type: ignore[attr-defined]
            peak = max(peak, held)
    assert peak > 0
    return peak


@pytest.mark.parametrize("objective", [*FULL, *SAMPLED], ids=str)
def test_memory_grows_with_the_rows_by_their_hidden_gradient_only(objective, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK_ROWS", 32)
    monkeypatch.setitem(losses.TILE_ELEMENTS, "cpu", 4096)
    small, large, vocab = 256, 1024, 1024
    peaks = [peak_bytes(Case(rows, vocab), objective) for rows in (small, small, large)][1:]
    measures_bytes = 8 * 4  # loss, four measures and the little of a row that lives on
    assert peaks[1] - peaks[0] <= (large - small) * (1.1 * 4 * D + measures_bytes)
    buffers = 2 if objective in FULL else 1
    tiles = 6 * 4  # rows of temporaries of the objective's size
    assert peaks[0] <= 4 * (vocab * (buffers * 32 + tiles) + vocab * D + small * (D + 16)) * 1.05


def test_backward_hands_over_the_gradient_of_the_head_without_a_copy() -> None:
    case = Case()
    loss = case.packed(ReverseKL()).loss
    made = {grad.data_ptr() for grad in loss.grad_fn.saved_tensors if grad is not None}  # type: ignore[union-attr]
    loss.backward()
    assert case.weight.grad is not None
    assert case.weight.grad.data_ptr() in made


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_rows_are_taken_as_they_are(kind: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in bfloat16 go by pieces of the vocabulary; the values are those of the rounded inputs."""
    monkeypatch.setattr(base, "CONVERTED_COLUMNS", 7)
    case, rounded = Case(), Case()
    hidden = case.hidden.detach().to(kind).requires_grad_()
    states = case.teacher.hidden.to(kind)  # type: ignore[union-attr]
    weight = case.weight.detach().bfloat16().requires_grad_()
    signals = Signals(hidden=states, head=Head(case.teacher.head.weight.bfloat16()))  # type: ignore[union-attr]
    result = packed_loss(ReverseKL(), hidden, Head(weight), case.ids, case.weights, signals, 0.8)
    rounded.hidden = hidden.detach().float().requires_grad_()
    rounded.weight = weight.detach().float().requires_grad_()
    rounded.teacher = Signals(hidden=states.float(), head=Head(signals.head.weight.float()))  # type: ignore[union-attr]
    expected = rounded.packed(ReverseKL())
    torch.testing.assert_close(result.values, expected.values, rtol=0.05, atol=0.05)
    grads = torch.autograd.grad(result.loss, (hidden, weight))
    exact = torch.autograd.grad(expected.loss, (rounded.hidden, rounded.weight))
    assert [grad.dtype for grad in grads] == [kind, torch.bfloat16]
    for grad, other in zip(grads, exact, strict=True):
        assert torch.cosine_similarity(grad.float().flatten(), other.flatten(), dim=0) > 0.99


def test_measures_without_gradients_agree_with_the_loss() -> None:
    case = Case()
    result = case.packed(ReverseKL())
    head = Head(case.weight)
    torch.testing.assert_close(exact_reverse_kl(case.hidden, head, case.teacher, 0.8), result.values)
    torch.testing.assert_close(sampled_logprobs(case.hidden, head, case.ids, 0.8), result.logprobs)
    assert len(exact_reverse_kl(case.hidden[:0], head, case.teacher[:0], 0.8)) == 0


def test_chunks_are_of_nearly_the_same_size_and_cover_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK_ROWS", 10)
    for rows in range(60):
        sizes = [chunk.stop - chunk.start for chunk in losses._chunks(rows)]
        assert sum(sizes) == rows
        assert len(sizes) == -(-rows // 10)
        assert max(sizes, default=0) <= 10
