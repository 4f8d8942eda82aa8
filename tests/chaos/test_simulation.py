"""The simulation: real queue, loop and commit classes under faults from a seed, judged by the oracle.

See tests/chaos/sim/world.py for what is real and what is not. More seeds: `python -m tests.chaos.sim --seeds 0:10000`.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterable
from typing import Final

import pytest

from stillhouse.core.failpoints import POINTS
from tests.chaos.sim.run import Verdict, simulate

FIRST_SEED: Final = 100_000
NUM_SEEDS: Final = 100
NEVER: Final = {"gateway.job_put_aside", "trainer.evaluated", "trainer.stop_recorded"}
"""Nobody deletes a job here (tests/unit/test_gateway_deleting.py), and toys are not measured (test_evaluations.py)."""
RARE: Final = {"teacher.draining", "sampler.draining", "gateway.cancel_requested", "trainer.stopping"}
"""Points that need a SIGTERM or a cancel at the right moment; the longer test reaches them, too."""
DRAINING: Final = (106_620, 108_364)
"""Seeds in which a teacher is told to stop between two batches: one in a thousand."""


class Runs:
    """What many seeds showed together."""

    def __init__(self, seeds: Iterable[int]) -> None:
        self.failures: list[str] = []
        self.visits: Counter[str] = Counter()
        self.kills: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.num_takeovers = 0
        for seed in seeds:
            self._add(simulate(seed))
            if seed % 25 == 0:
                gc.collect()

    def _add(self, verdict: Verdict) -> None:
        self.failures += [f"seed {verdict.seed}: {violation}" for violation in verdict.violations]
        self.visits.update(verdict.visits)
        self.kills.update(verdict.kills)
        self.faults.update(fault.partition(" ")[0] for fault in verdict.facts["faults"])
        self.num_takeovers += any(int(text.rpartition(" ")[2]) > 1 for text in verdict.facts["jobs"].values())


@pytest.mark.timeout(240)
def test_no_promise_is_broken() -> None:
    runs = Runs(range(FIRST_SEED, FIRST_SEED + NUM_SEEDS))
    print(f"seeds {FIRST_SEED}..{FIRST_SEED + NUM_SEEDS - 1}: kills {dict(runs.kills)}, faults {dict(runs.faults)}")
    assert runs.failures == []
    assert POINTS.keys() - runs.visits.keys() <= RARE | NEVER
    # a run without trouble would prove little
    assert all(runs.kills[role] > NUM_SEEDS / 10 for role in ("trainer", "sampler", "teacher", "gateway"))
    assert len(runs.faults) >= 10
    assert runs.num_takeovers > NUM_SEEDS / 5


@pytest.mark.full
@pytest.mark.timeout(600)
def test_no_promise_is_broken_in_many_runs() -> None:
    runs = Runs((*range(FIRST_SEED + NUM_SEEDS, FIRST_SEED + NUM_SEEDS + 400), *DRAINING))
    assert runs.failures == []
    assert POINTS.keys() - NEVER == runs.visits.keys()


@pytest.mark.parametrize("seed", [0, 5, 9, 17])
def test_a_seed_is_one_history(seed: int) -> None:
    """Everything follows from the seed: every command, call, file and fault, in order and to the microsecond."""
    first, second = simulate(seed), simulate(seed)
    assert first.trace == second.trace
    assert first.facts["jobs"] == second.facts["jobs"]
    assert simulate(seed + 1).trace != first.trace
