"""Completions that outlive their sampler: what is kept of them is all of them, and it does not prefer short ones."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from stillhouse.core.errors import WireError
from stillhouse.core.queue.streams import Entry
from stillhouse.core.tensors import ids_tensor
from stillhouse.sampler import work as work_module
from stillhouse.sampler.engines.base import Piece
from stillhouse.sampler.generation import Completion
from stillhouse.sampler.messages import Source, group_requests, make_rollout
from stillhouse.sampler.work import Work
from stillhouse.v1 import rollout_pb2 as pb
from stillhouse.v1 import weights_pb2

ENTRY = Entry("prompts", "samplers", "1-0", b"")


def group(num_samples: int = 2, **sampling: Any) -> pb.PromptGroup:
    return pb.PromptGroup(
        group_id="7",
        sample_indices=range(num_samples),
        seeds=range(num_samples),
        prompt_ids=ids_tensor([1, 2]),
        sampling=pb.SamplingParams(max_tokens=1000, temperature=1.0, **sampling),
        min_policy_version=3,
    )


def opened(message: pb.PromptGroup, parts: list[bytes] | None = None) -> Work:
    """A claimed group, as its holder sees it."""
    requests = group_requests(message)
    work = Work(ENTRY, message, {index: Completion(request) for index, request in requests.items()})
    if parts is not None:
        work.resume(parts)
    return work


def ref(version: int) -> weights_pb2.WeightsRef:
    return weights_pb2.WeightsRef(epoch=2, policy_version=version, sha256=f"sha of {version}")


def write(work: Work, index: int, count: int, version: int, **end: Any) -> None:
    """`count` tokens in pieces of one to three, with everything recorded."""
    completion = work.completions[index]
    while count:
        start = len(completion.completion_ids)
        size = min(count, 1 + start % 3)
        ids = [100 * index + start + number for number in range(size)]
        piece = Piece(
            completion.key,
            ids,
            [-0.5 * token for token in ids],
            target_ids=np.array([[token, token + 1, token + 2] for token in ids], dtype=np.int32),
            entropies=np.array(ids, dtype=np.float32) / 7,
            sample_s=0.25,
            **(end if size == count else {}),
        )
        completion.add(piece, ref(version))
        count -= size


def keep(work: Work, parts: list[bytes]) -> int:
    """What `Shift._keep` does; the number of parts that it took."""
    before = len(parts)
    while part := work.next_part():
        parts.append(part)
        work.part_is_kept()
    return len(parts) - before


@pytest.mark.parametrize(("part_bytes", "num_parts"), [(1, 5), (170, 2), (1 << 19, 1)])
def test_a_continued_rollout_is_that_of_one_sampler_with_its_spans(
    part_bytes: int, num_parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work_module, "PART_BYTES", part_bytes)
    message = group(record_top_k=3, record_entropies=True)
    whole = opened(message)
    first, parts = opened(message), []
    for work in (whole, first):
        write(work, 0, 5, version=3)
        write(work, 1, 1, version=3)
    assert keep(first, parts) == num_parts
    assert keep(first, parts) == 0, "nothing new"
    for work in (whole, first):
        write(work, 1, 8, version=4)
        write(work, 0, 2, version=4)
    keep(first, parts)
    write(first, 0, 4, version=5)  # not kept: its sampler dies
    second = opened(message, parts)
    assert [len(completion.request.written) for completion in second.completions.values()] == [7, 9]
    assert second.num_parts == len(parts)
    assert second.min_version == 4, "who goes on may not have older weights than who began"
    for work in (whole, second):
        for index, count in ((0, 6), (1, 3)):
            write(work, index, count, version=6, finish_reason="stop")
    source = Source("sampler-1", "tokenizer")
    for index in (0, 1):
        expected = make_rollout(message, index, whole.completions[index], source)
        got = make_rollout(message, index, second.completions[index], source)
        assert got == expected
        spans = [(span.first_token, span.policy_version) for span in got.spans]
        assert spans == [(0, 3), ((5, 1)[index], 4), ((7, 9)[index], 6)]
        assert got.weights_sha256 == "sha of 6"


def test_the_same_part_is_sent_until_its_answer_arrives() -> None:
    work, parts = opened(group()), []
    write(work, 0, 3, version=3)
    part = work.next_part()
    write(work, 0, 3, version=3)
    assert work.next_part() == part, "the first one may have been appended: another could not tell"
    parts.append(part)
    work.part_is_kept()
    keep(work, parts)
    assert len(opened(group(), parts).completions[0].completion_ids) == 6


def test_the_end_of_a_sample_is_handed_over_and_not_kept() -> None:
    """A kept completion has no end, and would be written on beyond its stop token."""
    work = opened(group())
    write(work, 0, 3, version=3, finish_reason="stop")
    assert work.next_part() == b""


def test_samples_that_were_handed_over_are_not_asked_for_again() -> None:
    work, parts = opened(group()), []
    write(work, 0, 3, version=3)
    write(work, 1, 4, version=3)
    keep(work, parts)
    later = opened(group())
    del later.completions[0]
    later.resume(parts)
    assert {index: len(c.completion_ids) for index, c in later.completions.items()} == {1: 4}


def test_parts_that_do_not_follow_each_other_are_refused_and_nothing_is_taken() -> None:
    work, parts = opened(group()), []
    for _ in range(3):
        write(work, 0, 3, version=3)
        keep(work, parts)
    later = opened(group())
    with pytest.raises(WireError, match="begins at token 6, after 3"):
        later.resume([parts[0], parts[2]])
    assert not later.completions[0].completion_ids
    assert not later.completions[0].request.written


# --- lengths: a writer that stops with probability S per token and dies with probability H ---

S, H = 0.05, 0.05
NUM_LENGTHS = 1500


def lengths(seed: int, *, keep_every: int) -> np.ndarray:
    """Lengths of finished completions; kept every so many tokens (0 = never: written anew after every death)."""
    draw = random.Random(seed)
    message = group(1)
    found = []
    for _ in range(NUM_LENGTHS):
        parts: list[bytes] = []
        while (length := _until_it_ends_or_dies(draw, opened(message, parts), parts, keep_every)) is None:
            pass
        found.append(length)
    return np.array(found)


def _until_it_ends_or_dies(draw: random.Random, work: Work, parts: list[bytes], keep_every: int) -> int | None:
    completion = work.completions[0]
    while True:
        completion.add(Piece("7/0", [1], [-1.0]), ref(3))
        if draw.random() < S:
            return len(completion.completion_ids)
        if keep_every and len(completion.completion_ids) % keep_every == 0:
            keep(work, parts)
        if draw.random() < H:
            return None


def expected_mean(keep_every: int) -> float:
    """Exact. A block of J tokens is left behind for good once it is kept; until then a death begins it anew, so that
    what counts is the attempt in which nobody died: a stop at its token k has weight ((1-S)(1-H))^(k-1) S, getting
    through (1-S)^J (1-H)^(J-1)."""
    r = (1 - S) * (1 - H)
    stops = np.array([r ** (k - 1) * S for k in range(1, keep_every + 1)])
    through = (1 - S) ** keep_every * (1 - H) ** (keep_every - 1)
    stops, through = stops / (stops.sum() + through), through / (stops.sum() + through)
    return float((stops @ np.arange(1, keep_every + 1) + through * keep_every) / (1 - through))


def is_near(found: np.ndarray, mean: float) -> bool:
    """Within four standard errors."""
    return abs(found.mean() - mean) < 4 * found.std() / np.sqrt(len(found))


def test_continuing_leaves_the_lengths_alone_and_writing_anew_does_not() -> None:
    """Geometric lengths of mean 1/S; written anew after every death they have mean 1/(S + H - S H), about half."""
    continued, anew = lengths(1, keep_every=1), lengths(2, keep_every=0)
    assert expected_mean(1) == pytest.approx(1 / S)
    assert is_near(continued, 1 / S)
    assert is_near(anew, 1 / (S + H - S * H))
    assert not is_near(anew, 1 / S), "the control: this test sees the bias"
    for at_least in (5, 14, 30, 60):
        survival = (1 - S) ** (at_least - 1)
        error = np.sqrt(survival * (1 - survival) / NUM_LENGTHS)
        assert abs((continued >= at_least).mean() - survival) < 4 * error
        assert (anew >= at_least).mean() < survival - 4 * error


def test_what_is_lost_since_the_last_part_costs_what_the_theory_says() -> None:
    """If a death costs up to 8 tokens and comes every 20 (far worse than any deployment), the mean falls by a sixth."""
    found = lengths(3, keep_every=8)
    assert expected_mean(8) == pytest.approx(16.88, abs=0.01)
    assert is_near(found, expected_mean(8))
    assert not is_near(found, 1 / S)
