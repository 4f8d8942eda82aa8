"""What every engine of the sampler must do, run against each of them. vLLM: `make test-full`, where it is installed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
from tokenizers import Tokenizer

from stillhouse.core.errors import WeightsError
from stillhouse.core.models import inspect_model
from stillhouse.core.tasks import cancel_all
from stillhouse.core.tensors import DTYPE_NAMES
from stillhouse.sampler.engines.base import SampleRequest
from stillhouse.sampler.stops import StoppingEngine
from tests.contract.sampler_engines import (
    MAX_LENGTH,
    MAX_SEQUENCES,
    Cached,
    Subject,
    Text,
    make_tiny,
    open_engine,
    p_value,
    texts,
)
from tests.reading import slow_end
from tests.tiny import EOS_ID, TOKENIZER_SIZE, make_tokenizer

pytestmark = pytest.mark.asyncio(loop_scope="module")

ENGINES = ["transformers", pytest.param("vllm", marks=[pytest.mark.full, pytest.mark.timeout(600)])]
GAP = 1e-3
"""Largest mean difference between a log-probability of the engine and one of a plain forward pass, nats (float32)."""
CLEAR = 1e-2
"""Two likeliest tokens that are closer, nats, may change places by rounding."""
NO_STOP: dict[str, Any] = {"stop_token_ids": ()}


@pytest_asyncio.fixture(loop_scope="module", scope="module", params=ENGINES)
async def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Subject]:
    folder = make_tiny(tmp_path_factory.mktemp("models") / "student", seed=1)
    engine = await open_engine(request.param, folder)
    yield Subject(request.param, engine, folder)
    await engine.close()


def only(subject: Subject, name: str, why: str) -> None:
    if subject.name != name:
        pytest.skip(f"not promised by {subject.name}: {why}")


def requests(count: int = 12, **options: Any) -> list[SampleRequest]:
    """Prompts of ragged lengths, with different ends; more of them than are written at once."""
    rng = np.random.default_rng(0)
    return [
        SampleRequest(
            key=str(number),
            prompt_ids=rng.integers(4, TOKENIZER_SIZE, 3 + 5 * (number % 4)).tolist(),
            max_tokens=4 + 3 * number,
            seed=100 + number,
            **{"stop_token_ids": tuple(range(200, 215)), **options},
        )
        for number in range(count)
    ]


def check(subject: Subject, request: SampleRequest, text: Text) -> list[float]:
    """A finished text ends where it should; gives the gaps of its log-probabilities."""
    ends = {EOS_ID, *request.stop_token_ids}
    assert not ends & set(text.ids[:-1])
    assert text.finish_reason == ("stop" if text.ids[-1] in ends else "length")
    if text.finish_reason == "length":
        assert len(text.ids) == min(request.max_tokens, MAX_LENGTH - len(request.prompt_ids)) - len(request.written)
    prompt = [*request.prompt_ids, *request.written]
    truth = subject.logprobs(prompt, text.ids, request.temperature)
    if request.temperature == 0:
        for row, token in zip(truth, text.ids, strict=True):
            first, second = row.topk(2).values.tolist()
            if first - second < CLEAR:
                break
            assert token == int(row.argmax())
    picked = truth.gather(1, torch.tensor(text.ids)[:, None])[:, 0]
    return (picked - torch.tensor(text.logprobs)).abs().tolist()


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("updates", [0, 1, 10])
async def test_logprobs_and_greedy_tokens_are_those_of_a_plain_forward(
    subject: Subject, updates: int, temperature: float
) -> None:
    for number in range(updates):
        await subject.update(seed=20 + number)
    wanted = requests(temperature=temperature)
    got = await texts(subject.engine, wanted)
    gaps = [gap for request in wanted for gap in check(subject, request, got[request.key])]
    assert np.mean(gaps) <= GAP
    assert {tag for text in got.values() for tag in text.tags} == {subject.tag}
    assert temperature == 0 or {text.finish_reason for text in got.values()} == {"stop", "length"}


async def test_logprobs_do_not_know_of_truncation(subject: Subject) -> None:
    wanted = requests(6, temperature=0.8, top_k=20, top_p=0.9, min_p=0.02)
    got = await texts(subject.engine, wanted)
    assert np.mean([gap for request in wanted for gap in check(subject, request, got[request.key])]) <= GAP


@pytest.mark.parametrize("temperature", [0.0, 0.7])
async def test_likeliest_tokens_are_those_of_a_plain_forward(subject: Subject, temperature: float) -> None:
    """Whatever truncates the draw; rows that only pad the head are no tokens."""
    base = requests(4, temperature=temperature, top_k=5, top_p=0.9)
    wanted = [replace(request, record_top_k=3 + number) for number, request in enumerate(base)]
    got = await texts(subject.engine, wanted)
    for request in wanted:
        text = got[request.key]
        assert {ids.dtype for ids in text.target_ids} == {np.dtype(np.int32)}
        truth = subject.logprobs(request.prompt_ids, text.ids, temperature)
        for row, ids in zip(truth, text.target_ids, strict=True):
            assert len(ids) == request.record_top_k
            found = np.sort(row[torch.from_numpy(ids).long()].numpy())[::-1]
            np.testing.assert_allclose(found, row.topk(len(ids)).values.numpy(), atol=GAP)


async def test_entropies_are_those_of_a_plain_forward(subject: Subject) -> None:
    wanted = requests(4, temperature=0.7, top_k=5, record_entropies=True)
    got = await texts(subject.engine, wanted)
    for request in wanted:
        truth = subject.logprobs(request.prompt_ids, got[request.key].ids, 0.7)
        np.testing.assert_allclose(got[request.key].entropies, -(truth.exp() * truth).sum(-1).numpy(), atol=GAP)


async def test_what_is_recorded_changes_no_draw_and_nothing_is_recorded_unasked(subject: Subject) -> None:
    plain = requests(3)
    asked = [replace(plain[0], record_top_k=4), *plain[1:]]
    expected, got = await texts(subject.engine, plain), await texts(subject.engine, asked)
    assert [got[key].ids for key in "012"] == [expected[key].ids for key in "012"]
    assert [len(got[key].target_ids) for key in "012"] == [len(got["0"].ids), 0, 0]


async def test_seeds_reproduce(subject: Subject) -> None:
    wanted = requests(6, **NO_STOP)
    first, second = await texts(subject.engine, wanted), await texts(subject.engine, wanted)
    other = await texts(subject.engine, [replace(request, seed=request.seed + 1000) for request in wanted])
    assert [text.ids for text in second.values()] == [text.ids for text in first.values()]
    assert all(other[key].ids != first[key].ids for key in first if len(first[key].ids) > 5)


async def test_seeds_do_not_depend_on_neighbours_or_order(subject: Subject) -> None:
    only(subject, "transformers", "its kernels round differently in other batches")
    wanted = requests(MAX_SEQUENCES + 3)
    together = await texts(subject.engine, wanted)
    turned = await texts(subject.engine, wanted[::-1])
    for request in wanted:
        alone = (await texts(subject.engine, [request]))[request.key]
        assert alone.ids == together[request.key].ids == turned[request.key].ids


def truncated(logprobs: torch.Tensor, request: SampleRequest) -> np.ndarray:
    """[V] what the request draws from, in plain loops."""
    probs = logprobs.exp().numpy()
    order = sorted(range(len(probs)), key=lambda token: -probs[token])
    order = [token for token in order if probs[token] >= request.min_p * probs.max()]
    order = order[: request.top_k or None]
    mass, kept = sum(probs[token] for token in order), []
    for token in order:
        if request.top_p < 1 and sum(probs[token] for token in kept) >= request.top_p * mass:
            break
        kept.append(token)
    result = np.zeros_like(probs)
    result[kept] = probs[kept] / probs[kept].sum()
    return result


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.7},
        {"temperature": 0.7, "top_k": 7},
        {"temperature": 1.2, "top_p": 0.8},
        {"temperature": 1.2, "min_p": 0.1},
    ],
    ids=lambda options: "-".join(options),
)
async def test_draws_follow_the_distribution(subject: Subject, options: dict[str, Any]) -> None:
    await subject.update(seed=61)  # how sharp the distribution is decides what the controls below notice
    prompt, count = [17, 99, 5], 1500
    wanted = [SampleRequest(f"{seed}", prompt, 1, seed, **options) for seed in range(count)]
    got = await texts(subject.engine, wanted)
    counts = np.bincount([text.ids[0] for text in got.values()], minlength=TOKENIZER_SIZE)
    truth = truncated(subject.logprobs(prompt, [], options["temperature"])[0], wanted[0])
    assert counts[truth == 0].sum() == 0
    assert p_value(counts.tolist(), truth.tolist()) > 1e-3
    # the test would notice: another temperature, or no truncation
    other = truncated(subject.logprobs(prompt, [], options["temperature"] * 1.3)[0], wanted[0])
    assert p_value(counts.tolist(), other.tolist()) < 1e-6
    if len(options) > 1:
        whole = subject.logprobs(prompt, [], options["temperature"])[0].exp()
        assert p_value(counts.tolist(), whole.tolist()) < 1e-6


async def test_bad_requests_fail_alone(subject: Subject) -> None:
    good = requests(3)
    bad = {
        "too_long": SampleRequest("too_long", [5] * MAX_LENGTH, 4, 0),
        "bad_ids": SampleRequest("bad_ids", [5, TOKENIZER_SIZE], 4, 0),
        "empty": SampleRequest("empty", [], 4, 0),
        "bad_request": SampleRequest("bad_request", [5], 4, 0, record_top_k=TOKENIZER_SIZE + 1),
    }
    got = await texts(subject.engine, [good[0], *bad.values(), *good[1:]])
    for reason, request in bad.items():
        assert got[request.key].failure[0] == reason
        assert got[request.key].failure[1]
    for request in good:
        check(subject, request, got[request.key])


@pytest.mark.parametrize("max_tokens", [50, 2**31 - 1])
async def test_a_completion_ends_where_the_model_does(subject: Subject, max_tokens: int) -> None:
    """However much is asked for: nothing is laid out for tokens that cannot come."""
    request = SampleRequest("x", [7] * (MAX_LENGTH - 3), max_tokens, seed=1, temperature=0.0)
    check(subject, request, (await texts(subject.engine, [request]))["x"])


async def test_each_is_handed_out_when_it_ends_and_others_take_its_place(subject: Subject) -> None:
    """As many long ones as fit, but one; the short ones pass through the place that is left."""
    long = [SampleRequest(f"long{n}", [9, n], 100, n, temperature=0.0) for n in range(10, 9 + MAX_SEQUENCES)]
    short = [SampleRequest(f"short{n}", [9, n], 2, n) for n in range(10, 30)]
    found, ends = {request.key: Text() for request in [*long, *short]}, []
    async for piece in subject.engine.generate([*long, *short]):
        found[piece.key].add(piece)
        ends += [piece.key] if piece.finish_reason else []
    stay = {request.key for request in long if len(found[request.key].ids) > 60}
    assert len(stay) > 1, "the case needs long texts"
    assert set(ends[-len(stay) :]) == stay


async def test_abort_ends_one_and_leaves_the_others(subject: Subject) -> None:
    wanted = [replace(request, max_tokens=60) for request in requests(4, **NO_STOP)]
    expected = await texts(subject.engine, wanted)
    victim = max(expected, key=lambda key: len(expected[key].ids))
    got = {request.key: Text() for request in wanted}
    async for piece in subject.engine.generate(wanted):
        if piece.key == victim and not got[victim].ids:
            assert subject.engine.abort([victim, "nobody"]) == (0 if piece.finish_reason else 1)
        got[piece.key].add(piece)
    assert got[victim].finish_reason == "abort"
    assert got[victim].ids == expected[victim].ids[: len(got[victim].ids)]
    assert 0 < len(got[victim].ids) < len(expected[victim].ids)
    for key in expected.keys() - {victim}:
        assert got[key].finish_reason == expected[key].finish_reason


async def test_a_storm_of_aborts_leaves_an_engine_that_works(subject: Subject) -> None:
    for round_ in range(3):
        wanted = [SampleRequest(f"{round_}/{n}", [4 + n % 200, 9], 100, n) for n in range(300)]
        found = {request.key: Text() for request in wanted}
        async with aclosing(subject.engine.generate(wanted)) as pieces:
            async for piece in pieces:
                subject.engine.abort(found)
                found[piece.key].add(piece)
        ends = [text.finish_reason for text in found.values()]
        assert set(ends) <= {"abort", "stop", "length"}
        assert ends.count("abort") > 200
    request = requests(1)[0]
    check(subject, request, (await texts(subject.engine, [request]))[request.key])


async def test_what_nobody_reads_is_not_written(subject: Subject) -> None:
    """Closing the generator frees the places of its completions."""
    for round_ in range(5):
        wanted = [SampleRequest(f"{round_}/{n}", [5, 6, n], 100, n) for n in range(4, 4 + MAX_SEQUENCES)]
        async with aclosing(subject.engine.generate(wanted)) as pieces:
            async for _ in pieces:
                break
    request = requests(1)[0]
    check(subject, request, (await texts(subject.engine, [request]))[request.key])
    assert subject.engine.abort([f"0/{n}" for n in range(50)]) == 0


async def test_pause_stops_between_tokens_and_resume_goes_on(subject: Subject) -> None:
    engine = subject.engine
    wanted = [replace(request, max_tokens=80) for request in requests(4, **NO_STOP)]
    expected = await texts(engine, wanted)
    found = {request.key: Text() for request in wanted}
    pieces = engine.generate(wanted)
    found[(piece := await anext(pieces)).key].add(piece)
    await engine.pause()
    while True:  # what was written before it
        next_one = asyncio.ensure_future(anext(pieces))
        done, _ = await asyncio.wait([next_one], timeout=0.3)
        if not done:
            break
        found[(piece := next_one.result()).key].add(piece)
    assert any(text.end is None for text in found.values()), "nothing was left to pause"
    await engine.resume()
    found[(piece := await next_one).key].add(piece)
    async for piece in pieces:
        found[piece.key].add(piece)
    assert {key: text.ids for key, text in found.items()} == {key: text.ids for key, text in expected.items()}


async def test_weights_change_in_the_middle_of_a_completion(subject: Subject) -> None:
    """Its tokens say which weights wrote them; what is in the cache stays what the old ones made of it."""
    await subject.update(seed=40)
    old = subject.tag
    wanted = [SampleRequest(str(n), [50 + n, 9, 30], 100, seed=n) for n in range(6)]
    found = {request.key: Text() for request in wanted}
    truths = {request.key: Cached(subject.model) for request in wanted}
    parts: dict[str, torch.Tensor] = {}
    async for piece in subject.engine.generate(wanted):
        found[piece.key].add(piece)
        if subject.tag == old:
            await subject.engine.pause()
            await subject.update(seed=41)
            await subject.engine.resume()
    changed = [request for request in wanted if set(found[request.key].tags) == {old, old + 1}]
    assert changed
    assert all(sorted(text.tags) == text.tags for text in found.values())
    new_gaps, pure_gaps = [], []
    for weights in (40, 41):
        await subject.update(seed=weights)
        for request in changed:
            text = found[request.key]
            cut = text.tags.index(old + 1)
            if weights == 40:  # all but the last token before the cut, which the new weights read
                truths[request.key].read([*request.prompt_ids, *text.ids[: cut - 1]])
            else:
                parts[request.key] = truths[request.key].read(text.ids[cut - 1 : -1])
                pure = subject.logprobs(request.prompt_ids, text.ids)[cut:]
                later = torch.tensor(text.ids[cut:])[:, None]
                written = torch.tensor(text.logprobs[cut:])
                new_gaps += (parts[request.key].gather(1, later)[:, 0] - written).abs().tolist()
                pure_gaps += (pure.gather(1, later)[:, 0] - written).abs().tolist()
    assert np.mean(new_gaps) <= GAP
    assert np.mean(pure_gaps) > 10 * GAP, "the new weights alone would write the same"


async def test_completions_that_wait_read_their_prompt_with_the_weights_that_write_them(subject: Subject) -> None:
    """What older weights made of the same prompt lies in a cache of prefixes, and must not be found."""
    prompt = list(range(20, 170))
    await subject.update(seed=40)
    await texts(subject.engine, [SampleRequest("before", prompt, 2, 0)])
    old = subject.tag
    long = [SampleRequest(f"long{n}", [50 + n, 9], 120, n, temperature=0.0) for n in range(MAX_SEQUENCES)]
    waiting = [SampleRequest(f"waits{n}", prompt, 9, n, stop_token_ids=()) for n in range(4)]
    found = {request.key: Text() for request in [*long, *waiting]}
    async for piece in subject.engine.generate([*long, *waiting]):
        found[piece.key].add(piece)
        if subject.tag == old:
            await subject.engine.pause()
            await subject.update(seed=41)
            await subject.engine.resume()
    late = [request for request in waiting if set(found[request.key].tags) == {old + 1}]
    assert late, "none of them waited"
    found |= await texts(subject.engine, after := [SampleRequest("after", prompt, 9, 0)])
    assert np.mean([gap for request in [*late, *after] for gap in check(subject, request, found[request.key])]) <= GAP


async def test_a_load_that_is_cancelled_leaves_an_engine_that_takes_the_next(subject: Subject) -> None:
    """At whatever point it is cancelled, and however often, as `cancel_all` does; a job's end does this."""
    for turns in (2, 20, 200, 2000):
        load = asyncio.create_task(subject.update(seed=70))
        for _ in range(turns):
            await asyncio.sleep(0)
        await cancel_all([load])
    await subject.update(seed=71)
    wanted = requests(3)
    got = await texts(subject.engine, wanted)
    assert np.mean([gap for request in wanted for gap in check(subject, request, got[request.key])]) <= GAP
    assert {tag for text in got.values() for tag in text.tags} == {subject.tag}


