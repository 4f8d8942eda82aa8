"""The teacher's engine against a naive full forward, and laws of its four kinds of signal."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from stillhouse.core.blobs import sha256_bytes
from stillhouse.core.errors import ConflictError
from stillhouse.core.models import inspect_model
from stillhouse.teacher.batching import plan_batches
from stillhouse.teacher.engines.base import Scored, ScoreItem, Unscored
from stillhouse.teacher.engines.transformers import TransformersEngine
from stillhouse.v1 import rollout_pb2 as pb
from tests.tiny import TOKENIZER_SIZE, make_tiny_model

MAX_LENGTH = 64


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("models") / "teacher"
    return make_tiny_model(where, seed=2, tie=request.param, vocab_pad=12, max_position_embeddings=MAX_LENGTH)


@pytest.fixture(scope="module")
def engine(folder: Path) -> TransformersEngine:
    return TransformersEngine(inspect_model("teacher", folder), "float32", threads=1)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def items(kind: pb.ScoreKind, **options: Any) -> list[ScoreItem]:
    """Ragged sequences."""
    rng = np.random.default_rng(1)
    return [
        ScoreItem(
            key=str(number),
            prompt_ids=rng.integers(4, TOKENIZER_SIZE, 2 + 3 * number).tolist(),
            completion_ids=rng.integers(4, TOKENIZER_SIZE, 1 + 4 * number).tolist(),
            kind=kind,
            **options,
        )
        for number in range(4)
    ]


@torch.no_grad()
def naive_logits(model: Any, item: ScoreItem) -> torch.Tensor:
    """[T, V] logits of the rows that predict the completion: the whole model on one sequence."""
    logits = model(input_ids=torch.tensor([[*item.prompt_ids, *item.completion_ids]])).logits[0]
    return logits[len(item.prompt_ids) - 1 : -1, :TOKENIZER_SIZE]


def naive_logprobs(model: Any, item: ScoreItem) -> torch.Tensor:
    return torch.log_softmax(naive_logits(model, item).double() / item.temperature, -1)


def scored(engine: TransformersEngine, wanted: list[ScoreItem]) -> list[Scored]:
    results = engine.score(wanted)
    assert [result.key for result in results] == [item.key for item in wanted]
    for result in results:
        assert isinstance(result, Scored), result
    return [result for result in results if isinstance(result, Scored)]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(
    "kind", [pb.SCORE_KIND_SAMPLED, pb.SCORE_KIND_TOPK, pb.SCORE_KIND_TARGETS, pb.SCORE_KIND_HIDDEN]
)
def test_every_kind_gives_the_logprobs_of_a_full_forward(
    engine: TransformersEngine, model: Any, kind: pb.ScoreKind, temperature: float
) -> None:
    wanted = items(kind, temperature=temperature, top_k=3)
    if kind == pb.SCORE_KIND_TARGETS:
        wanted = [_with_targets(item) for item in wanted]
    for item, result in zip(wanted, scored(engine, wanted), strict=True):
        expected = naive_logprobs(model, item)[range(len(item.completion_ids)), item.completion_ids]
        assert result.teacher_logprobs.dtype == np.float32
        np.testing.assert_allclose(result.teacher_logprobs, expected, atol=2e-5)


def _with_targets(item: ScoreItem) -> ScoreItem:
    ids = np.random.default_rng(9).integers(0, TOKENIZER_SIZE, (len(item.completion_ids), 5), dtype=np.int32)
    return replace(item, target_ids=ids)


def test_hidden_states_times_the_head_are_the_logits(engine: TransformersEngine, model: Any) -> None:
    head = engine.head()
    raw = b"".join(head.parts)
    assert (sha256_bytes(raw), len(raw)) == (head.sha256, head.size_bytes)
    assert head.vocab_size == TOKENIZER_SIZE < head.shape[0]
    weight = np.frombuffer(raw, np.float32).reshape(head.shape)[: head.vocab_size]
    wanted = items(pb.SCORE_KIND_HIDDEN, half=False)
    for item, result in zip(wanted, scored(engine, wanted), strict=True):
        assert result.hidden is not None
        np.testing.assert_allclose(result.hidden @ weight.T, naive_logits(model, item), atol=1e-4)


def test_half_precision_hidden_states_cost_little(engine: TransformersEngine, model: Any) -> None:
    weight = engine._weight_VD.numpy()
    wanted = items(pb.SCORE_KIND_HIDDEN)
    for item, result in zip(wanted, scored(engine, wanted), strict=True):
        assert result.hidden is not None
        assert result.hidden.dtype == np.float16
        logits = torch.from_numpy(result.hidden.astype(np.float64) @ weight.T)
        full = naive_logprobs(model, item)
        kl = (full.exp() * (full - torch.log_softmax(logits, -1))).sum(-1)
        assert float(kl.max()) < 1e-5


def test_top_k_and_tail_are_a_distribution(engine: TransformersEngine, model: Any) -> None:
    wanted = items(pb.SCORE_KIND_TOPK, top_k=7, half=False)
    for item, result in zip(wanted, scored(engine, wanted), strict=True):
        values, ids = naive_logprobs(model, item).topk(7)
        assert result.topk_ids is not None
        assert result.topk_logprobs is not None
        assert result.tail_logprobs is not None
        np.testing.assert_array_equal(result.topk_ids, ids)
        np.testing.assert_allclose(result.topk_logprobs, values, atol=2e-5)
        mass = np.exp(result.topk_logprobs).sum(-1) + np.exp(result.tail_logprobs)
        np.testing.assert_allclose(mass, 1.0, atol=1e-5)


@pytest.mark.parametrize("kind", [pb.SCORE_KIND_TARGETS, pb.SCORE_KIND_TOPK])
def test_targets_are_read_off_the_distribution(engine: TransformersEngine, model: Any, kind: pb.ScoreKind) -> None:
    wanted = [_with_targets(item) for item in items(kind, top_k=3, temperature=0.6)]
    for item, result in zip(wanted, scored(engine, wanted), strict=True):
        assert item.target_ids is not None
        assert result.target_logprobs is not None
        expected = naive_logprobs(model, item).gather(1, torch.from_numpy(item.target_ids).long())
        np.testing.assert_allclose(result.target_logprobs, expected, atol=2e-5)
        assert (result.topk_ids is None) == (kind == pb.SCORE_KIND_TARGETS)


def test_scores_do_not_depend_on_the_batch_nor_on_pieces(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = items(pb.SCORE_KIND_TOPK, top_k=3, half=False)
    together = scored(engine, wanted)
    monkeypatch.setattr("stillhouse.teacher.engines.transformers.LOGITS_BYTES", 2 * 4 * TOKENIZER_SIZE)
    for item, result in zip(wanted, together, strict=True):
        alone = scored(engine, [item])[0]
        np.testing.assert_allclose(alone.teacher_logprobs, result.teacher_logprobs, atol=2e-5)
        np.testing.assert_array_equal(alone.topk_ids, result.topk_ids)
        assert alone.tail_logprobs is not None
        assert result.tail_logprobs is not None
        np.testing.assert_allclose(alone.tail_logprobs, result.tail_logprobs, atol=2e-5)


def test_soft_cap_and_scale_are_honoured(
    engine: TransformersEngine, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_soft_cap", 3.0)
    monkeypatch.setattr(engine, "_scale", 0.5)
    item = items(pb.SCORE_KIND_SAMPLED)[2]
    capped = 3.0 * torch.tanh(0.5 * naive_logits(model, item) / 3.0)
    expected = torch.log_softmax(capped, -1)[range(len(item.completion_ids)), item.completion_ids]
    np.testing.assert_allclose(scored(engine, [item])[0].teacher_logprobs, expected, atol=2e-5)


def test_a_head_that_cannot_be_described_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stillhouse.teacher.engines.transformers._logit_scale", lambda config: 1.01)
    with pytest.raises(ConflictError, match="not supported"):
        TransformersEngine(inspect_model("teacher", folder), "float32", threads=1)


def test_bad_items_fail_alone(engine: TransformersEngine) -> None:
    good = items(pb.SCORE_KIND_SAMPLED)
    bad = [
        ScoreItem("long", [5] * MAX_LENGTH, [5], pb.SCORE_KIND_SAMPLED),
        ScoreItem("ids", [5], [TOKENIZER_SIZE], pb.SCORE_KIND_SAMPLED),
        ScoreItem("negative", [-1], [5], pb.SCORE_KIND_SAMPLED),
        ScoreItem("empty", [5], [], pb.SCORE_KIND_SAMPLED),
        ScoreItem("k", [5], [5], pb.SCORE_KIND_TOPK, top_k=TOKENIZER_SIZE + 1),
        ScoreItem("targets", [5], [5], pb.SCORE_KIND_TARGETS),
        ScoreItem("shape", [5], [5], pb.SCORE_KIND_TOPK, top_k=3, target_ids=np.zeros((2, 3), np.int32)),
        ScoreItem("named", [5], [5], pb.SCORE_KIND_TOPK, top_k=3, target_ids=np.full((1, 3), TOKENIZER_SIZE)),
    ]
    results = engine.score([*bad, *good])
    assert [result.reason for result in results[:8] if isinstance(result, Unscored)] == [
        "too_long",
        "bad_ids",
        "bad_ids",
        "empty",
        "bad_request",
        "bad_request",
        "bad_request",
        "bad_ids",
    ]
    for alone, result in zip(scored(engine, good), results[8:], strict=True):
        assert isinstance(result, Scored)
        np.testing.assert_allclose(result.teacher_logprobs, alone.teacher_logprobs, atol=2e-5)


def _scaled_norm(tmp_path: Path, factor: float) -> TransformersEngine:
    built = TransformersEngine(inspect_model("t", make_tiny_model(tmp_path / "t", seed=3)), "float32", threads=1)
    with torch.no_grad():
        built._model.model.norm.weight.mul_(factor)
    return built


def test_float16_overflow_is_an_error_and_float32_is_not(tmp_path: Path) -> None:
    built = _scaled_norm(tmp_path, 1e6)
    item = items(pb.SCORE_KIND_HIDDEN)[1]
    result = built.score([item])[0]
    assert isinstance(result, Unscored)
    assert result.reason == "fp16_overflow"
    wide = ScoreItem(item.key, item.prompt_ids, item.completion_ids, item.kind, half=False)
    assert isinstance(built.score([wide])[0], Scored)


def test_a_broken_teacher_says_so(tmp_path: Path) -> None:
    built = _scaled_norm(tmp_path, float("nan"))
    for kind in (pb.SCORE_KIND_SAMPLED, pb.SCORE_KIND_HIDDEN):
        result = built.score([items(kind)[1]])[0]
        assert isinstance(result, Unscored)
        assert result.reason == "non_finite"


def test_bfloat16_stays_close_to_float32(folder: Path, model: Any) -> None:
    built = TransformersEngine(inspect_model("teacher", folder), "bfloat16", threads=1)
    head = built.head()
    assert head.dtype == "bfloat16"
    assert head.size_bytes == 2 * head.shape[0] * head.shape[1]
    wanted = items(pb.SCORE_KIND_HIDDEN)
    for item, result in zip(wanted, scored(built, wanted), strict=True):
        expected = naive_logprobs(model, item)[range(len(item.completion_ids)), item.completion_ids]
        np.testing.assert_allclose(result.teacher_logprobs, expected, atol=0.3)


@pytest.mark.parametrize("budget", [0, 1, 20, 64, 1000])
def test_batches_hold_everything_once_and_keep_to_the_budget(budget: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 30, 50).tolist()
    batches = plan_batches(lengths, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(50))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= budget
    assert len(batches) == 50 or budget > 1
