"""Prompts drawn by share: exact over a period, close in between, each domain's rows in passes of their own."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise

import pytest

from stillhouse.core.errors import PreflightError
from stillhouse.core.oracle.stages import Rows
from stillhouse.core.spec import Row
from stillhouse.trainer.mix import Turns, draws, whole_numbers
from stillhouse.trainer.prompts import Prompt, PromptOrder

MOPD = {"math": 0.35, "code": 0.35, "tools": 0.3}
MIXES = [MOPD, {"a": 2, "b": 1}, {"only": 0.7}, {"big": 97.5, **{f"small{n}": 0.25 for n in range(10)}}]


@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_shares_are_exact_after_every_period_and_never_far_off(mix: dict[str, float]) -> None:
    turns, whole = Turns(mix), sum(mix.values())
    counts: Counter[str] = Counter()
    for number in range(4 * turns.period):
        name, earlier = turns[number]
        assert earlier == counts[name], "its rows are counted up"
        counts[name] += 1
        for domain, share in mix.items():
            assert abs(counts[domain] - (number + 1) * share / whole) < 1.5
        if (number + 1) % turns.period == 0:
            assert all(counts[domain] * whole == pytest.approx((number + 1) * share) for domain, share in mix.items())


def test_a_rare_domain_is_spread_over_its_period() -> None:
    turns = Turns(MIXES[3])
    small = [number for number in range(3 * turns.period) if turns[number][0] != "big"]
    assert max(later - earlier for earlier, later in pairwise(small)) < 2 * 1 / 0.025


def test_decimals_count_as_written() -> None:
    assert whole_numbers({"b": 0.3, "a": 0.1}) == {"a": 1, "b": 3}
    assert whole_numbers({"x": 1e-05, "y": 1}) == {"x": 1, "y": 100_000}
    assert Turns(MOPD).period == 20


def test_a_draw_does_not_depend_on_the_draws_before() -> None:
    expected = [Turns(MOPD)[number] for number in range(70)]
    asked = random.Random(0).choices(range(70), k=200)
    turns = Turns(MOPD)
    assert [turns[number] for number in asked] == [expected[number] for number in asked]


@pytest.mark.parametrize("shuffle", [True, False])
def test_each_domain_has_passes_of_its_own(shuffle: bool) -> None:
    domains = ["math"] * 7 + ["code"] * 3 + ["never"] * 5
    drawn = draws(domains, "seed", shuffle=shuffle, mix={"math": 1, "code": 1})
    rows = [drawn[number] for number in range(42)]
    for name, first, count in (("math", 0, 7), ("code", 7, 3)):
        own = [row for row in rows if domains[row] == name]
        assert len(own) == 21
        passes = [own[start : start + count] for start in range(0, 21, count)]
        assert all(sorted(turn) == list(range(first, first + count)) for turn in passes)
        assert (len({tuple(turn) for turn in passes}) > 1) == shuffle


def test_a_domain_without_rows_is_refused() -> None:
    with pytest.raises(
        PreflightError, match=r"share for 'code', and no row is routed to it; there are rows for \['a'\]"
    ):
        draws(["a", "a"], 0, shuffle=True, mix={"a": 1, "code": 2})


def prompts(domains: str) -> list[Prompt]:
    return [Prompt(Row(prompt=f"row {row}"), row, "", name, 1.0, (1,), None) for row, name in enumerate(domains)]


@pytest.mark.parametrize("per_step", [1, 8])
@pytest.mark.parametrize("mix", [{"a": 0.35, "b": 0.35, "c": 0.3}, {"c": 7, "a": 1}])
def test_the_oracle_finds_the_same_rows(mix: dict[str, float], per_step: int) -> None:
    domains = "abcab" * 10
    order = PromptOrder(prompts(domains), "7/stage", True, per_step, mix)
    found = Rows([[domain] for domain in domains], "7/stage", True, per_step, mix)
    expected = [order[group].row for group in range(400)]
    assert [found.row(group) for group in range(400)] == expected
    pools = {domains[rows[0]]: (rows, drawn) for rows, drawn in found.pools(400)}
    for name, count in Counter(domains[row] for row in expected).items():
        assert pools[name] == ([row for row, domain in enumerate(domains) if domain == name], count)


def test_a_step_holds_its_shares() -> None:
    """Sixteen prompts, of which each step takes 0.35, 0.35, 0.3: never more than one off, and right over five steps."""
    order = PromptOrder(prompts("abc" * 30), 1, True, 16, {"a": 0.35, "b": 0.35, "c": 0.3})
    steps = [Counter(order[16 * step + index].teacher for index in range(16)) for step in range(10)]
    assert all(abs(step["a"] - 5.6) < 2 and abs(step["c"] - 4.8) < 2 for step in steps)
    assert sum(steps[:5], Counter()) == sum(steps[5:], Counter()) == {"a": 28, "b": 28, "c": 24}
