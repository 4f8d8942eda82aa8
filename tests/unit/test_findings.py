"""What measurements mean: laws of the checks of a live pre-flight, and the report that collects them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.core.errors import PreflightError
from stillhouse.core.estimate import estimate
from stillhouse.core.schemas import Check
from stillhouse.core.spec import JobSpec
from stillhouse.trainer import findings, memory, probes
from stillhouse.trainer.report import Report
from tests.chaos.sim.toys import entry
from tests.cluster import job_spec

RNG = np.random.default_rng(0)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )


def likeliest(logprobs: np.ndarray, k: int) -> np.ndarray:
    return np.argsort(-logprobs, axis=1)[:, :k]


@pytest.mark.parametrize("k", [1, 8, 32])
def test_the_kl_of_buckets_is_between_zero_and_the_exact_one(k: int) -> None:
    log_p, log_q = (log_softmax(3 * RNG.normal(size=(50, 32))) for _ in range(2))
    ids = likeliest(log_p, k)
    named = [np.take_along_axis(each, ids, axis=1) for each in (log_p, log_q)]
    found = probes.bucket_kl(*named)
    exact = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
    assert (found >= -1e-6).all()
    assert (found <= exact + 1e-6).all()
    if k == 32:
        np.testing.assert_allclose(found, exact, atol=1e-5)
    assert np.abs(probes.bucket_kl(named[0], named[0])).max() < 1e-6


def test_equal_models_overlap_wholly() -> None:
    ids = likeliest(RNG.normal(size=(20, 64)), 16)
    assert (probes.shared(ids, ids[:, ::-1]) == 1).all(), "in whatever order"
    assert (probes.shared(ids, ids + 64) == 0).all()


@given(st.sampled_from([0.3, 0.5, 0.7, 1.0, 1.3]), st.sampled_from([0.3, 0.5, 0.7, 1.0, 1.3]))
def test_the_temperature_that_was_used_is_named(wanted: float, used: float) -> None:
    logits = np.random.default_rng(1).normal(size=(200, 50)) * 3
    at = {t: log_softmax(logits / t)[:, 0] for t in {wanted, used, 0.9, 1.1}}
    gaps = {t: float(np.abs(logprobs - at[used]).mean()) for t, logprobs in at.items()}
    check = findings.temperature("sampler s", wanted, gaps, "float32")
    if wanted == used:
        assert check.verdict == "ok"
    else:
        assert (check.verdict, check.evidence["fits_best"]) == ("error", used)
        assert f"temperature {used:g}, the job samples at {wanted:g}" in check.message


def test_a_gap_that_no_temperature_explains_is_left_to_its_own_check() -> None:
    check = findings.temperature("sampler s", 1.0, {1.0: 0.2, 0.7: 0.19}, "float32")
    assert check.verdict == "skipped"
    assert "see sampler_gap" in check.message


@pytest.mark.parametrize(
    ("mean", "dtype", "verdict"),
    [
        (5e-5, "float32", "ok"),
        (5e-3, "float32", "warning"),
        (0.04, "bfloat16", "ok"),
        (0.1, "bfloat16", "warning"),
        (0.6, "bfloat16", "error"),
        (math.nan, "float32", "error"),
    ],
)
def test_a_gap_is_judged_by_what_the_element_type_explains(mean: float, dtype: str, verdict: str) -> None:
    assert findings.sampler_gap("s", mean, mean, dtype, 1.0).verdict == verdict


def test_a_teacher_is_uniform_only_if_it_says_the_same_everywhere() -> None:
    flat = -math.log(260)
    assert findings.uniform("main", np.full(40, flat), 260).verdict == "error"
    # the same mean by accident is no uniform teacher
    assert findings.uniform("main", flat + RNG.normal(0, 0.5, 40), 260).verdict == "ok"
    assert findings.uniform("main", np.full(40, np.nan), 260).verdict == "error"


def test_of_three_replicas_the_odd_one_is_named() -> None:
    said = {name: np.full(30, -1.0) for name in ("a", "b", "c")}
    assert findings.replicas("main", said, [], "float32").verdict == "ok"
    said["b"] = said["b"] + 0.2
    check = findings.replicas("main", said, [], "float32")
    assert check.verdict == "error"
    assert "disagree: b (0.2 nats per token off), compared with the median of all" in check.message


def test_a_score_that_depends_on_its_batch_is_not_called_random() -> None:
    check = findings.repeats("main", "t-0", np.zeros(9), np.full(9, 0.05), "float32")
    assert check.verdict == "error"
    assert "depends on its batch" in check.message


@pytest.mark.parametrize(
    ("kl", "is_same", "verdict"),
    [
        (0.5, False, "ok"),
        (3.5, False, "warning"),
        (1e-5, False, "warning"),
        (1e-7, True, "warning"),
        (0.1, True, "error"),
    ],
)
def test_a_distance_is_judged_by_whose_it_is(kl: float, is_same: bool, verdict: str) -> None:
    assert findings.initial_kl("main", kl, is_same=is_same, dtype="float32").verdict == verdict


@pytest.mark.parametrize(("cut", "max_tokens", "verdict"), [(2, 8, "ok"), (3, 8, "warning"), (10, 16, "ok")])
def test_truncation_counts_where_the_job_would_truncate(cut: int, max_tokens: int, verdict: str) -> None:
    assert findings.truncation(cut, 10, max_tokens, 8).verdict == verdict


# -- memory and cost -------------------------------------------------------------------------------------------------


def room(num_bytes: int, *host: int) -> list[memory.Room]:
    if not host:
        return [memory.Room(num_bytes, "x")]
    return [memory.Room(num_bytes, "a GPU", "device"), *(memory.Room(each, "x", "host") for each in host)]


def test_memory_counts_what_learns_and_refuses_only_what_cannot_fit() -> None:
    spec = JobSpec.model_validate(job_spec())
    model = entry("student").model_copy(update={"num_parameters": 1_000_000})
    parts = memory.needed(spec, model, {"main": entry("teacher")})
    assert {name: parts[name] for name in ("weights", "gradients", "optimizer", "published weights")} == {
        "weights": 4_000_000,
        "gradients": 4_000_000,
        "optimizer": 8_000_000,
        "published weights": 4_000_000,
    }
    total = sum(parts.values())
    assert memory.memory(parts, room(total)).verdict == "ok"
    assert memory.memory(parts, room(total - 1)).verdict == "warning", "activations are an estimate"
    assert memory.memory(parts, room(19_000_000)).verdict == "error"
    lies_on_host = sum(parts[name] for name in memory.HOST)
    fits = total - lies_on_host
    assert memory.memory(parts, room(fits, lies_on_host)).verdict == "ok"
    assert memory.memory(parts, room(fits - 1, lies_on_host)).evidence["available_by"] == "a GPU"
    short = memory.memory(parts, room(fits, parts["published weights"] - 1))
    assert (short.verdict, short.evidence["available_by"]) == ("error", "x")
    lora = JobSpec.model_validate(job_spec(student={"model": "student", "lora": {"rank": 1}}))
    assert memory.needed(lora, model, {})["optimizer"] < 100_000


def test_the_cost_follows_the_lengths_that_were_measured() -> None:
    spec = JobSpec.model_validate(job_spec(evaluation={"data": {"rows": [{"prompt": "x"}]}, "max_tokens": 10}))
    models: Any = (entry("student"), {"main": entry("teacher")})
    cost = estimate(spec, *models, length_share=0.5, seconds_per_token=0.1)
    # 4 steps of 3 prompts with 8 tokens; before and after, a sampled and a greedy text of 10
    assert (cost.trained_tokens.at_most, cost.trained_tokens.expected) == (96, 48)
    assert (cost.sampled_tokens.at_most, cost.sampled_tokens.expected) == (136, 68)
    assert cost.seconds == pytest.approx(6.8)
    assert cost.bytes["scores"] == 96 * (4 + 2 * 4)


# -- the report ------------------------------------------------------------------------------------------------------


async def test_a_later_claim_says_nothing_twice(tmp_path: Path) -> None:
    told: list[str] = []

    async def tell(kind: str, message: str, **data: Any) -> None:
        told.append(message)

    warning = Check(name="memory", verdict="warning", message="little", fix="more")
    first = Report(tmp_path / "preflight.json", tell, is_live=False)
    first.load()
    await first.add(warning)
    first.write()
    second = Report(tmp_path / "preflight.json", tell, is_live=False)
    second.load()
    await second.add(warning)
    assert second.is_known
    assert second.answer() == first.answer()
    assert told == ["little; more"]


async def test_an_error_ends_a_job_and_is_a_line_of_a_live_report(tmp_path: Path) -> None:
    async def tell(kind: str, message: str, **data: Any) -> None:
        raise AssertionError(message)

    def fails() -> None:
        raise PreflightError("this and that differ")

    job = Report(tmp_path / "job.json", tell, is_live=False)
    with pytest.raises(PreflightError, match="this and that differ"):
        await job.look("models", "are equal", fails)
    live = Report(tmp_path / "live.json", tell, is_live=True)
    assert await live.look("models", "are equal", fails) is None
    live.refuse()
    for report in (job, live):
        assert [(check.name, check.verdict) for check in report.checks] == [("models", "error")]
