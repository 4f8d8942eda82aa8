"""Micro-batch plans keep their promises, and packing puts every row where the definition says."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.core.errors import WireError
from stillhouse.trainer.batch import TeacherHead, TrainSample
from stillhouse.trainer.packing import collate, loss_weights, padding_fraction, plan_micro_batches


def sample(index: int, prompt: int, completion: int, teacher: str = "a", *, mask: list[int] | None = None, weight=1.0):
    """Every number in it is its own: ids and values tell sample, part and position apart."""
    base = 1000 * (index + 1)
    values = np.arange(completion, dtype=np.float32)
    return TrainSample(
        sample_id=f"{index}/0",
        teacher=teacher,
        prompt_ids=np.arange(base, base + prompt, dtype=np.int32),
        completion_ids=np.arange(base + 500, base + 500 + completion, dtype=np.int32),
        loss_mask=np.asarray(mask if mask is not None else [1] * completion, dtype=np.uint8),
        rollout_logprobs=-base - values,
        teacher_logprobs=-base - values - 0.5,
        hidden=np.stack([values, values + base], axis=1).astype(np.float32),
        weight=weight,
        oldest_policy_version=0,
        finish_reason=1,
    )


sizes = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30), st.sampled_from("abc")), max_size=30)


def computed(samples, batch, is_packed: bool) -> int:
    """Tokens of a forward pass, the plain way."""
    return sum(samples[i].num_tokens if is_packed else max(samples[j].num_tokens for j in batch) for i in batch)


@given(sizes, st.integers(1, 200), st.booleans())
def test_plan_is_a_partition_within_the_budget_with_one_teacher_each(shapes, max_tokens: int, is_packed: bool) -> None:
    samples = [sample(i, *shape) for i, shape in enumerate(shapes)]
    plan = plan_micro_batches(samples, max_tokens, is_packed=is_packed)
    assert sorted(i for batch in plan for i in batch) == list(range(len(samples)))
    for batch in plan:
        assert len({samples[i].teacher for i in batch}) == 1
        assert computed(samples, batch, is_packed) <= max_tokens or len(batch) == 1
    blocks = [samples[batch[0]].teacher for batch in plan]
    assert blocks == sorted(blocks), "each head is loaded once"
    assert plan == plan_micro_batches(samples, max_tokens, is_packed=is_packed)


@given(sizes, st.integers(30, 200))
def test_packing_never_pads_and_never_needs_more_passes(shapes, max_tokens: int) -> None:
    samples = [sample(i, *shape) for i, shape in enumerate(shapes)]
    padded, packed = (plan_micro_batches(samples, max_tokens, is_packed=is_packed) for is_packed in (False, True))
    assert len(packed) <= len(padded)
    assert padding_fraction(samples, packed, is_packed=True) == 0
    total = sum(sample.num_tokens for sample in samples)
    expected = 1 - total / sum(computed(samples, batch, False) for batch in padded) if samples else 0
    assert padding_fraction(samples, padded, is_packed=False) == pytest.approx(expected)


@given(sizes, st.integers(30, 200), st.booleans())
def test_no_two_neighbours_of_a_plan_could_have_been_one(shapes, max_tokens: int, is_packed: bool) -> None:
    samples = [sample(i, *shape) for i, shape in enumerate(shapes)]
    plan = plan_micro_batches(samples, max_tokens, is_packed=is_packed)
    for left, right in itertools.pairwise(plan):
        if samples[left[0]].teacher == samples[right[0]].teacher:
            merged = left + right[:1]
            assert computed(samples, merged, is_packed) > max_tokens


@pytest.mark.parametrize("is_packed", [False, True])
def test_collate_against_a_loop_over_tokens(is_packed: bool) -> None:
    samples = [sample(0, 3, 4), sample(1, 1, 1), sample(2, 2, 5, mask=[1, 0, 1, 1, 0]), sample(3, 2, 2, mask=[0, 0])]
    indices, weights = [2, 0, 3, 1], [0.1, 0.2, 0.3, 0.4]
    batch = collate(samples, indices, weights, is_packed=is_packed)
    flat = batch.input_ids.flatten()
    row = 0
    for i in indices:
        for t in range(len(samples[i].completion_ids)):
            if not samples[i].loss_mask[t]:
                continue
            before = samples[i].prompt_ids[-1] if t == 0 else samples[i].completion_ids[t - 1]
            assert flat[batch.positions[row]] == before, "a token is predicted from the one before it"
            assert batch.ids[row] == samples[i].completion_ids[t]
            assert batch.rollout_logprobs[row] == samples[i].rollout_logprobs[t]
            assert batch.teacher_logprobs[row] == samples[i].teacher_logprobs[t]
            assert batch.hidden is not None
            np.testing.assert_array_equal(batch.hidden[row], samples[i].hidden[t])  # type: ignore[index]
            assert (batch.sample_of_row[row], batch.token_of_row[row]) == (i, t)
            assert batch.weights[row] == np.float32(weights[i])
            row += 1
    assert row == len(batch.ids) == 8
    assert batch.input_ids.shape == ((1, 14) if is_packed else (4, 6))
    assert batch.lengths == ((5, 6, 2, 1) if is_packed else None)


def test_collate_refuses_two_teachers() -> None:
    with pytest.raises(WireError, match=r"\['a', 'b'\]"):
        collate([sample(0, 1, 1, "a"), sample(1, 1, 1, "b")], [0, 1], [1, 1])


def test_token_mean_weighs_tokens_and_sequence_mean_weighs_sequences() -> None:
    samples = [sample(0, 1, 2), sample(1, 1, 8), sample(2, 1, 4, mask=[1, 0, 0, 1]), sample(3, 1, 2, mask=[0, 0])]
    ones = [1.0] * len(samples)
    assert loss_weights(samples, ones, "token_mean") == [1 / 12] * 4
    by_sequence = loss_weights(samples, ones, "seq_mean_token_mean")
    counts = [s.num_loss_tokens for s in samples]
    np.testing.assert_allclose([w * n for w, n in zip(by_sequence, counts, strict=True)], [1 / 3, 1 / 3, 1 / 3, 0])


def test_weights_of_rows_and_teachers_multiply() -> None:
    samples = [sample(0, 1, 2, weight=3.0), sample(1, 1, 2)]
    plain = loss_weights([sample(0, 1, 2), sample(1, 1, 2)], [1, 1], "token_mean")
    assert loss_weights(samples, [1, 5], "token_mean") == pytest.approx([3 * plain[0], 5 * plain[1]])


def loss(samples: list[TrainSample], reduction: Any, *, per_teacher: bool = False, teacher_weights=None) -> float:
    """Step loss of rows whose own loss is that of `row_loss`, as the learner sums it up."""
    weights = loss_weights(samples, teacher_weights or [1.0] * len(samples), reduction, per_teacher)
    return sum(weight * row_loss(s).sum() for weight, s in zip(weights, samples, strict=True))


def row_loss(s: TrainSample) -> np.ndarray:
    """Any number per trained row that depends on nothing but the row."""
    return np.sin(s.completion_ids[s.loss_mask != 0].astype(np.float64))


reductions = st.sampled_from(["token_mean", "seq_mean_token_mean"])
some = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 9), st.sampled_from("abc")), min_size=1, max_size=12)


@given(some, reductions, st.randoms(use_true_random=False))
def test_per_teacher_is_the_mean_of_the_teachers_own_means(shapes, reduction: Any, random: Any) -> None:
    samples = [sample(i, *s, mask=[random.randint(0, 1) for _ in range(s[1])]) for i, s in enumerate(shapes)]
    own = {name: [s for s in samples if s.teacher == name] for name in {s.teacher for s in samples}}
    means = [loss(part, reduction) for part in own.values() if any(s.num_loss_tokens for s in part)]
    expected = np.mean(means) if means else 0.0
    assert loss(samples, reduction, per_teacher=True) == pytest.approx(expected)
    shuffled = random.sample(samples, len(samples))
    assert loss(shuffled, reduction, per_teacher=True) == pytest.approx(expected), "order says nothing"


@given(some, reductions)
def test_with_one_teacher_per_teacher_changes_nothing(shapes, reduction: Any) -> None:
    samples = [sample(i, prompt, completion) for i, (prompt, completion, _) in enumerate(shapes)]
    ones = [1.0] * len(samples)
    assert loss_weights(samples, ones, reduction, True) == loss_weights(samples, ones, reduction)


@given(some, reductions)
def test_more_samples_of_one_teacher_leave_the_others_their_share(shapes, reduction: Any) -> None:
    samples = [sample(i, *shape) for i, shape in enumerate(shapes)]
    doubled = samples + [replace(s, sample_id=f"again {s.sample_id}") for s in samples if s.teacher == "a"]
    shares = [loss_weights(part, [1.0] * len(part), reduction, True) for part in (samples, doubled)]
    plain = [loss_weights(part, [1.0] * len(part), reduction) for part in (samples, doubled)]
    for i, s in enumerate(samples):
        assert shares[1][i] == pytest.approx(shares[0][i] / (2 if s.teacher == "a" else 1))
        assert plain[1][i] < plain[0][i] or len(doubled) == len(samples), "without it, all others pay for them"


def with_lists(s: TrainSample, topk: bool, targets: bool) -> TrainSample:
    """The sample with two tokens of the teacher's and two of the student's per position, of which one is the same."""
    base = np.asarray(s.completion_ids)[:, None]
    fields: dict[str, Any] = {}
    if topk:
        fields |= {
            "topk_ids": base + np.asarray([1, 2]),
            "topk_logprobs": (-base - np.asarray([0.1, 0.2])).astype(np.float16),
        }
    if targets:
        fields |= {"target_ids": base + np.asarray([2, 3]), "target_logprobs": -base - np.asarray([0.2, 0.3])}
    return replace(s, **fields)


@pytest.mark.parametrize(("topk", "targets"), [(True, False), (False, True), (True, True), (False, False)])
def test_collate_takes_the_support_that_the_samples_carry(topk: bool, targets: bool) -> None:
    samples = [with_lists(sample(0, 2, 3, mask=[1, 0, 1]), topk, targets), with_lists(sample(1, 1, 2), topk, targets)]
    batch = collate(samples, [1, 0], [1.0, 1.0])
    if not topk and not targets:
        assert batch.topk_ids is batch.topk_logprobs is batch.topk_mask is None
        return
    assert batch.topk_ids is not None
    assert batch.topk_logprobs is not None
    assert (batch.topk_ids.dtype, batch.topk_logprobs.dtype) == (np.int64, np.float32)
    assert (batch.topk_mask is not None) == (topk and targets)
    offsets = sorted({1, 2} if not targets else {2, 3} if not topk else {1, 2, 3})
    for row, token in enumerate(batch.ids):
        taken = slice(None) if batch.topk_mask is None else batch.topk_mask[row]
        found = dict(zip(batch.topk_ids[row][taken] - token, batch.topk_logprobs[row][taken], strict=True))
        assert sorted(found) == offsets
        np.testing.assert_allclose([found[o] for o in offsets], [-token - o / 10 for o in offsets], rtol=1e-3)


def test_a_sample_with_a_wrong_length_is_refused() -> None:
    good = sample(7, 2, 3)
    fields = {name: getattr(good, name) for name in good.__dataclass_fields__}
    with pytest.raises(WireError, match="sample 7/0: 2 rows of teacher_logprobs for 3 tokens"):
        TrainSample(**{**fields, "teacher_logprobs": good.teacher_logprobs[:2]})
    with pytest.raises(WireError, match="0 prompt"):
        TrainSample(**{**fields, "prompt_ids": good.prompt_ids[:0]})


def test_a_head_of_the_wrong_type_or_size_is_refused() -> None:
    weight = np.zeros((4, 2), dtype=np.float32)
    with pytest.raises(WireError, match="bfloat16 as numpy float32"):
        TeacherHead("ab", weight, "bfloat16", None, 4, 1.0, 0.0)
    with pytest.raises(WireError, match="vocabulary of 5"):
        TeacherHead("ab", weight, "float32", None, 5, 1.0, 0.0)
