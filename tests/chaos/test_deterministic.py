"""`deterministic: true`: a run with crashes equals the run without, bit for bit.

Compared are the bytes of weights, optimizer and random states, the samples (ids, tokens, log-probabilities, scores) of
every step, and the metrics without times. Crashes here are exceptions at failpoints of one process, so that many points
fit into a minute; tests/chaos/test_deterministic_kills.py does the same with kill -9.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

from stillhouse.core import failpoints
from stillhouse.core.failpoints import InjectedError
from tests.chaos.equality import assert_same, everything
from tests.cluster import Cluster, job_spec

STEPS = 8
COMMIT_EVERY = 3
SEED = 20261123


def spec(staleness: int = 1, objective: str = "full_vocabulary") -> dict[str, Any]:
    """8 steps of 3 groups over 5 rows: a pass over the data ends in the middle of step 1, 3 and 4."""
    return job_spec(
        deterministic=True,
        stages__0__loss={"objective": objective},
        stages__0__schedule={"steps": STEPS, "prompts_per_step": 3, "group_size": 2, "max_staleness": staleness},
        stages__0__optimizer__lr=1e-2,
        checkpoint={"every_steps": COMMIT_EVERY},
        evaluation={"data": {"rows": [{"prompt": "tea"}, {"prompt": "rain"}]}, "max_tokens": 6, "every_steps": 4},
    )


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    failpoints.install(None)


class CrashAt:
    """Crashes a claim at the n-th visit of a point, once for each (point, n)."""

    def __init__(self, *points: tuple[str, int]) -> None:
        self.open = list(points)
        self._visits: dict[str, int] = {}

    def __call__(self, name: str, detail: str) -> None:
        self._visits[name] = self._visits.get(name, 0) + 1
        for point in self.open:
            if point[0] == name and self._visits[name] >= point[1]:
                self.open.remove(point)
                raise InjectedError(f"{name} visit {point[1]}")


async def run(deployment: Cluster, job: dict[str, Any], crash: CrashAt | None = None) -> dict[str, Any]:
    failpoints.install(crash)
    job_id = await deployment.submit(job)
    record = await deployment.ended(job_id)
    failpoints.install(None)
    assert record.status == "succeeded", record.error
    if crash is not None:
        assert crash.open == [], "every crash happened"
        assert record.epoch > 1
    return everything(deployment.ctx.artifacts.job(job_id))


_baselines: dict[tuple[int, str], dict[str, Any]] = {}


async def baseline(deployment: Cluster, staleness: int, objective: str) -> dict[str, Any]:
    """The run without crashes, once per kind of job."""
    key = (staleness, objective)
    if key not in _baselines:
        _baselines[key] = await run(deployment, spec(staleness, objective))
    return _baselines[key]


BOUNDARIES = [
    ("trainer.journalled", 1),  # the first step
    ("trainer.stepped", 1),
    ("trainer.journalled", 2),  # a pass over the data ends in this step
    ("trainer.stepped", COMMIT_EVERY),  # before a commit
    ("trainer.committing", 1),
    ("trainer.committed", 1),
    ("trainer.journalled", COMMIT_EVERY + 1),  # after it
    ("trainer.journalled", STEPS),  # the last step
    ("trainer.stepped", STEPS),
    ("trainer.committing", 3),
    ("trainer.exported", 1),
]
POINTS = (
    "trainer.planned",
    "trainer.journalled",
    "trainer.acknowledged",
    "trainer.mid_backward",
    "trainer.stepped",
    "trainer.published",
)


def random_points(number: int) -> list[tuple[str, int]]:
    draw = random.Random(SEED)
    return [(draw.choice(POINTS), draw.randint(1, STEPS)) for _ in range(number)]


async def test_two_runs_of_a_job_are_equal(deployment: Cluster) -> None:
    assert_same(await run(deployment, spec()), await baseline(deployment, 1, "full_vocabulary"))


@pytest.mark.parametrize("point", [*BOUNDARIES[:6], *random_points(2)], ids=str)
async def test_a_crash_changes_nothing(deployment: Cluster, point: tuple[str, int]) -> None:
    expected = await baseline(deployment, 1, "full_vocabulary")
    assert_same(await run(deployment, spec(), CrashAt(point)), expected)


@pytest.mark.full
@pytest.mark.parametrize("point", [*BOUNDARIES[6:], *random_points(14)[2:]], ids=str)
async def test_a_crash_anywhere_changes_nothing(deployment: Cluster, point: tuple[str, int]) -> None:
    expected = await baseline(deployment, 1, "full_vocabulary")
    assert_same(await run(deployment, spec(), CrashAt(point)), expected)


@pytest.mark.parametrize(("staleness", "objective"), [(0, "policy_gradient"), (2, "full_vocabulary")])
async def test_three_crashes_in_one_run_change_nothing(deployment: Cluster, staleness: int, objective: str) -> None:
    expected = await baseline(deployment, staleness, objective)
    crashes = CrashAt(("trainer.stepped", 2), ("trainer.replayed", 1), ("trainer.journalled", 7))
    assert_same(await run(deployment, spec(staleness, objective), crashes), expected)
