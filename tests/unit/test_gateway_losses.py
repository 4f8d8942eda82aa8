"""Losses that train something else than they seem to are refused, and the answer says why."""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.gateway_kit import Gateway, make_spec, open_gateway


@pytest.fixture
async def gateway(redis_url: str, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with open_gateway(redis_url, tmp_path) as opened:
        yield opened


def with_loss(loss: dict[str, Any], **stage: Any) -> dict[str, Any]:
    spec = copy.deepcopy(make_spec())
    spec["stages"][0] |= {"loss": loss, **stage}
    return spec


TOP_K: dict[str, Any] = {"objective": "top_k"}
SAMPLED: dict[str, Any] = {"objective": "policy_gradient"}
CROSSING: dict[str, Any] = {**SAMPLED, "cross_tokenizer": True}
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({**TOP_K, "correction": "none"}, "correction", "its gradient is not zero at p = q"),
    ({**TOP_K, "correction": "naive"}, "correction", "the reverse form drives mass out of the support"),
    ({**TOP_K, "correction": "truncated"}, "correction", "the forward form drives all mass into it"),
    ({**TOP_K, "correction": "renormalised"}, "correction", "with k = 1 it has no signal at all"),
    ({**TOP_K, "correction": "renormalized"}, "correction", "Use 'tail' or 'generalised'"),
    ({**TOP_K, "correction": "clamp"}, "correction", "stops learning early"),
    ({**TOP_K, "correction": "tial"}, "correction", "tail"),
    ({**SAMPLED, "estimator": "k1"}, "estimator", "its expected gradient is zero: it trains nothing"),
    ({**SAMPLED, "estimator": "k3"}, "estimator", "its expected gradient is that of the forward KL"),
    ({**SAMPLED, "k": 8}, "", "'k' belongs to baseline top_k"),
    ({**TOP_K, "cross_tokenizer": True}, "", "distributions over different vocabularies have no tokens in common"),
    ({"objective": "full_vocabulary", "cross_tokenizer": True}, "", "'cross_tokenizer' belongs to policy_gradient"),
    ({**CROSSING, "baseline": "top_k"}, "", "baseline top_k is a mean over the next token of one vocabulary"),
    ({**CROSSING, "discount": 0.5}, "", "discount counts tokens"),
    ({**CROSSING, "estimator": "k2"}, "", "estimator k2 is of single tokens"),
    ({**CROSSING, "ratio_gate": "seq_mask"}, "", "ratio_gate seq_mask is a mean over single tokens"),
    ({**CROSSING, "teacher_weight": 0, "reward": {}}, "", "teacher_weight 0 asks no teacher"),
]


@pytest.mark.parametrize(("loss", "field", "reason"), REFUSED, ids=str)
async def test_what_is_not_offered_is_explained(
    gateway: Gateway, loss: dict[str, Any], field: str, reason: str
) -> None:
    body = await gateway.refused(with_loss(loss))
    assert body["code"] == "invalid_request"
    assert reason in body["detail"]
    assert body["param"] == ".".join(["stages.0.loss", *([field] if field else [])])


async def test_what_is_offered_instead_is_accepted(gateway: Gateway) -> None:
    for loss in (TOP_K, {**TOP_K, "correction": "generalised", "support": "union"}, {**SAMPLED, "estimator": "k2"}):
        answer = await gateway.submit(with_loss(loss))
        assert answer.status_code == 201, answer.text


async def test_single_tokens_cannot_be_selected_where_spans_train(gateway: Gateway) -> None:
    body = await gateway.refused(with_loss(CROSSING, tokens={"select": {"by": "entropy", "fraction": 0.5}}))
    assert "only whole spans of text train" in body["detail"]


async def test_the_students_own_tokens_cannot_be_someone_elses(gateway: Gateway) -> None:
    k2 = {"objective": "full_vocabulary", "divergence": "k2"}
    for loss in (SAMPLED, k2):
        body = await gateway.refused(with_loss(loss, on_policy_fraction=0.5, off_policy_source="teacher"))
        assert "over the student's own tokens; set on_policy_fraction to 1 (it is 0.5)" in body["detail"]
    body = await gateway.refused(with_loss({"objective": "cross_entropy"}))
    assert "zero gradient on average" in body["detail"]
