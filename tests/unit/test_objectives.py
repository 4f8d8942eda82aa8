"""Every loss of the format against its definition, and the laws that they all keep.

The list of losses is made from the choices that the format offers (loss_cases.py), the definitions are in
loss_oracles.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings

from stillhouse.core.spec import FullVocabularyLoss, PolicyGradientLoss, TopKLoss
from stillhouse.trainer import losses
from tests.unit.loss_cases import DISTILLATION, EVERY_LOSS, Case, cases, divergences, loss, name, top_ks
from tests.unit.loss_oracles import gate_of_rows, kl, loss_of_rows, reverse_kl_of_rows

QUICK = settings(max_examples=6)
THOROUGH = settings(max_examples=30)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences cross the borders of chunks, and chunks have several tiles."""
    monkeypatch.setattr(losses, "CHUNK_ROWS", 7)
    monkeypatch.setitem(losses.TILE_ELEMENTS, "cpu", 1)  # tiles of 4 rows, the least


def assert_gradients(actual: Any, expected: Any) -> None:
    for grad, expected_grad in zip(actual, expected, strict=True):
        # next to large elements the definition itself loses the small ones to cancellation
        size = float(expected_grad.abs().max())
        torch.testing.assert_close(grad, expected_grad, rtol=1e-6, atol=1e-8 * size + 1e-12)


