"""How samplers are shared out between jobs: laws over many random situations, and the rules one by one."""

from __future__ import annotations

import random

import pytest

from stillhouse.core.queue.shares import Want, shares


def want(job_id: str, at_least: int = 1, at_most: int = 64, priority: int = 0, *, has_begun: bool = True) -> Want:
    return Want(job_id, at_least, at_most, priority, has_begun, since=float(ord(job_id[0])))


def waiting(job_id: str, at_least: int = 1, at_most: int = 64, priority: int = 0) -> Want:
    return want(job_id, at_least, at_most, priority, has_begun=False)


@pytest.mark.parametrize(
    ("wants", "number", "expected"),
    [
        ([want("a")], 4, {"a": 4}),
        ([want("a"), waiting("b")], 4, {"a": 2, "b": 2}),
        ([want("a"), waiting("b")], 1, {"a": 1, "b": 0}),
        ([want("a", 2), want("b", 2)], 3, {"a": 2, "b": 1}),
        ([want("a", at_most=1), want("b")], 4, {"a": 1, "b": 3}),
        ([want("a"), want("b", priority=1)], 4, {"a": 1, "b": 3}),
        ([want("a", 3), waiting("b", priority=9)], 3, {"a": 3, "b": 0}),
        ([waiting("a", 2), waiting("b", 2)], 3, {"a": 3, "b": 0}),
        ([waiting("a"), waiting("b", priority=1)], 1, {"a": 0, "b": 1}),
        ([want("a"), waiting("b", 4), waiting("c")], 4, {"a": 4, "b": 0, "c": 0}),
        ([want("a"), waiting("b", 9), waiting("c")], 4, {"a": 2, "b": 0, "c": 2}),
    ],
    ids=[
        "alone: all",
        "equals: half each",
        "what runs keeps its min",
        "a lost sampler stops no job",
        "no more than max",
        "beyond min by priority",
        "no priority takes a min",
        "no part of a min",
        "the urgent one begins first",
        "who waits for many is not overtaken",
        "but for who asks for more than there are",
    ],
)
def test_shares(wants: list[Want], number: int, expected: dict[str, int]) -> None:
    assert shares(wants, number) == expected
    assert shares(wants[::-1], number) == expected, "every trainer computes the same"


def test_laws() -> None:
    draw = random.Random(20261128)
    for _ in range(3000):
        number, wants = draw.randint(0, 12), []
        for index in range(draw.randint(1, 6)):
            low = draw.randint(1, 4)
            priority, begun = draw.choice((-1, 0, 0, 1)), draw.random() < 0.6
            wants.append(want("abcdef"[index], low, low + draw.randint(0, 6), priority, has_begun=begun))
        share = shares(wants, number)
        assert sum(share.values()) <= number
        for one in wants:
            mine = share[one.job_id]
            assert mine <= one.at_most
            assert one.has_begun or mine == 0 or mine >= one.at_least, "nobody holds a part of what it waits for"
            if one.has_begun and mine >= one.at_least and mine < one.at_most:
                assert sum(share.values()) == number, "none idle while a job can use it"
            for other in wants:
                if mine <= one.at_least or other.priority < one.priority or share[other.job_id] < other.at_least:
                    continue
                is_full = share[other.job_id] == other.at_most
                bound = mine if other.priority > one.priority else mine - 1
                assert is_full or other.priority == one.priority, "beyond min the higher priority comes first"
                assert is_full or share[other.job_id] >= bound, "equals share evenly"
