"""The union of the teacher's and the student's likeliest tokens against sets and dictionaries."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.trainer.support import union


@given(
    rows=st.integers(0, 4),
    vocab=st.integers(1, 12),
    k=st.integers(0, 12),
    s=st.integers(0, 12),
    seed=st.integers(0, 2**31),
)
def test_each_row_is_the_set_of_what_either_names(rows: int, vocab: int, k: int, s: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    k, s = min(k, vocab), min(s, vocab)
    log_q = draw.normal(size=(rows, vocab)).astype(np.float32)
    log_q[draw.random((rows, vocab)) < 0.1] = -np.inf
    named = [np.stack([draw.permutation(vocab)[:n] for _ in range(rows)] or [np.zeros(n, int)])[:rows] for n in (k, s)]
    teacher, student = (ids.astype(np.int32) for ids in named)
    support = union(
        teacher,
        np.take_along_axis(log_q, teacher.astype(np.int64), 1),
        student,
        np.take_along_axis(log_q, student.astype(np.int64), 1),
    )
    assert support.ids.shape == support.logprobs.shape == support.mask.shape == (rows, k + s)
    assert (support.ids.dtype, support.logprobs.dtype, support.mask.dtype) == (np.int64, np.float32, bool)
    for row in range(rows):
        taken = support.ids[row, support.mask[row]].tolist()
        assert len(taken) == len(set(taken)), "a token twice"
        assert set(taken) == {*teacher[row].tolist(), *student[row].tolist()}
        assert taken[:k] == teacher[row].tolist(), "the teacher's come first, in its order"
        np.testing.assert_array_equal(support.logprobs[row, support.mask[row]], log_q[row, taken])
    assert not support.ids[~support.mask].any()
    assert not support.logprobs[~support.mask].any()


def test_a_token_named_twice_by_one_side_counts_once() -> None:
    support = union(np.array([[3, 3]]), np.array([[-1.0, -1.0]]), np.array([[5, 3]]), np.array([[-2.0, -1.0]]))
    np.testing.assert_array_equal(support.mask, [[True, False, True, False]])
