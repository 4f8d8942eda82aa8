"""Stop strings around an engine, beside what the suite of all engines shows: deterministic batches, no tokenizer."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from stillhouse.core.models import ModelEntry, inspect_model
from stillhouse.core.vocabulary import tokenizer_of
from stillhouse.core.worker import ComputeThread
from stillhouse.sampler.engines.base import Engine, SampleRequest
from stillhouse.sampler.engines.transformers import TransformersEngine
from stillhouse.sampler.generation import Completion, Generator
from stillhouse.sampler.stops import StoppingEngine
from tests.tiny import make_tiny_model

REQUESTS = [SampleRequest(f"{n}", [5 + n, 6, 7], 30, seed=n, temperature=1.3) for n in range(3)]


@pytest.fixture(scope="module")
def entry(tmp_path_factory: pytest.TempPathFactory) -> ModelEntry:
    return inspect_model("student", make_tiny_model(tmp_path_factory.mktemp("models") / "student", seed=1))


@pytest.fixture
def engine(entry: ModelEntry) -> Engine:
    return TransformersEngine(entry, "float32", ComputeThread("test"), threads=1)


def run(engine: Engine, wanted: list[SampleRequest]) -> list[Completion]:
    """The completions of a deterministic batch."""

    async def written() -> dict[str, Completion]:
        completions = [Completion(request) for request in wanted]
        return {c.key: c async for c in Generator().generate(engine, completions, alone=True)}

    ended = asyncio.run(written())
    return [ended[request.key] for request in wanted]


def test_in_a_deterministic_batch_one_that_stops_changes_no_bit_of_the_others(
    entry: ModelEntry, engine: Engine
) -> None:
    plain = run(engine, REQUESTS)
    text = tokenizer_of(entry).decode(plain[0].completion_ids[2:], skip_special_tokens=False)
    stop = next(character for character in text if character != "\ufffd")
    stopped, *others = run(StoppingEngine(engine, entry), [replace(REQUESTS[0], stop=(stop,)), *REQUESTS[1:]])
    length = len(stopped.completion_ids)
    assert length < min(len(completion.completion_ids) for completion in plain), "or the case shows nothing"
    assert stopped.finish_reason == "stop"
    assert stopped.rollout_logprobs == plain[0].rollout_logprobs[:length]
    for before, after in zip(plain[1:], others, strict=True):
        assert after.completion_ids == before.completion_ids
        assert after.rollout_logprobs == before.rollout_logprobs


def test_requests_without_stop_strings_need_no_tokenizer(engine: Engine, entry: ModelEntry, tmp_path: Path) -> None:
    nowhere = entry.model_copy(update={"path": str(tmp_path)})
    assert len(run(StoppingEngine(engine, nowhere), REQUESTS)) == len(REQUESTS)
