"""Laws of group-normalised rewards."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from stillhouse.trainer.outcome import group_advantages

FORMS: Any = ("std", "mean")
rewards = st.lists(st.floats(-100, 100).map(lambda reward: round(reward, 3)), min_size=2, max_size=12).map(np.array)


@pytest.mark.parametrize("form", FORMS)
@given(group=rewards)
def test_a_group_adds_up_to_nothing_and_keeps_its_order(form: Any, group: np.ndarray) -> None:
    advantages = group_advantages(group, form)
    assert abs(advantages.sum()) < 1e-9 * max(1.0, np.abs(group).max()) * len(group)
    assert (np.diff(advantages[np.argsort(group, kind="stable")]) >= 0).all()


@given(group=rewards, scale=st.floats(0.01, 100), shift=st.floats(-50, 50))
def test_std_has_deviation_one_and_knows_no_scale_and_no_offset(group: np.ndarray, scale: float, shift: float) -> None:
    assume(np.ptp(group) > 1e-2)
    advantages = group_advantages(group, "std")
    assert np.sqrt((advantages**2).mean()) == pytest.approx(1.0)
    np.testing.assert_allclose(group_advantages(scale * group + shift, "std"), advantages, atol=1e-6)


@given(group=rewards, scale=st.floats(0.01, 100))
def test_mean_keeps_the_size_of_the_rewards(group: np.ndarray, scale: float) -> None:
    np.testing.assert_allclose(
        group_advantages(scale * group, "mean"), scale * group_advantages(group, "mean"), atol=1e-6 * scale
    )


@pytest.mark.parametrize("form", FORMS)
@given(group=rewards, seed=st.integers(0, 2**31))
def test_the_order_of_the_samples_changes_nothing(form: Any, group: np.ndarray, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(group))
    np.testing.assert_allclose(group_advantages(group[order], form), group_advantages(group, form)[order], atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "group", [[], [0.7], [0.1] * 3, [1e30] * 2, [0.1 + 0.2, 0.3], [np.nan, 4.0], [np.nan] * 2], ids=str
)
def test_equal_rewards_say_nothing(form: Any, group: list[float]) -> None:
    """0.1 + 0.2 differs from 0.3 by rounding: divided by its standard deviation it would be +-1."""
    assert (group_advantages(np.array(group), form) == np.zeros(len(group))).all()


@pytest.mark.parametrize("form", FORMS)
@given(group=rewards, place=st.integers(0, 11))
def test_a_sample_without_a_reward_is_left_out(form: Any, group: np.ndarray, place: int) -> None:
    place = min(place, len(group))
    with_gap = group_advantages(np.insert(group, place, np.nan), form)
    assert with_gap[place] == 0
    np.testing.assert_array_equal(np.delete(with_gap, place), group_advantages(group, form))


def test_the_numbers_of_a_small_group() -> None:
    np.testing.assert_allclose(group_advantages(np.array([1.0, 0.0, 0.0, 0.0]), "mean"), [0.75, -0.25, -0.25, -0.25])
    np.testing.assert_allclose(
        group_advantages(np.array([1.0, 0.0, 0.0, 0.0]), "std"), np.array([3.0, -1.0, -1.0, -1.0]) / np.sqrt(3)
    )