def check_against_the_definition(spec: Any, case: Case) -> None:
    expected = loss_of_rows(spec, case)
    expected_grads = torch.autograd.grad((expected * case.weights).sum(), case.leaves())
    result, trained = case.packed(spec), case.trained
    torch.testing.assert_close(result.values[trained], expected.detach()[trained], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(result.loss, (expected * case.weights).sum(), rtol=1e-6, atol=1e-9)
    assert_gradients(torch.autograd.grad(result.loss, case.leaves()), expected_grads)
    measured = reverse_kl_of_rows(spec, case)
    torch.testing.assert_close(result.reverse_kl[trained], measured[trained], rtol=1e-6, atol=1e-9, equal_nan=True)
    gate = gate_of_rows(spec, case) if isinstance(spec, PolicyGradientLoss) else torch.ones_like(measured)
    torch.testing.assert_close(result.gate[trained], gate[trained], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("spec", EVERY_LOSS, ids=name)
@given(case=cases())
@QUICK
def test_value_gradient_and_measures_are_those_of_the_definition(spec: Any, case: Case) -> None:
    check_against_the_definition(spec, case)


@pytest.mark.full
@pytest.mark.parametrize("spec", EVERY_LOSS, ids=name)
@given(case=cases())
@THOROUGH
def test_the_same_on_many_more(spec: Any, case: Case) -> None:
    check_against_the_definition(spec, case)


@pytest.mark.parametrize("spec", DISTILLATION, ids=name)
@given(case=cases(same=True))
@QUICK
def test_equal_models_have_nothing_to_learn(spec: Any, case: Case) -> None:
    result = case.packed(spec)
    assert result.values.abs().max() < 1e-9
    assert result.reverse_kl.abs().max() < 1e-9
    for grad in torch.autograd.grad(result.loss, case.leaves()):
        assert grad.abs().max() < 1e-9


@pytest.mark.parametrize("spec", divergences() + top_ks(), ids=name)
@given(case=cases(forbids=False))
@QUICK
def test_a_divergence_is_never_negative_and_the_measure_is_a_lower_bound(spec: Any, case: Case) -> None:
    result = case.packed(spec)
    assert result.values.min() > -1e-9
    if isinstance(spec, TopKLoss):
        assert (result.reverse_kl <= kl(case.p().detach(), case.q()) + 1e-9)[case.trained].all()


@pytest.mark.parametrize("spec", EVERY_LOSS, ids=name)
@given(case=cases(lengths=[3, 1, 2]))
@settings(max_examples=3)
def test_order_split_and_chunks_change_nothing(spec: Any, case: Case) -> None:
    """Sequences may come in any order, in any number of calls: micro-batches, teachers one after the other."""
    whole = case.packed(spec)
    grads = torch.autograd.grad(whole.loss, case.leaves())
    order = torch.tensor([3, 4, 5, 0, 1, 2])
    parts = [case.packed(spec, rows) for rows in (order[:1], order[1:])]
    split = torch.autograd.grad(sum(part.loss for part in parts), case.leaves())  # type: ignore[arg-type]
    torch.testing.assert_close(torch.cat([part.values for part in parts]), whole.values[order])
    assert_gradients(split, grads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "CHUNK_ROWS", 512)
        at_once = case.packed(spec)
        torch.testing.assert_close(at_once.values, whole.values)
        assert_gradients(torch.autograd.grad(at_once.loss, case.leaves()), grads)


@pytest.mark.parametrize("direction", ["forward_kl", "reverse_kl"])
@given(case=cases(k=12, forbids=False))
@QUICK
def test_a_support_of_everything_is_the_full_divergence(direction: str, case: Case) -> None:
    whole = case.packed(loss("full_vocabulary", divergence=direction))
    expected = torch.autograd.grad(whole.loss, case.leaves())
    for correction in ("tail", "generalised"):
        ours = case.packed(loss("top_k", divergence=direction, correction=correction))
        torch.testing.assert_close(ours.values, whole.values, rtol=1e-9, atol=1e-9)
        assert_gradients(torch.autograd.grad(ours.loss, case.leaves()), expected)


@pytest.mark.parametrize("spec", top_ks(), ids=name)
def test_next_to_impossible_tokens_stay_finite_in_float32(spec: Any) -> None:
    """The student's p of a token underflows where the teacher is sure of it, and the other way round."""
    logits = torch.tensor([[0.0, -200.0, -150.0, 1.0]], requires_grad=True)
    log_q = torch.tensor([[-torch.inf, -0.1, -2.4, -8.0]])
    signals = losses.Signals(topk_ids=torch.tensor([[1, 0]]), topk_logprobs=log_q[:, [1, 0]])
    head = losses.Head(torch.eye(4))
    objective = losses.make_objective(spec)
    result = losses.packed_loss(objective, logits, head, torch.zeros(1, dtype=torch.long), torch.ones(1), signals)
    (grad,) = torch.autograd.grad(result.loss, logits)
    assert bool(torch.isfinite(grad).all())
    assert bool(torch.isfinite(result.values).all())


@pytest.mark.parametrize("spec", top_ks(), ids=name)
def test_a_row_without_any_token_counts_for_nothing(spec: Any) -> None:
    case = Case([2], 6, (3, 3), 2, 1.0, {}, seed=5)
    signals = case.signals(loss("top_k", support="union"))
    assert signals.topk_mask is not None
    signals.topk_mask[0] = False
    result = losses.packed_loss(
        losses.make_objective(spec), case.hidden, case.head, case.ids, torch.ones(2).double(), signals
    )
    (grad,) = torch.autograd.grad(result.loss, case.hidden)
    assert result.values[0] == 0
    assert not grad[0].any()
    assert grad[1].any()


def test_a_new_loss_cannot_be_forgotten() -> None:
    """Every choice of the format is in the list; a choice without a definition fails above."""
    for model, field in (
        (FullVocabularyLoss, "divergence"),
        (TopKLoss, "support"),
        (PolicyGradientLoss, "ratio_gate"),
        (PolicyGradientLoss, "baseline"),
    ):
        found = {getattr(spec, field) for spec in EVERY_LOSS if isinstance(spec, model)}
        assert found == set(model.model_fields[field].annotation.__args__)  # type: ignore[union-attr]
    objectives = {spec.objective for spec in EVERY_LOSS}
    assert objectives == {"full_vocabulary", "top_k", "policy_gradient", "cross_entropy"}


def test_cross_entropy_rests_at_the_texts_own_frequencies() -> None:
    """2 of 3 rows say token 1, 1 says token 4: there, and not at the teacher, the sum of their gradients is 0."""
    logits = torch.full((6,), -50.0, dtype=torch.float64)
    logits[[1, 4]] = torch.tensor([2 / 3, 1 / 3], dtype=torch.float64).log()
    rows, ids = logits.repeat(3, 1).requires_grad_(), torch.tensor([1, 1, 4])
    head, ones = losses.Head(torch.eye(6, dtype=torch.float64)), torch.ones(3, dtype=torch.float64)
    result = losses.packed_loss(losses.make_objective(loss("cross_entropy")), rows, head, ids, ones, losses.Signals())
    (grad,) = torch.autograd.grad(result.loss, rows)
    assert grad.abs().max() > 0.1
    torch.testing.assert_close(grad.sum(0), torch.zeros_like(logits), atol=1e-12, rtol=0)
