"""The sampled-token family where facts are missing or extreme, and what its spec refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from stillhouse.core.spec import StageSpec
from stillhouse.trainer.batch import MIN_LOG_Q
from stillhouse.trainer.losses import PackedLoss, make_objective, packed_loss
from stillhouse.trainer.objectives.base import Head, Signals
from stillhouse.trainer.objectives.sampled import PolicyGradient, RatioGate
from tests.unit.loss_cases import loss, policy_gradients, rewarded

V = 6
LOGITS = torch.randn(4, V, generator=torch.Generator().manual_seed(0)).double()
IDS = torch.tensor([1, 0, 5, 2])
LOG_P = LOGITS.log_softmax(-1).gather(1, IDS[:, None])[:, 0]
SAMPLE = torch.tensor([0, 0, 1, 1])
GATES: list[dict[str, Any]] = [{"ratio_gate": gate} for gate in ("none", "is", "tis", "icepop", "seq_mask")]


def run(spec: Any, **signals: Any) -> tuple[PackedLoss, Tensor]:
    """(result, [4, V] gradient)."""
    logits, head = LOGITS.clone().requires_grad_(), Head(torch.eye(V).double())
    facts = {"rollout_logprobs": LOG_P, "sample": SAMPLE, **signals}
    result = packed_loss(make_objective(spec), logits, head, IDS, torch.ones(4).double(), Signals(**facts))
    return result, torch.autograd.grad(result.loss, logits)[0]


@pytest.mark.parametrize("term", ["trainer", "sampler"])
@pytest.mark.parametrize("gate", GATES, ids=str)
def test_tokens_that_the_student_did_not_sample_count_for_nothing(gate: dict[str, Any], term: str) -> None:
    """Their rollout log-probability is NaN; the other sequence is as it would be without them."""
    spec = loss("policy_gradient", student_term=term, **gate)
    log_q = torch.tensor([-1.0, -2.0, -0.5, -3.0]).double()
    foreign = torch.tensor([torch.nan, torch.nan, 0.0, 0.0]).double()
    result, grad = run(spec, logprobs=log_q, rollout_logprobs=LOG_P + foreign)
    _, expected = run(spec, logprobs=log_q)
    assert not grad[:2].any()
    assert not result.gate[:2].any()
    assert not result.values[:2].any()
    torch.testing.assert_close(grad[2:], expected[2:])
    assert expected[2:].any()


@pytest.mark.parametrize("kind", ["icepop", "seq_mask"])
def test_an_infinite_ratio_is_outside_the_band(kind: Any) -> None:
    log_ratio = torch.tensor([1000.0, 0.0, 0.0, 0.0]).double()
    gate = RatioGate(kind, 0.999, 1.002)(log_ratio, Signals(sample=torch.tensor([0, 1, 1, 1])))
    assert gate.tolist() == [0, 1, 1, 1]


BY_TOKEN = [spec for spec in policy_gradients(baseline="none") if not spec.cross_tokenizer]


@pytest.mark.parametrize("spec", BY_TOKEN, ids=str)
def test_a_token_that_the_teacher_forbids_is_next_to_impossible(spec: Any) -> None:
    log_q = torch.tensor([-torch.inf, -2.0, -0.5, -3.0]).double()
    result, grad = run(spec, logprobs=log_q)
    _, expected = run(spec, logprobs=log_q.clamp(min=MIN_LOG_Q))
    assert bool(torch.isfinite(result.values).all())
    assert bool(torch.isfinite(result.reverse_kl).all())
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("absent", [None, torch.full((4,), torch.nan)], ids=["none", "nan"])
@pytest.mark.parametrize("spec", [spec for spec in rewarded() if spec.teacher_weight == 0], ids=str)
def test_the_outcome_alone_needs_no_teacher(spec: Any, absent: Tensor | None) -> None:
    outcome = torch.tensor([1.5, 1.5, -0.5, -0.5]).double()
    result, grad = run(spec, logprobs=absent, outcome=outcome)
    one_hot = torch.eye(V).double()[IDS]
    torch.testing.assert_close(grad, -0.6 * outcome[:, None] * (one_hot - LOGITS.softmax(-1)))
    assert bool(torch.isnan(result.reverse_kl).all())


def test_what_it_learns_from_must_be_there() -> None:
    with pytest.raises(AssertionError, match="outcome"):
        run(loss("policy_gradient", reward={}), logprobs=LOG_P)
    with pytest.raises(AssertionError, match="teacher's log-probabilities"):
        run(loss("policy_gradient"))


def test_the_clip_leaves_the_outcome_alone() -> None:
    """Advantages -0.2 (clipped) and 0.6 * 3: the sum is not clipped, nor is the outcome before it is added."""
    spec = loss("policy_gradient", advantage_clip=0.2, reward={"weight": 0.6})
    result, _ = run(spec, logprobs=LOG_P - 5, outcome=torch.full((4,), 3.0))
    torch.testing.assert_close(result.values, -(0.6 * 3 - 0.2) * LOG_P)


def test_the_spec_reaches_the_objective() -> None:
    spec = loss("policy_gradient", reward={"weight": 2}, teacher_weight=0.5, baseline="top_k", advantage_clip=3)
    expected = PolicyGradient(advantage_clip=3, baseline="top_k", teacher_weight=0.5, reward_weight=2)
    assert make_objective(spec) == expected
    assert spec.payload() == "top_k"
    assert make_objective(loss("policy_gradient")) == PolicyGradient()
    seq_mask = make_objective(loss("policy_gradient", ratio_gate="seq_mask"))
    assert seq_mask == PolicyGradient(gate=RatioGate("seq_mask", 0.999, 1.002))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ratio_gate": "tis", "gate_low": 3}, "the band of the ratio gate is empty: gate_low 3, gate_high 2"),
        ({"ratio_gate": "is", "gate_low": 0.1}, "not to is"),
        ({"estimator": "k2", "advantage_clip": 1}, "k2 has no advantage"),
        ({"estimator": "k2", "baseline": "top_k"}, "k2 has no advantage"),
        ({"baseline": "full_vocabulary", "discount": 0.5}, "Use one of the two"),
        ({"k": 8}, "'k' belongs to baseline top_k, the baseline is none"),
        ({"baseline": "top_k", "hidden_dtype": "float32"}, "'hidden_dtype' belongs to baseline full_vocabulary"),
        ({"teacher_weight": 0}, "leaves nothing to learn from"),
        ({"teacher_weight": 0, "reward": {}, "discount": 0.5}, "they are the teacher's"),
        ({"teacher_weight": 0, "reward": {}, "student_term": "sampler"}, "they are the teacher's"),
    ],
    ids=str,
)
def test_what_would_be_ignored_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss("policy_gradient", **fields)


def test_defaults_written_out_are_no_idle_knobs() -> None:
    for spec in (*policy_gradients(), *rewarded()):
        assert type(spec).model_validate(spec.model_dump(mode="json")) == spec


def test_forms_of_the_students_own_tokens_stay_on_policy() -> None:
    stage: dict[str, Any] = {"data": {"rows": [{"prompt": "x"}]}, "schedule": {"steps": 1}}
    for wrong in ({"objective": "policy_gradient"}, {"objective": "full_vocabulary", "divergence": "k2"}):
        with pytest.raises(ValueError, match="over the student's own tokens; set on_policy_fraction to 1"):
            StageSpec.model_validate({**stage, "loss": wrong, "on_policy_fraction": 0.5})
