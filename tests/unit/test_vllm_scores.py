"""What the vLLM teacher makes of vLLM's answers, against the transformers engine; in place of vLLM a stand-in.

It computes real logits and checks its input as vLLM 0.32 does (sampling_params.py, v1/engine/input_processor.py); model
runner V2 needs a GPU, so its scores of named tokens are tried here only. The real vLLM: test_vllm_teacher.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from stillhouse.core.errors import EngineDeadError
from stillhouse.core.models import inspect_model
from stillhouse.teacher.engines.base import Scored, ScoreItem, Unscored
from stillhouse.teacher.engines.transformers import TransformersEngine
from stillhouse.teacher.engines.vllm_scores import MIN_TAIL, V2_RUNNER, Running, VllmEngine, tail, vllm_abilities
from stillhouse.v1 import rollout_pb2 as pb
from tests.tiny import TOKENIZER_SIZE, make_tiny_model

MAX_LENGTH = 64
PARAMS = {"max_tokens", "temperature", "flat_logprobs", "detokenize", "ignore_eos", "prompt_logprobs"}
V2_PARAMS = PARAMS | {"prompt_logprob_token_ids", "prompt_logprob_start"}


class StandIn:
    """`LLMEngine` over a model of transformers: answers come one by one, the last request first."""

    def __init__(self, folder: Path, *, is_v2: bool) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._is_v2 = is_v2
        self.waiting: list[tuple[str, list[int], Any]] = []
        self.names: set[str] = set()
        self.forbidden: list[int] = []
        self.dies: Exception | None = None

    def add_request(self, name: str, prompt: dict[str, list[int]], params: Any) -> None:
        ids = prompt["prompt_token_ids"]
        assert name not in self.names, "vLLM knows requests by their names"
        rows = getattr(params, "prompt_logprob_token_ids", None)
        if len(ids) + params.max_tokens > MAX_LENGTH:
            raise ValueError(f"prompt of {len(ids)} tokens and {params.max_tokens} to write")
        if rows is not None:
            if not self._is_v2:
                raise ValueError("prompt_logprob_token_ids requires the V2 model runner")
            assert rows.ndim == 2
            assert rows.dtype.kind == "i"
            expected = max(len(ids) - 1 - params.prompt_logprob_start, 0)
            if len(rows) != expected:
                raise ValueError(f"prompt_logprob_token_ids has {len(rows)} rows, the prompt {expected} scored rows")
        self.names.add(name)
        self.waiting.append((name, ids, params))

    def abort_request(self, names: list[str]) -> None:
        self.waiting = [request for request in self.waiting if request[0] not in names]

    @torch.no_grad()
    def step(self) -> list[Any]:
        if self.dies is not None:
            raise self.dies
        name, ids, params = self.waiting.pop()
        logits = self._model(input_ids=torch.tensor([ids])).logits[0, :-1]
        logits[:, self.forbidden] = -torch.inf
        logprobs = logits.log_softmax(-1)  # row i is about the token at i + 1
        flat, scores = SimpleNamespace(token_ids=[], logprobs=[]), None
        if (wanted := getattr(params, "prompt_logprobs", None)) is not None:
            own = torch.tensor(ids[1:])[:, None]
            chosen = torch.cat([own, logprobs.topk(wanted).indices], 1)
            flat = SimpleNamespace(
                token_ids=chosen.flatten().tolist(), logprobs=logprobs.gather(1, chosen).flatten().tolist()
            )
        if (rows := getattr(params, "prompt_logprob_token_ids", None)) is not None:
            scores = logprobs[params.prompt_logprob_start :].gather(1, torch.from_numpy(rows)).numpy()
        return [SimpleNamespace(request_id=name, finished=True, prompt_logprobs=flat, prompt_token_id_logprobs=scores)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("models") / "teacher"
    return make_tiny_model(where, seed=2, max_position_embeddings=MAX_LENGTH)


@pytest.fixture(scope="module")
def oracle(folder: Path) -> TransformersEngine:
    return TransformersEngine(inspect_model("teacher", folder), "float32", threads=1)


def make_params(is_v2: bool) -> Callable[..., Any]:
    def make(**options: Any) -> Any:
        unknown = options.keys() - (V2_PARAMS if is_v2 else PARAMS)
        assert not unknown, f"SamplingParams has no {unknown}"
        return SimpleNamespace(**options)

    return make


def vllm_engine(folder: Path, *, is_v2: bool = True, vocab_size: int = TOKENIZER_SIZE) -> tuple[VllmEngine, StandIn]:
    llm = StandIn(folder, is_v2=is_v2)
    running = Running(
        llm=llm,
        make_params=make_params(is_v2),
        max_model_len=MAX_LENGTH,
        has_targets=is_v2,
        dead_errors=(KeyError,),
        obituary=lambda: "was killed by signal 9",
        stop=lambda: None,
    )
    return VllmEngine(running, vocab_size=vocab_size, size_bytes=0), llm


def item(kind: pb.ScoreKind, *, prompt: int = 5, completion: int = 7, targets: int = 0, **options: Any) -> ScoreItem:
    rng = np.random.default_rng(prompt * 100 + completion)
    return ScoreItem(
        key=f"{prompt}+{completion}",
        prompt_ids=rng.integers(4, TOKENIZER_SIZE, prompt).tolist(),
        completion_ids=rng.integers(4, TOKENIZER_SIZE, completion).tolist(),
        kind=kind,
        half=False,
        target_ids=rng.integers(0, TOKENIZER_SIZE, (completion, targets)).astype(np.int32) if targets else None,
        **options,
    )


SHAPES: tuple[dict[str, Any], ...] = ({}, {"prompt": 1}, {"completion": 1}, {"prompt": 3, "completion": 60})
KINDS: dict[str, dict[str, Any]] = {
    "sampled": {"kind": pb.SCORE_KIND_SAMPLED},
    "top_k": {"kind": pb.SCORE_KIND_TOPK, "top_k": 16},
    "all of them": {"kind": pb.SCORE_KIND_TOPK, "top_k": TOKENIZER_SIZE},
    "targets": {"kind": pb.SCORE_KIND_TARGETS, "targets": 5},
    "union": {"kind": pb.SCORE_KIND_TOPK, "top_k": 16, "targets": 5},
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_says_what_the_transformers_engine_says(folder: Path, oracle: TransformersEngine, kind: str) -> None:
    engine, llm = vllm_engine(folder)
    wanted = [item(**KINDS[kind], **shape) for shape in SHAPES]
    for expected, found in zip(oracle.score(wanted), engine.score(wanted), strict=True):
        assert isinstance(expected, Scored)
        assert isinstance(found, Scored), found
        assert found.key == expected.key
        for name in ("teacher_logprobs", "topk_logprobs", "tail_logprobs", "target_logprobs"):
            one, other = getattr(found, name), getattr(expected, name)
            assert (one is None) == (other is None), name
            if one is not None:
                assert one.shape == other.shape
                np.testing.assert_allclose(one, other, atol=2e-4, err_msg=name)
        if expected.topk_ids is not None:
            np.testing.assert_array_equal(found.topk_ids, expected.topk_ids)
    assert not llm.waiting


def test_tokens_that_the_teacher_forbids_stay_forbidden(folder: Path) -> None:
    engine, llm = vllm_engine(folder)
    wanted = item(pb.SCORE_KIND_TOPK, top_k=TOKENIZER_SIZE)
    llm.forbidden = [wanted.completion_ids[2], 7]
    (found,) = engine.score([wanted])
    assert isinstance(found, Scored)
    assert found.topk_logprobs is not None
    assert found.teacher_logprobs[2] == -np.inf
    np.testing.assert_array_equal(np.isneginf(found.topk_logprobs).sum(1), len(llm.forbidden))
    np.testing.assert_allclose(np.exp(found.topk_logprobs).sum(1), 1, atol=1e-5)


def test_what_it_cannot_do_is_said_and_the_rest_is_scored(folder: Path) -> None:
    engine, _ = vllm_engine(folder, is_v2=False)
    wanted = [
        item(pb.SCORE_KIND_HIDDEN),
        item(pb.SCORE_KIND_TARGETS, targets=2),
        item(pb.SCORE_KIND_TOPK, top_k=4, targets=2),
        item(pb.SCORE_KIND_SAMPLED, temperature=0.7),
        item(pb.SCORE_KIND_SAMPLED, prompt=4, completion=60),
        item(pb.SCORE_KIND_SAMPLED),
    ]
    *refused, scored = engine.score(wanted)
    reasons = [(result.reason, result.message) for result in refused if isinstance(result, Unscored)]
    assert [reason for reason, _ in reasons] == ["unsupported"] * 4 + ["too_long"]
    for (_, message), word in zip(reasons, ("hidden", V2_RUNNER, V2_RUNNER, "temperature", "63"), strict=True):
        assert word in message
    assert isinstance(scored, Scored)


def test_what_vllm_refuses_is_the_fault_of_one_item(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, llm = vllm_engine(folder)
    add = llm.add_request

    def picky(name: str, prompt: dict[str, list[int]], params: Any) -> None:
        if len(prompt["prompt_token_ids"]) == 9:
            raise ValueError("nine is too many")
        add(name, prompt, params)

    monkeypatch.setattr(llm, "add_request", picky)
    one, two = engine.score([item(pb.SCORE_KIND_SAMPLED, completion=4), item(pb.SCORE_KIND_SAMPLED)])
    assert isinstance(one, Unscored)
    assert one.reason == "bad_request"
    assert "nine is too many" in one.message
    assert isinstance(two, Scored)


def test_padding_of_the_head_among_the_likeliest_is_no_answer(folder: Path) -> None:
    engine, _ = vllm_engine(folder, vocab_size=TOKENIZER_SIZE - 1)
    wanted = item(pb.SCORE_KIND_TOPK, top_k=TOKENIZER_SIZE - 1)
    wanted.completion_ids[:] = [4] * len(wanted.completion_ids)
    wanted.prompt_ids[:] = [5] * len(wanted.prompt_ids)
    (found,) = engine.score([wanted])
    assert isinstance(found, Unscored)
    assert "padding" in found.message


@pytest.mark.parametrize(("error", "expected"), [(KeyError("gone"), EngineDeadError), (OSError("no"), OSError)])
def test_a_dead_engine_ends_the_teacher_and_other_errors_leave_nothing_behind(
    folder: Path, error: Exception, expected: type[Exception]
) -> None:
    engine, llm = vllm_engine(folder)
    llm.dies = error
    with pytest.raises(expected, match="killed by signal 9" if expected is EngineDeadError else "no"):
        engine.score([item(pb.SCORE_KIND_SAMPLED)])
    if expected is not EngineDeadError:
        llm.dies = None
        assert isinstance(engine.score([item(pb.SCORE_KIND_SAMPLED)])[0], Scored)
        assert not llm.waiting


def test_the_tail_is_right_to_a_millionth_of_mass() -> None:
    rng = np.random.default_rng(0)
    # heads from nearly nothing to nearly everything
    logits = rng.normal(size=(400, 64)) * np.geomspace(0.1, 60, 400)[:, None]
    logprobs = (
        logits
        - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        - logits.max(1, keepdims=True)
    )
    order = np.sort(logprobs, 1)[:, ::-1]
    true_mass = np.exp(order[:, 8:]).sum(1)
    found = np.exp(tail(order[:, :8].astype(np.float32), is_all=False).astype(np.float64))
    assert found.min() >= MIN_TAIL * 0.999
    np.testing.assert_allclose(found, np.maximum(true_mass, MIN_TAIL), atol=1e-6)
    assert true_mass.min() < MIN_TAIL / 100 < true_mass.max(), "both cases were there"


@pytest.mark.parametrize("is_v2", [False, True])
def test_a_task_is_refused_before_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch, is_v2: bool) -> None:
    monkeypatch.setenv(V2_RUNNER, str(int(is_v2)))
    abilities = vllm_abilities()

    def refusal(**ask: Any) -> str:
        return abilities.refusal(pb.TeacherTask(asks=[pb.ScoreSpec(**ask)]))

    assert refusal(kind=pb.SCORE_KIND_SAMPLED, temperature=1.0) == ""
    assert refusal(kind=pb.SCORE_KIND_SPANS) == ""
    assert "sampling.temperature" in refusal(kind=pb.SCORE_KIND_TOPK, temperature=0.5)
    assert "full_vocabulary" in refusal(kind=pb.SCORE_KIND_HIDDEN, temperature=1.0)
    assert ("support" in refusal(kind=pb.SCORE_KIND_TARGETS, temperature=1.0)) == (not is_v2)
    assert "ema_of_student" in abilities.refusal(pb.TeacherTask(follows_student=True))
    assert (pb.SCORE_KIND_TARGETS in abilities.kinds) == is_v2
    same = replace(abilities, threads=2).refusal(pb.TeacherTask(threads=2))
    assert "transformers with 2 threads" in same, "the same number of threads does not make it the same engine"