@pytest.mark.parametrize("fault", ["missing", "unknown", "shape", "nan"])
async def test_wrong_weights_are_refused_and_change_nothing(subject: Subject, fault: str) -> None:
    arrays = {name: p.detach().numpy() + 1 for name, p in subject.model.named_parameters()}
    name = "model.norm.weight"
    if fault == "missing":
        del arrays[name]
    elif fault == "unknown":
        arrays["model.extra"] = arrays[name]
    elif fault == "shape":
        arrays[name] = arrays[name][:-1]
    else:
        arrays[name][0] = np.nan
    with pytest.raises(WeightsError):
        await subject.engine.load_weights(arrays, dict.fromkeys(arrays, DTYPE_NAMES["float32"]), 999)
    wanted = requests(3)
    got = await texts(subject.engine, wanted)
    assert np.mean([gap for request in wanted for gap in check(subject, request, got[request.key])]) <= GAP
    assert {tag for text in got.values() for tag in text.tags} == {subject.tag}


async def test_a_continued_completion_follows_the_distribution(subject: Subject) -> None:
    """What others wrote is read like the prompt, and counts as written."""
    await subject.update(seed=61)
    prompt, written, count = [17, 99, 5], (30, 31, 32), 1500
    wanted = [SampleRequest(f"{seed}", prompt, 4, seed, written=written) for seed in range(count)]
    got = await texts(subject.engine, wanted)
    counts = np.bincount([text.ids[0] for text in got.values()], minlength=TOKENIZER_SIZE)
    truth = subject.logprobs([*prompt, *written], [])[0].exp()
    assert {len(text.ids) for text in got.values()} == {1}
    assert p_value(counts.tolist(), truth.tolist()) > 1e-3
    assert p_value(counts.tolist(), subject.logprobs(prompt, [])[0].exp().tolist()) < 1e-6


