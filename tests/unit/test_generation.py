"""From pieces to completions: each ends once, remembers which weights wrote what, and can be ended early."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from stillhouse.core.errors import EngineDeadError
from stillhouse.sampler.engines.base import SampleRequest
from stillhouse.sampler.generation import Completion, Generator
from stillhouse.v1 import weights_pb2
from tests.chaos.sim.toys import ToySampler
from tests.waiting import wait_until


def wanted(count: int = 3, max_tokens: int = 50) -> list[Completion]:
    """Completions of max_tokens tokens."""
    return [Completion(SampleRequest(str(key), [1], max_tokens, max_tokens - 1)) for key in range(count)]


def ref(version: int) -> weights_pb2.WeightsRef:
    return weights_pb2.WeightsRef(epoch=1, policy_version=version, sha256=str(version))


async def written(generator: Generator, engine: Any, completions: list[Completion], **options: Any) -> list[Completion]:
    return [completion async for completion in generator.generate(engine, completions, **options)]


async def test_weights_that_change_on_the_way_begin_a_new_span() -> None:
    engine, names = ToySampler(), {0: ref(4), 1: ref(5)}
    completions = wanted(2)
    task = asyncio.create_task(written(Generator(), engine, completions, weights_of=names.get))
    await wait_until(lambda: len(completions[0].completion_ids) >= 5, timeout_s=5, what="the first tokens")
    await engine.load_weights({}, {}, 1)
    ended = await task
    assert [completion.finish_reason for completion in ended] == ["length", "length"]
    for completion in ended:
        (first, before), (second, after) = completion.spans
        assert (first, before.policy_version, after.policy_version) == (0, 4, 5)
        assert 5 <= second < 50 == len(completion.completion_ids) == len(completion.rollout_logprobs)


async def test_weights_that_are_renamed_while_they_write_begin_a_new_span() -> None:
    """A step that was skipped publishes the same weights under the next name."""
    names = {0: ref(4)}
    (completion,) = wanted(1)
    async for piece in ToySampler().generate([completion.request]):
        completion.add(piece, names[piece.policy_tag])
        names = {0: ref(4 + len(completion.completion_ids) // 20)}
    assert [(first, name.policy_version) for first, name in completion.spans] == [(0, 4), (20, 5), (40, 6)]


async def test_aborted_completions_end_and_the_others_go_on() -> None:
    generator = Generator()
    completions = wanted(3)
    task = asyncio.create_task(written(generator, ToySampler(), completions))
    await wait_until(lambda: bool(completions[2].completion_ids), timeout_s=5, what="the first tokens")
    assert generator.is_busy
    assert generator.abort(["1", "nobody"]) == 1
    ended = await task
    assert {completion.key: completion.finish_reason for completion in ended} == {
        "0": "length",
        "1": "abort",
        "2": "length",
    }
    assert not generator.is_busy
    assert generator.abort() == 0, "nothing runs any more"
    assert generator.sampled_tokens == sum(len(completion.completion_ids) for completion in ended)


async def test_an_abort_without_names_ends_all_engines_completions() -> None:
    generator = Generator()
    runs = [asyncio.create_task(written(generator, ToySampler(), wanted(2)))]
    runs.append(asyncio.create_task(written(generator, ToySampler(), [Completion(SampleRequest("x", [1], 50, 49))])))
    await wait_until(lambda: bool(generator.sampled_tokens), timeout_s=5, what="the first tokens")
    assert generator.abort() == 3
    assert {c.finish_reason for run in runs for c in await run} == {"abort"}


async def test_who_looks_away_leaves_nothing_running() -> None:
    generator = Generator()
    written = generator.generate(ToySampler(), wanted(2))
    task = asyncio.create_task(anext(written))
    await wait_until(lambda: bool(generator.sampled_tokens), timeout_s=5, what="the first tokens")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await written.aclose()
    assert not generator.is_busy


async def test_an_engine_that_leaves_completions_without_an_end_is_dead() -> None:
    class Forgetful(ToySampler):
        async def generate(self, requests: Any, *, alone: bool = False) -> Any:
            async for piece in super().generate(requests[:1]):
                yield piece

    with pytest.raises(EngineDeadError, match="before 1 of its completions"):
        await written(Generator(), Forgetful(), wanted(2, max_tokens=1))
