"""The transformers engine beyond what all engines do (tests/contract): architectures, its cache, its batches."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from transformers import AutoModelForCausalLM

from stillhouse.core.errors import EngineDeadError, SpecError
from stillhouse.core.models import inspect_model
from stillhouse.core.tensors import DTYPE_NAMES
from stillhouse.core.worker import ComputeThread
from stillhouse.sampler.engines.base import SampleRequest
from stillhouse.sampler.engines.cache import BLOCK
from stillhouse.sampler.engines.draw import Distributions
from stillhouse.sampler.engines.transformers import TransformersEngine
from tests.contract.sampler_engines import Text, texts
from tests.tiny import EOS_ID, TOKENIZER_SIZE, make_tiny_model, make_tokenizer

FLOAT32 = DTYPE_NAMES["float32"]


@pytest.fixture
async def open_engine(tmp_path: Path) -> AsyncIterator[Any]:
    """Makes engines from folders; closes them."""
    opened: list[tuple[TransformersEngine, ComputeThread]] = []

    async def open_(folder: Path | None = None, dtype: str = "float32", **options: Any) -> TransformersEngine:
        folder = folder or make_tiny_model(tmp_path / "student", seed=5)
        compute = ComputeThread("test")
        engine = TransformersEngine(inspect_model("s", folder), dtype, compute, **{"threads": 1, **options})
        opened.append((engine, compute))
        return engine

    yield open_
    for engine, compute in opened:
        await engine.close()
        compute.close()


def requests(count: int = 6, **options: Any) -> list[SampleRequest]:
    rng = np.random.default_rng(0)
    return [
        SampleRequest(
            key=str(number),
            prompt_ids=rng.integers(4, TOKENIZER_SIZE, 3 + 5 * (number % 4)).tolist(),
            **{"max_tokens": 4 + 5 * number, "seed": 100 + number, **options},
        )
        for number in range(count)
    ]


@torch.no_grad()
def plain(folder: Path, request: SampleRequest, ids: list[int], dtype: Any = torch.float32) -> torch.Tensor:
    """[T] log-probabilities of the completion by one forward pass of the model as it comes."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    sequence = torch.tensor([[*request.prompt_ids, *ids]])
    logits = model(input_ids=sequence).logits[0, len(request.prompt_ids) - 1 : -1, :TOKENIZER_SIZE].double()
    return torch.log_softmax(logits / (request.temperature or 1.0), -1).gather(1, torch.tensor(ids)[:, None])[:, 0]


@torch.no_grad()
def oracle(model: Any, request: SampleRequest) -> list[int]:
    """The completion, by a whole forward pass for each token, in float64 and with plain loops."""
    ids: list[int] = []
    draws = np.random.Generator(np.random.Philox(key=request.seed))
    while len(ids) < request.max_tokens and EOS_ID not in ids:
        sequence = torch.tensor([[*request.prompt_ids, *ids]])
        logits = model(input_ids=sequence).logits[0, -1, :TOKENIZER_SIZE].double().numpy()
        weights = np.exp((logits - logits.max()) / (request.temperature or 1.0))
        u, token = draws.random() * weights.sum(), int(logits.argmax())
        if request.temperature:
            token = next(token for token in range(TOKENIZER_SIZE) if weights[: token + 1].sum() > u)
        ids.append(token)
    return ids


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0, 2.0])
async def test_batches_write_what_plain_loops_write(tmp_path: Path, open_engine: Any, temperature: float) -> None:
    folder = make_tiny_model(tmp_path / "s", seed=5, vocab_pad=12)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    wanted = requests(6, temperature=temperature)
    got = await texts(await open_engine(folder, max_sequences=4), wanted)
    assert [got[request.key].ids for request in wanted] == [oracle(model, request) for request in wanted]


SMALL: dict[str, Any] = {
    "vocab_size": TOKENIZER_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.4,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
SLIDING: dict[str, Any] = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
ARCHITECTURES: dict[str, Any] = {
    "llama": lambda: hf.LlamaConfig(**SMALL),
    "qwen2": lambda: hf.Qwen2Config(**SMALL),
    "qwen2-sliding": lambda: hf.Qwen2Config(**SMALL, **SLIDING, use_sliding_window=True),
    "qwen3": lambda: hf.Qwen3Config(**SMALL),
    "mistral": lambda: hf.MistralConfig(**SMALL, sliding_window=6),
    "gemma2": lambda: hf.Gemma2Config(**SMALL, **SLIDING, query_pre_attn_scalar=8, attn_logit_softcapping=2.0),
    "gemma3": lambda: hf.Gemma3TextConfig(**SMALL, **SLIDING, query_pre_attn_scalar=8),
    "phi3": lambda: hf.Phi3Config(**SMALL),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**SMALL),
    "stablelm": lambda: hf.StableLmConfig(**SMALL),
}