async def test_a_continued_completion_goes_on_as_it_would_have(subject: Subject) -> None:
    wanted = [replace(request, max_tokens=40) for request in requests(6, **NO_STOP)]
    whole = await texts(subject.engine, wanted)
    for cut in (1, 7):
        rest = [replace(request, written=tuple(whole[request.key].ids[:cut])) for request in wanted]
        got = await texts(subject.engine, rest)
        for request in wanted:
            assert [*whole[request.key].ids[:cut], *got[request.key].ids] == whole[request.key].ids
            assert got[request.key].finish_reason == whole[request.key].finish_reason


async def test_a_completion_that_was_written_to_its_end_just_ends(subject: Subject) -> None:
    stopped = SampleRequest("stopped", [5, 6], 9, 0, written=(7, EOS_ID))
    full = SampleRequest("full", [5, 6], 3, 0, written=(7, 8, 9))
    no_room = SampleRequest("no room", [5, 6], 9999, 0, written=(7,) * (MAX_LENGTH - 2))
    got = await texts(subject.engine, [stopped, full, no_room])
    ends = [(text.ids, text.finish_reason) for text in got.values()]
    assert ends == [([], "stop"), ([], "length"), ([], "length")]


async def test_stop_strings_end_completions_at_the_token_that_completes_one(subject: Subject, tmp_path: Path) -> None:
    """Engines know no texts: `StoppingEngine` cuts what they write, all that is recorded, and has the rest aborted."""
    entry, tokenizer = inspect_model("student", make_tiny(tmp_path / "student", 1)), make_tokenizer().backend_tokenizer
    recorded: dict[str, Any] = {**NO_STOP, "record_top_k": 3, "record_entropies": True, "temperature": 1.3}
    wanted = [replace(request, max_tokens=40) for request in requests(6, **recorded)]
    plain = await texts(subject.engine, wanted)
    stopping = [replace(one, stop=("never there", some_text(tokenizer, plain[one.key].ids))) for one in wanted[1:]]
    got = await texts(StoppingEngine(subject.engine, entry), [wanted[0], *stopping])
    assert (got["0"].ids, got["0"].finish_reason) == (plain["0"].ids, plain["0"].finish_reason)
    for request in stopping:
        before, after = plain[request.key], got[request.key]
        end = slow_end(tokenizer, before.ids, request.stop)
        assert (after.ids, after.finish_reason) == (before.ids[:end], "stop")
        np.testing.assert_allclose(after.logprobs, before.logprobs[:end], atol=1e-4)
        np.testing.assert_allclose(after.entropies, before.entropies[:end], atol=1e-4)
        assert np.array_equal(after.target_ids, before.target_ids[:end])
    # each goes on from the last token but one, and from its end
    for cut in (1, 0):
        rest = [replace(one, written=tuple(ids[: len(ids) - cut])) for one in stopping if (ids := got[one.key].ids)]
        went_on = await texts(StoppingEngine(subject.engine, entry), rest)
        for key, text in went_on.items():
            assert (text.ids, text.finish_reason) == (got[key].ids[len(got[key].ids) - cut :], "stop")


