"""Samples from part of the distribution (top_p, top_k, min_p): what stays right is allowed, what does not is refused.

Means are exact: sums over the tokens that can be drawn. V tokens, of which S are kept.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from stillhouse.core.spec import StageSpec
from stillhouse.core.suspicions import filtered
from stillhouse.trainer.losses import make_objective, packed_loss
from stillhouse.trainer.objectives.base import Head, Signals
from tests.unit.loss_cases import loss

V, S = 6, 4
KEPT = torch.tensor([0.4, 0.25, 0.15, 0.1]).double()
STUDENT = torch.cat([KEPT, torch.tensor([0.07, 0.03]).double()])
TEACHER = torch.cat([KEPT, torch.tensor([0.02, 0.08]).double()])
"""Equal where tokens are drawn, and in the mass of the rest."""
STAGE: dict[str, Any] = {"data": {"rows": [{"prompt": "x"}]}, "schedule": {"steps": 1, "group_size": 2}}
FILTERS: list[dict[str, Any]] = [{"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.05}]


def mean_gradient(spec: Any, number: int, **facts: Any) -> Tensor:
    """[V] gradient of the logits, averaged over samples from the first `number` tokens."""
    drawn = STUDENT[:number] / STUDENT[:number].sum()
    logits = STUDENT.log().expand(number, V).clone().requires_grad_()
    signals = Signals(
        logprobs=TEACHER.log()[:number],
        hidden=TEACHER.log().expand(number, V).clone(),
        head=Head(torch.eye(V).double()),
        rollout_logprobs=STUDENT.log()[:number],
        **facts,
    )
    head = Head(torch.eye(V).double())
    result = packed_loss(make_objective(spec), logits, head, torch.arange(number), drawn, signals)
    return torch.autograd.grad(result.loss, logits)[0].sum(0)


@pytest.mark.parametrize("estimator", ["advantage", "k2"])
def test_the_plain_form_rests_where_student_and_teacher_agree_on_what_is_drawn(estimator: str) -> None:
    spec = loss("policy_gradient", estimator=estimator)
    torch.testing.assert_close(mean_gradient(spec, S), torch.zeros(V).double())
    assert mean_gradient(spec, V).abs().max() > 0.01, "over all tokens there is something left to learn: the rest"


def test_a_baseline_does_not() -> None:
    """It moves mass between the kept tokens and the rest, although both have what the teacher gives them."""
    spec = loss("policy_gradient", baseline="full_vocabulary")
    assert mean_gradient(spec, S).abs().max() > 1e-3
    plain = mean_gradient(loss("policy_gradient"), V)
    torch.testing.assert_close(mean_gradient(spec, V), plain, msg="over all tokens it changes no mean")


def test_an_outcome_does_not() -> None:
    """A reward that the token has no part in has no gradient, unless unlikely tokens are never drawn."""
    spec = loss("policy_gradient", teacher_weight=0, reward={})
    torch.testing.assert_close(mean_gradient(spec, V, outcome=torch.ones(V).double()), torch.zeros(V).double())
    assert mean_gradient(spec, S, outcome=torch.ones(S).double()).abs().max() > 0.01


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"ratio_gate": "tis"}, "ratio_gate 'tis' compares with the policy that sampled"),
        ({"baseline": "top_k"}, "baseline 'top_k' changes no mean"),
        ({"baseline": "full_vocabulary"}, "baseline 'full_vocabulary' changes no mean"),
        ({"reward": {}}, "an outcome reward"),
    ],
    ids=str,
)
def test_what_would_train_something_else_is_refused(
    fields: dict[str, Any], words: str, filters: dict[str, Any]
) -> None:
    wrong = {**STAGE, "loss": {"objective": "policy_gradient", **fields}, "sampling": filters}
    ((name, value),) = filters.items()
    with pytest.raises(ValueError, match=rf"{words}.*{name} {value}.*set top_p: 1, top_k: 0, min_p: 0"):
        StageSpec.model_validate(wrong)
    StageSpec.model_validate({**wrong, "sampling": {"top_p": 1, "top_k": 0, "min_p": 0}})


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize(
    ("objective", "fields", "warns"),
    [
        ("policy_gradient", {}, True),
        ("full_vocabulary", {"divergence": "k2"}, True),
        ("full_vocabulary", {}, False),
        ("top_k", {"support": "student"}, False),
    ],
)
def test_what_is_learned_at_sampled_tokens_only_is_said(
    objective: str, fields: dict[str, Any], warns: bool, filters: dict[str, Any]
) -> None:
    """Divergences over all tokens of a position only see other prefixes."""
    stage = {**STAGE, "loss": {"objective": objective, **fields}}
    warning = filtered(StageSpec.model_validate({**stage, "sampling": filters}))
    assert bool(warning) == warns
    assert not warns or next(iter(filters)) in warning
    assert not filtered(StageSpec.model_validate(stage))
