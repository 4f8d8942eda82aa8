"""An engine with stop strings writes what it writes without them, up to the token that completes one."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from stillhouse.core.models import ModelEntry, inspect_model
from stillhouse.core.vocabulary import tokenizer_of
from stillhouse.core.worker import ComputeThread
from stillhouse.sampler.engines.base import Engine, SampleRequest
from stillhouse.sampler.engines.transformers import TransformersEngine
from stillhouse.sampler.generation import Completion, Generator
from stillhouse.sampler.stops import StoppingEngine
from tests.tiny import make_tiny_model
from tests.unit.test_stops import slow_end


@pytest.fixture(scope="module")
def entry(tmp_path_factory: pytest.TempPathFactory) -> ModelEntry:
    return inspect_model("student", make_tiny_model(tmp_path_factory.mktemp("models") / "student", seed=1))


@pytest.fixture(scope="module")
def engine(entry: ModelEntry) -> Engine:
    return TransformersEngine(entry, "float32", ComputeThread("test"), threads=1)


REQUESTS = [
    SampleRequest(f"{n}", [5 + n, 6, 7], 30, seed=n, temperature=1.3, record_top_k=3, record_entropies=True)
    for n in range(4)
]


def run(engine: Engine, wanted: list[SampleRequest], *, alone: bool = False) -> list[Completion]:
    async def written() -> dict[str, Completion]:
        completions = [Completion(request) for request in wanted]
        return {c.key: c async for c in Generator().generate(engine, completions, alone=alone)}

    ended = asyncio.run(written())
    return [ended[request.key] for request in wanted]


def with_stop(entry: ModelEntry, plain: list[Completion]) -> list[SampleRequest]:
    """The requests with stop strings of two characters that occur in what they gave; the last one has none."""
    wanted = []
    for completion in plain[:-1]:
        text = tokenizer_of(entry).decode(completion.completion_ids, skip_special_tokens=False)
        place = next(i for i in range(3, len(text)) if "\ufffd" not in text[i : i + 2])
        wanted.append(replace(completion.request, stop=("never there", text[place : place + 2])))
    return [*wanted, plain[-1].request]


@pytest.mark.parametrize("alone", [False, True], ids=["together", "deterministic"])
def test_everything_is_cut_at_the_token_that_completes_a_stop_string(
    entry: ModelEntry, engine: Engine, alone: bool
) -> None:
    plain = run(engine, REQUESTS, alone=alone)
    wanted = with_stop(entry, plain)
    for before, after in zip(plain, run(StoppingEngine(engine, entry), wanted, alone=alone), strict=True):
        stops = after.request.stop
        end = slow_end(tokenizer_of(entry), before.completion_ids, stops) if stops else None
        assert (end is not None) == bool(stops), "or the case shows nothing"
        assert after.completion_ids == before.completion_ids[:end]
        assert after.finish_reason == ("stop" if stops else before.finish_reason)
        np.testing.assert_allclose(after.rollout_logprobs, before.rollout_logprobs[:end], atol=1e-5)
        assert before.target_ids is not None
        assert before.entropies is not None
        assert after.target_ids is not None
        assert after.entropies is not None
        assert after.target_ids.tolist() == before.target_ids[:end].tolist()
        np.testing.assert_allclose(after.entropies, before.entropies[:end], atol=1e-5)
        if alone:
            assert after.rollout_logprobs == before.rollout_logprobs[:end], "bit for bit: the batch is the same"


def test_a_continued_completion_may_complete_what_another_sampler_began(entry: ModelEntry, engine: Engine) -> None:
    plain = run(engine, REQUESTS)
    for before, request in zip(plain[:-1], with_stop(entry, plain), strict=False):
        end = slow_end(tokenizer_of(entry), before.completion_ids, request.stop)
        assert end is not None
        for have in (end - 1, end - 2):
            [after] = run(
                StoppingEngine(engine, entry), [replace(request, written=tuple(before.completion_ids[:have]))]
            )
            assert after.completion_ids == before.completion_ids[have:end]
            assert after.finish_reason == "stop"


def test_requests_without_stop_strings_need_no_tokenizer(engine: Engine, entry: ModelEntry, tmp_path: Path) -> None:
    nowhere = entry.model_copy(update={"path": str(tmp_path)})
    assert len(run(StoppingEngine(engine, nowhere), REQUESTS)) == len(REQUESTS)