def some_text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Two characters of the text of `ids`, not from its beginning."""
    text = tokenizer.decode(ids, skip_special_tokens=False)
    return next(text[i : i + 2] for i in range(3, len(text)) if "\ufffd" not in text[i : i + 2])


async def test_calls_share_the_engine(subject: Subject) -> None:
    """One that comes later does not wait for those before it to end."""
    slow = [SampleRequest(f"slow{n}", [60 + n, 9], 110, n, temperature=0.0) for n in range(4)]
    quick = [SampleRequest(f"quick{n}", [60 + n, 8], 3, n) for n in range(4)]
    ended: list[str] = []

    async def read(wanted: list[SampleRequest]) -> None:
        async for piece in subject.engine.generate(wanted):
            if piece.finish_reason:
                ended.append(piece.key)

    lengths = [len(text.ids) for text in (await texts(subject.engine, slow)).values()]
    assert max(lengths) > 60, "the case needs a long text"
    await asyncio.gather(read(slow), read(quick))
    assert ended[-1].startswith("slow")


async def test_samples_of_a_prompt_share_its_prefill(subject: Subject) -> None:
    only(subject, "transformers", "it counts its tokens itself")
    engine: Any = subject.engine
    await subject.update(seed=50)  # forget what was read
    prompts = [[4 + n] * 40 for n in range(5)]
    group = [SampleRequest(f"{n}/{seed}", prompts[n], 8 + seed, seed) for n in range(5) for seed in range(6)]
    before = engine.prefilled_tokens
    got = await texts(engine, group)
    assert engine.prefilled_tokens - before == sum(map(len, prompts))
    assert np.mean([gap for request in group for gap in check(subject, request, got[request.key])]) <= GAP
    assert len({tuple(got[f"0/{seed}"].ids) for seed in range(6)}) == 6
