"""The sampler's engine against slow, obvious oracles: no cache, no batch, no padding."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from stillhouse.core.errors import WeightsError
from stillhouse.core.models import inspect_model
from stillhouse.core.tensors import DTYPE_NAMES
from stillhouse.core.worker import ComputeThread
from stillhouse.sampler.engines import transformers as engine_module
from stillhouse.sampler.engines.base import SampleRequest
from stillhouse.sampler.engines.draw import draw, entropies, log_probs, uniforms
from stillhouse.sampler.engines.transformers import TransformersEngine
from stillhouse.sampler.generation import Completion, Generator
from tests.tiny import EOS_ID, TOKENIZER_SIZE, make_tiny_model

MAX_LENGTH = 64
FLOAT32 = DTYPE_NAMES["float32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(
        tmp_path_factory.mktemp("models") / "student", seed=1, max_position_embeddings=MAX_LENGTH, vocab_pad=12
    )


@pytest.fixture(scope="module")
def engine(folder: Path) -> TransformersEngine:
    return TransformersEngine(inspect_model("student", folder), "float32", ComputeThread("test"), threads=1)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def requests(count: int = 6, **options: Any) -> list[SampleRequest]:
    """Prompts of ragged lengths, with different ends."""
    rng = np.random.default_rng(0)
    return [
        SampleRequest(
            key=str(number),
            prompt_ids=rng.integers(4, TOKENIZER_SIZE, 3 + 5 * (number % 4)).tolist(),
            max_tokens=4 + 3 * number,
            seed=100 + number,
            **{"temperature": 1.0, "stop_token_ids": tuple(range(200, 215)), **options},
        )
        for number in range(count)
    ]


def run(engine: TransformersEngine, wanted: list[SampleRequest]) -> dict[str, Completion]:
    async def written() -> list[Completion]:
        return [c async for c in Generator().generate(engine, [Completion(request) for request in wanted])]

    ended = asyncio.run(written())
    assert sorted(completion.key for completion in ended) == sorted(request.key for request in wanted)
    return {completion.key: completion for completion in ended}


@torch.no_grad()
def oracle(model: Any, request: SampleRequest) -> Completion:
    """One token at a time, the whole sequence again for each, in float64 and with plain loops."""
    ids, logprobs = list(request.prompt_ids), []
    draws = np.random.Generator(np.random.Philox(key=request.seed))
    room = min(request.max_tokens, MAX_LENGTH - len(ids))
    for _ in range(room):
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1, :TOKENIZER_SIZE].double().numpy()
        scaled = logits / (request.temperature or 1.0)
        probs = np.exp(scaled - scaled.max())
        probs /= probs.sum()
        u = draws.random()
        token = int(probs.argmax()) if request.temperature == 0 else None
        if token is None:
            mass = 0.0
            for token in range(TOKENIZER_SIZE):
                mass += probs[token]
                if mass > u:
                    break
        assert token is not None
        ids.append(token)
        logprobs.append(float(np.log(probs[token])))
        if token == EOS_ID or token in request.stop_token_ids:
            return Completion(request, ids[len(request.prompt_ids) :], logprobs, finish_reason="stop")
    return Completion(request, ids[len(request.prompt_ids) :], logprobs, finish_reason="length")


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0, 2.0])
def test_batched_decoding_equals_one_by_one_without_cache(
    engine: TransformersEngine, model: Any, temperature: float
) -> None:
    wanted = requests(temperature=temperature)
    got = run(engine, wanted)
    reasons = set()
    for request in wanted:
        expected = oracle(model, request)
        actual = got[request.key]
        assert actual.completion_ids == expected.completion_ids
        assert actual.finish_reason == expected.finish_reason
        np.testing.assert_allclose(actual.rollout_logprobs, expected.rollout_logprobs, atol=1e-4)
        reasons.add(actual.finish_reason)
    assert temperature == 0 or reasons == {"stop", "length"}, "the case must cover both ends"


def test_logprobs_are_those_of_one_full_forward(engine: TransformersEngine, model: Any) -> None:
    wanted = requests(temperature=0.8, top_k=20, top_p=0.9)
    got = run(engine, wanted)
    for request in wanted:
        completion = got[request.key]
        ids = torch.tensor([[*request.prompt_ids, *completion.completion_ids]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(request.prompt_ids) - 1 : -1, :TOKENIZER_SIZE]
        full = torch.log_softmax(logits / 0.8, -1).gather(1, ids[0, len(request.prompt_ids) :, None])[:, 0]
        np.testing.assert_allclose(completion.rollout_logprobs, full.numpy(), atol=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_recorded_tokens_and_entropies_are_those_of_one_full_forward(
    engine: TransformersEngine, model: Any, temperature: float
) -> None:
    """Whatever truncates the draw; rows that only pad the head are no tokens."""
    options: dict[str, Any] = {"temperature": temperature, "top_k": 5, "top_p": 0.9, "record_entropies": True}
    wanted = [replace(request, record_top_k=3 + n) for n, request in enumerate(requests(4, **options))]
    got = run(engine, wanted)
    for request in wanted:
        completion = got[request.key]
        assert completion.target_ids is not None
        assert completion.entropies is not None
        assert completion.target_ids.dtype == np.int32
        ids = torch.tensor([[*request.prompt_ids, *completion.completion_ids]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(request.prompt_ids) - 1 : -1, :TOKENIZER_SIZE].double()
        probs = torch.softmax(logits / (temperature or 1.0), -1)
        expected = probs.topk(request.record_top_k).indices.numpy()
        np.testing.assert_array_equal(completion.target_ids, expected)
        np.testing.assert_allclose(completion.entropies, -(probs * probs.log()).sum(-1).numpy(), atol=1e-4)


def test_what_is_recorded_changes_no_draw_and_nothing_is_recorded_unasked(engine: TransformersEngine) -> None:
    plain = requests(3)
    asked = [replace(plain[0], record_top_k=4), replace(plain[1], record_entropies=True), plain[2]]
    expected, got = run(engine, plain), run(engine, asked)
    for request in plain:
        assert got[request.key].completion_ids == expected[request.key].completion_ids
    assert got["0"].target_ids is not None
    assert got["0"].target_ids.shape == (len(got["0"].completion_ids), 4)
    assert [got[key].target_ids is None for key in "012"] == [False, True, True]
    assert [got[key].entropies is None for key in "012"] == [True, False, True]


def test_more_likeliest_tokens_than_there_are_is_refused(engine: TransformersEngine) -> None:
    request = replace(requests(1)[0], record_top_k=TOKENIZER_SIZE + 1)
    completion = run(engine, [request])[request.key]
    assert (completion.finish_reason, completion.reason) == ("failed", "bad_request")
    assert str(TOKENIZER_SIZE) in completion.message
    everything = run(engine, [replace(request, record_top_k=TOKENIZER_SIZE)])[request.key].target_ids
    assert everything is not None
    assert sorted(everything[0].tolist()) == list(range(TOKENIZER_SIZE))


def test_entropy_counts_impossible_tokens_as_nothing() -> None:
    logits = torch.tensor([[0.0, 0.0, -torch.inf], [0.0, -torch.inf, -torch.inf]])
    request = SampleRequest("x", [1], 1, 0)
    found = entropies(log_probs(logits, [request, request]))
    torch.testing.assert_close(found, torch.tensor([np.log(2), 0.0], dtype=torch.float64))


def test_a_seed_gives_the_same_completion_in_any_batch(engine: TransformersEngine) -> None:
    wanted = requests(8)
    together = run(engine, wanted)
    reversed_ = run(engine, wanted[::-1])
    for request in wanted:
        alone = run(engine, [request])[request.key]
        assert alone.completion_ids == together[request.key].completion_ids == reversed_[request.key].completion_ids


def test_samples_of_one_prompt_share_its_prefill_and_nothing_else(engine: TransformersEngine) -> None:
    base = requests(1)[0]
    group = [SampleRequest(str(seed), base.prompt_ids, max_tokens=12, seed=seed, temperature=1.0) for seed in range(5)]
    got = run(engine, group)
    assert len({tuple(completion.completion_ids) for completion in got.values()}) == 5
    for request in group:
        assert run(engine, [request])[request.key].completion_ids == got[request.key].completion_ids


def test_a_bad_request_fails_alone(engine: TransformersEngine) -> None:
    good = requests(2)
    bad = [
        SampleRequest("long", [5] * MAX_LENGTH, max_tokens=4, seed=0),
        SampleRequest("ids", [5, TOKENIZER_SIZE], max_tokens=4, seed=0),
        SampleRequest("empty", [], max_tokens=4, seed=0),
    ]
    got = run(engine, [*bad, *good])
    assert {key: got[key].reason for key in ("long", "ids", "empty")} == {
        "long": "too_long",
        "ids": "bad_ids",
        "empty": "empty",
    }
    for request in good:
        assert got[request.key].completion_ids == run(engine, [request])[request.key].completion_ids


def test_a_completion_ends_where_the_model_does(engine: TransformersEngine) -> None:
    request = SampleRequest("x", [7] * (MAX_LENGTH - 3), max_tokens=50, seed=1, temperature=0.0)
    completion = run(engine, [request])["x"]
    assert completion.finish_reason == "stop" or len(completion.completion_ids) == 3


async def test_abort_ends_one_sample_and_leaves_the_others(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "SLICE_S", 0.0)
    wanted = requests(4, stop_token_ids=())
    reference = await asyncio.to_thread(run, engine, wanted)
    got: dict[str, list[int]] = {request.key: [] for request in wanted}
    ends: dict[str, str] = {}
    async for piece in engine.generate(wanted):
        if not got["3"]:
            assert engine.abort(["3", "nobody"]) == 1
        got[piece.key] += piece.ids
        ends |= {piece.key: piece.finish_reason} if piece.finish_reason else {}
    assert ends["3"] == "abort"
    assert len(got["3"]) < len(reference["3"].completion_ids)
    for key in "012":
        assert got[key] == reference[key].completion_ids
    assert engine.abort(["3"]) == 0, "nothing runs any more"


def test_each_sample_is_handed_out_when_it_ends(engine: TransformersEngine) -> None:
    short = SampleRequest("short", [9, 9], max_tokens=1, seed=0)
    long = SampleRequest("long", [9, 9, 9], max_tokens=30, seed=0, temperature=0.0)
    assert list(run(engine, [long, short])) == ["short", "long"]


def test_a_completion_that_another_wrote_in_part_goes_on_as_if_it_were_one(engine: TransformersEngine) -> None:
    wanted = requests(4)
    whole = run(engine, wanted)
    cut = {key: len(completion.completion_ids) // 2 for key, completion in whole.items()}
    again = [replace(r, written=tuple(whole[r.key].completion_ids[: cut[r.key]])) for r in wanted]
    for key, completion in run(engine, again).items():
        assert completion.completion_ids == whole[key].completion_ids[cut[key] :], "only what is new"
        np.testing.assert_allclose(completion.rollout_logprobs, whole[key].rollout_logprobs[cut[key] :], atol=1e-5)
        assert completion.finish_reason == whole[key].finish_reason


def test_a_poisonous_sample_fails_alone_and_the_others_go_on_from_where_they_were(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "SLICE_S", 0.0)
    wanted = requests(4, stop_token_ids=())
    whole, sample = run(engine, wanted), engine._sample

    def fragile(rows: Any, logits: Any) -> Any:
        if any(row.request.key == "1" and row.num_tokens == 3 for row in rows):
            raise RuntimeError("boom")
        return sample(rows, logits)

    monkeypatch.setattr(engine, "_sample", fragile)
    got = run(engine, wanted)
    assert (got["1"].finish_reason, got["1"].reason) == ("failed", "engine_error")
    for key in "023":
        assert got[key].completion_ids == whole[key].completion_ids


def test_padding_rows_of_the_head_are_never_written() -> None:
    logits = torch.zeros(1, 4)
    request = SampleRequest("x", [1], 1, 0)
    logprobs = log_probs(logits, [request])
    drawn = {int(draw(logprobs, [request], [u])) for u in np.linspace(0, 1 - 1e-12, 9)}
    assert drawn == {0, 1, 2, 3}
    assert int(draw(logprobs, [request], [float(np.nextafter(1.0, 0.0))])) == 3


def test_draws_follow_the_distribution() -> None:
    logits = torch.randn(1, 6, generator=torch.Generator().manual_seed(3))
    request = SampleRequest("x", [1], 1, 0, temperature=0.7)
    count = 20_000
    logprobs = log_probs(logits.expand(count, -1), [request] * count)
    ids = draw(logprobs, [request] * count, uniforms(5, count).tolist())
    frequencies = torch.bincount(ids, minlength=6) / count
    torch.testing.assert_close(frequencies.double(), torch.softmax(logits[0].double() / 0.7, -1), atol=0.012, rtol=0)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.75}, {0, 1}),
        ({"min_p": 0.3}, {0, 1, 2}),
        ({"top_k": 3, "top_p": 0.01}, {0}),
    ],
)
def test_truncation_limits_the_draw(options: dict[str, Any], kept: set[int]) -> None:
    probs = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64)
    request = SampleRequest("x", [1], 1, 0, **options)
    seen = set()
    for u in np.linspace(0, 0.999, 50):
        seen.add(int(draw(probs.log(), [request], [float(u)])))
    assert seen == kept


def test_uniforms_depend_on_seed_and_index_only() -> None:
    assert uniforms(7, 3).tolist() == uniforms(7, 10)[:3].tolist()
    assert uniforms(7, 3).tolist() != uniforms(8, 3).tolist()
    assert uniforms(2**64 - 1, 1)[0] < 1


def fresh(tmp_path: Path, dtype: str = "float32", **options: Any) -> TransformersEngine:
    options = {"max_position_embeddings": MAX_LENGTH, **options}
    entry = inspect_model("s", make_tiny_model(tmp_path / "s", **options))
    return TransformersEngine(entry, dtype, ComputeThread("test"), threads=1)


def load(engine: TransformersEngine, arrays: dict[str, np.ndarray], dtype: int) -> None:
    asyncio.run(engine.load_weights(arrays, dict.fromkeys(arrays, dtype), 1))


def state_arrays(model: Any, skip_tied: bool = True) -> dict[str, np.ndarray]:
    """Named arrays as the trainer sends them: tied tensors once."""
    return {name: tensor.detach().numpy().copy() for name, tensor in model.named_parameters(remove_duplicate=skip_tied)}


@pytest.mark.parametrize("tie", [True, False])
def test_loaded_weights_write_like_the_model_they_come_from(tmp_path: Path, tie: bool) -> None:
    target = fresh(tmp_path, seed=5, tie=tie)
    source_folder = make_tiny_model(tmp_path / "source", seed=6, tie=tie, max_position_embeddings=MAX_LENGTH)
    source = TransformersEngine(inspect_model("x", source_folder), "float32", ComputeThread("test"), threads=1)
    arrays = state_arrays(AutoModelForCausalLM.from_pretrained(source_folder, dtype=torch.float32))
    wanted = requests(3)
    before = run(target, wanted)
    load(target, arrays, FLOAT32)
    after = run(target, wanted)
    assert [after[r.key].completion_ids for r in wanted] == [run(source, [r])[r.key].completion_ids for r in wanted]
    assert any(before[r.key].completion_ids != after[r.key].completion_ids for r in wanted)


def test_bfloat16_weights_travel_as_bits(tmp_path: Path) -> None:
    target = fresh(tmp_path, dtype="bfloat16", seed=5)
    other = AutoModelForCausalLM.from_pretrained(make_tiny_model(tmp_path / "o", seed=6), dtype=torch.bfloat16)
    arrays = {name: p.detach().view(torch.int16).numpy().view(np.uint16) for name, p in other.named_parameters()}
    load(target, arrays, DTYPE_NAMES["bfloat16"])
    for name, parameter in target._model.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name))


@pytest.mark.parametrize("fault", ["missing", "unknown", "shape", "nan"])
def test_wrong_weights_are_refused_and_change_nothing(tmp_path: Path, fault: str) -> None:
    target = fresh(tmp_path, seed=5)
    arrays = state_arrays(AutoModelForCausalLM.from_pretrained(make_tiny_model(tmp_path / "o", seed=6)))
    name = "model.norm.weight"
    if fault == "missing":
        del arrays[name]
    elif fault == "unknown":
        arrays["model.extra"] = arrays[name]
    elif fault == "shape":
        arrays[name] = arrays[name][:-1]
    else:
        arrays[name][0] = np.nan
    wanted = requests(2)
    before = run(target, wanted)
    with pytest.raises(WeightsError):
        load(target, arrays, FLOAT32)
    assert {key: c.completion_ids for key, c in run(target, wanted).items()} == {
        key: c.completion_ids for key, c in before.items()
    }


def test_broken_weights_fail_samples_instead_of_training_on_noise(tmp_path: Path) -> None:
    target = fresh(tmp_path, seed=5)
    with torch.no_grad():
        target._model.model.norm.weight.fill_(float("nan"))
    assert {completion.reason for completion in run(target, requests(3)).values()} == {"non_finite"}