def make(folder: Path, config: Any) -> Path:
    torch.manual_seed(4)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("architecture", ARCHITECTURES)
async def test_architectures_write_what_they_would_alone(tmp_path: Path, open_engine: Any, architecture: str) -> None:
    """Rows of different lengths in one batch, windows and soft caps included."""
    folder = make(tmp_path / "s", ARCHITECTURES[architecture]())
    if architecture == "gemma2":  # only eager attention knows the soft cap
        config = folder / "config.json"
        config.write_text(config.read_text().replace("{", '{"_attn_implementation": "eager",', 1))
    wanted = requests(5)
    got = await texts(await open_engine(folder, max_sequences=4), wanted)
    for request in wanted:
        text = got[request.key]
        np.testing.assert_allclose(text.logprobs, plain(folder, request, text.ids), atol=1e-3)
    assert max(len(text.ids) for text in got.values()) > 12


@pytest.mark.parametrize(
    "config",
    [
        hf.BloomConfig(vocab_size=TOKENIZER_SIZE, hidden_size=32, n_layer=2, n_head=4),
        hf.Mamba2Config(
            vocab_size=TOKENIZER_SIZE, hidden_size=32, num_hidden_layers=1, num_heads=8, head_dim=8, n_groups=1
        ),
    ],
    ids=["bloom", "mamba2"],
)
async def test_architectures_that_cannot_be_batched_are_refused(tmp_path: Path, config: Any) -> None:
    folder = make(tmp_path / "s", config)
    entry = inspect_model("s", make_tiny_model(tmp_path / "tiny")).model_copy(update={"path": str(folder)})
    with pytest.raises(SpecError, match="use vllm"):
        TransformersEngine(entry, "float32", ComputeThread("test"), threads=1)


async def test_bfloat16_writes_what_a_plain_forward_gives(tmp_path: Path, open_engine: Any) -> None:
    folder = make_tiny_model(tmp_path / "s", seed=5)
    wanted = requests(4)
    got = await texts(await open_engine(folder, "bfloat16"), wanted)
    for request in wanted:
        text = got[request.key]
        gaps = plain(folder, request, text.ids, torch.bfloat16) - torch.tensor(text.logprobs)
        assert gaps.abs().mean() < 0.05


async def test_bfloat16_weights_travel_as_bits(tmp_path: Path, open_engine: Any) -> None:
    target = await open_engine(dtype="bfloat16")
    other = AutoModelForCausalLM.from_pretrained(make_tiny_model(tmp_path / "o", seed=6), dtype=torch.bfloat16)
    arrays = {name: p.detach().view(torch.int16).numpy().view(np.uint16) for name, p in other.named_parameters()}
    await target.load_weights(arrays, dict.fromkeys(arrays, DTYPE_NAMES["bfloat16"]), 1)
    for name, parameter in target._decoder._model.module.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name))


async def test_untied_weights_are_replaced(tmp_path: Path, open_engine: Any) -> None:
    target = await open_engine(make_tiny_model(tmp_path / "t", seed=5, tie=False))
    folder = make_tiny_model(tmp_path / "o", seed=6, tie=False)
    other = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    arrays = {name: p.detach().numpy() for name, p in other.named_parameters()}
    await target.load_weights(arrays, dict.fromkeys(arrays, FLOAT32), 1)
    wanted = requests(3)
    got = await texts(target, wanted)
    for request in wanted:
        ids = got[request.key].ids
        np.testing.assert_allclose(got[request.key].logprobs, plain(folder, request, ids), atol=1e-4)


async def test_broken_weights_fail_samples_and_leave_nothing_in_the_cache(tmp_path: Path, open_engine: Any) -> None:
    folder = make_tiny_model(tmp_path / "s", seed=5)
    engine = await open_engine(folder)
    weights = {name: p.clone() for name, p in engine._decoder._model.module.named_parameters()}
    with torch.no_grad():
        engine._decoder._model.module.model.layers[0].input_layernorm.weight.fill_(float("nan"))
    broken = await texts(engine, requests(5))
    assert {text.failure[0] for text in broken.values()} == {"non_finite"}
    arrays = {name: tensor.numpy() for name, tensor in weights.items()}
    await engine.load_weights(arrays, dict.fromkeys(arrays, FLOAT32), 1)
    wanted = requests(5)
    got = await texts(engine, wanted)
    for request in wanted:
        ids = got[request.key].ids
        np.testing.assert_allclose(got[request.key].logprobs, plain(folder, request, ids), atol=1e-4)


async def test_long_prompts_are_read_in_parts_and_the_cache_grows(
    tmp_path: Path, open_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stillhouse.sampler.engines.decode.PREFILL_TOKENS", 50)
    folder = make_tiny_model(tmp_path / "s", seed=5, max_position_embeddings=1000)
    long = SampleRequest("long", [4 + n % 200 for n in range(3 * BLOCK - 7)], 30, 1)
    short = [SampleRequest(str(n), [9, n], BLOCK + 40, n) for n in range(10, 13)]
    got = await texts(await open_engine(folder), [short[0], long, *short[1:]])
    for request in [long, *short]:
        ids = got[request.key].ids
        np.testing.assert_allclose(got[request.key].logprobs, plain(folder, request, ids), atol=1e-4)
    assert max(len(got[request.key].ids) for request in short) > BLOCK


def gib(tokens: int) -> float:
    """Of cache for so many tokens of the tiny model: two layers, keys and values of 32 float32."""
    return tokens * 2 * 2 * 32 * 4 / 2**30


async def test_completions_that_outgrow_the_cache_wait_and_go_on(
    tmp_path: Path, open_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stillhouse.sampler.engines.decode.BLOCK", 8)
    folder = make_tiny_model(tmp_path / "s", seed=5)
    wanted = [replace(request, max_tokens=60) for request in requests(8)]
    expected = await texts(await open_engine(folder), wanted)
    engine = await open_engine(folder, cache_gib=gib(200))
    back = count_calls(engine._decoder, "_put_back")
    got = await texts(engine, wanted)
    assert {key: text.ids for key, text in got.items()} == {key: text.ids for key, text in expected.items()}
    assert back
    assert engine._decoder._cache._rows * engine._decoder._cache._columns <= 200


async def test_a_short_prompt_that_joins_long_completions_takes_nothing_from_them(
    tmp_path: Path, open_engine: Any
) -> None:
    """Room for five rows, not for eight, the next power of two: the rectangle grows by exactly what is needed."""
    folder = make_tiny_model(tmp_path / "s", seed=5, max_position_embeddings=600)
    long = [SampleRequest(str(n), [4 + (n + i) % 200 for i in range(300)], 60, n) for n in range(4)]
    short = SampleRequest("short", [9, 7], 60, 9)
    engine = await open_engine(folder, max_sequences=8, cache_gib=gib(5 * 500))
    got = await texts(engine, [*long, short])
    assert engine._decoder._cache._rows == 5
    for request in [*long, short]:
        ids = got[request.key].ids
        np.testing.assert_allclose(got[request.key].logprobs, plain(folder, request, ids), atol=1e-4)
    assert max(len(got[request.key].ids) for request in long) > 5


async def test_what_never_fits_the_cache_is_refused(open_engine: Any) -> None:
    engine = await open_engine(cache_gib=gib(100))
    got = await texts(engine, [SampleRequest("a", [5] * 41, 60, 0), SampleRequest("b", [5] * 40, 60, 0)])
    reason, message = got["a"].failure
    assert (reason, got["b"].finish_reason) == ("too_long", "length")
    assert "101 tokens" in message
    assert "hold 100" in message


def count_calls(owner: Any, name: str) -> list[Any]:
    """Grows with every call of a method."""
    original, calls = getattr(owner, name), []

    def counted(*args: Any) -> Any:
        calls.append(args)
        return original(*args)

    setattr(owner, name, counted)
    return calls


@pytest.mark.parametrize("where", ["prompt", "completion"])
async def test_what_makes_the_model_raise_fails_alone(tmp_path: Path, open_engine: Any, where: str) -> None:
    """Its neighbours go on as if it had not been there."""
    wanted = [replace(request, max_tokens=40) for request in requests(6)]
    engine = await open_engine(make_tiny_model(tmp_path / "s", seed=5), max_sequences=4)
    expected = await texts(engine, wanted)
    victim = max(expected, key=lambda key: len(expected[key].ids))
    poison = [*wanted[int(victim)].prompt_ids, *expected[victim].ids[: 9 if where == "completion" else 0]]
    model = engine._decoder._model
    forward = model.forward

    def raises(ids: list[list[int]], positions: list[list[int]], first: int) -> Any:
        at = len(poison) - 1
        for row, columns in zip(ids, positions, strict=True):
            if at in columns and row[columns.index(at)] == poison[-1]:
                raise RuntimeError("poison")
        return forward(ids, positions, first)

    model.forward = raises
    got = await texts(engine, wanted)
    assert got[victim].failure == ("engine_error", "RuntimeError: poison")
    for key in expected.keys() - {victim}:
        assert got[key].ids == expected[key].ids


async def test_what_is_recorded_is_recorded_once_where_memory_was_short(
    open_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = requests(4, record_top_k=3, record_entropies=True)
    engine = await open_engine()
    expected = await texts(engine, wanted)
    entropies, calls = Distributions.entropies, iter(range(1000))

    def short_once(self: Distributions) -> Any:
        if next(calls) == 2:
            raise RuntimeError("out of memory")
        return entropies(self)

    monkeypatch.setattr(Distributions, "entropies", short_once)
    got = await texts(engine, wanted)
    for key, text in got.items():
        assert text.ids == expected[key].ids
        assert len(text.target_ids) == len(text.entropies) == len(text.ids)
        np.testing.assert_array_equal(text.target_ids, expected[key].target_ids)


ALONE = [SampleRequest(f"alone{seed}", [40, 7, 12, 9], 12 + 7 * seed, seed) for seed in range(5)]


async def bits(engine: TransformersEngine) -> list[tuple[list[int], list[str]]]:
    got = await texts(engine, ALONE, alone=True)
    return [(text.ids, [value.hex() for value in text.logprobs]) for text in got.values()]


async def test_alone_gives_the_same_bits_whatever_was_before(tmp_path: Path, open_engine: Any) -> None:
    folder = make_tiny_model(tmp_path / "s", seed=5, hidden_size=64)
    engine = await open_engine(folder)
    expected = await bits(engine)
    before = [replace(request, max_tokens=60, prompt_ids=request.prompt_ids * 7) for request in requests(9)]
    await texts(engine, [*before, *ALONE])
    assert await bits(engine) == expected
    other = await open_engine(folder)
    neighbours = asyncio.create_task(texts(other, before))
    assert await bits(other) == expected
    await neighbours
    mixed = await texts(engine, [*ALONE, *before])
    assert [[value.hex() for value in mixed[r.key].logprobs] for r in ALONE] != [logprobs for _, logprobs in expected]


async def test_alone_keeps_in_step_with_its_reader(open_engine: Any) -> None:
    """However long the reader takes: what it aborts has one token more, so the batch does not depend on the clock."""
    engine = await open_engine()
    found = {request.key: Text() for request in ALONE}
    async with aclosing(engine.generate(ALONE, alone=True)) as pieces:
        async for piece in pieces:
            found[piece.key].add(piece)
            assert len(piece.ids) == 1
            for _ in range(10):  # the compute thread could have gone on
                await engine._compute.run(lambda: None)
            if len(found["alone3"].ids) == 5:
                engine.abort(["alone3"])
    assert found["alone3"].finish_reason == "abort"
    assert len(found["alone3"].ids) == 6


@pytest.mark.full
async def test_alone_gives_the_same_bits_in_another_process(tmp_path: Path, open_engine: Any) -> None:
    folder = make_tiny_model(tmp_path / "s", seed=5, hidden_size=64)
    expected = await bits(await open_engine(folder))
    script = (
        "import asyncio, sys\n"
        "from pathlib import Path\n"
        "from tests.unit.test_sampler_engine import *\n"
        "engine = TransformersEngine(inspect_model('s', Path(sys.argv[1])), 'float32', ComputeThread('x'), threads=1)\n"
        "print(asyncio.run(bits(engine)))\n"
    )
    command = [sys.executable, "-c", script, str(folder)]
    found = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=55)
    assert found.stdout.strip().endswith(str(expected)), found.stderr


@pytest.mark.parametrize("alone", [False, True])
async def test_close_ends_what_runs_and_refuses_what_comes(open_engine: Any, alone: bool) -> None:
    engine = await open_engine(max_sequences=2)
    wanted = [SampleRequest(str(n), [5, n], 200, n) for n in range(10, 15)]
    ends: dict[str, str] = {}
    async for piece in engine.generate(wanted, alone=alone):
        if not ends:
            await engine.close()
        if piece.finish_reason:
            ends[piece.key] = piece.finish_reason
    assert ends.keys() == {request.key for request in wanted}
    assert "abort" in ends.values()
    with pytest.raises(EngineDeadError):
        await texts(engine, wanted)


async def test_a_bug_reaches_those_who_wait(open_engine: Any) -> None:
    engine = await open_engine()

    def bug(*args: Any) -> Any:
        raise KeyError("bug")

    engine._decoder._model.forward = bug
    with pytest.raises(KeyError):
        await texts(engine, requests(2))
