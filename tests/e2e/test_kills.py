"""Jobs go on while their services die: ten times kill -9, of real processes of every kind."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from stillhouse.trainer.journal import read_step
from tests.chaos.harness import Chaos, deployment
from tests.chaos.kills import random_kills

KILLS = 10
STEPS = 30
SAMPLES_PER_STEP = 6


@pytest.mark.timeout(300)
def test_ten_kills_cost_no_sample_and_no_step(tmp_path: Path) -> None:
    """Each kind of process dies twice. CHAOS_SEED repeats a run, as far as the machine's timing does."""
    seed = int(os.environ.get("CHAOS_SEED") or random.SystemRandom().randrange(10**6))
    print(f"CHAOS_SEED={seed}")
    with deployment(tmp_path) as chaos:
        kills = random_kills(chaos, KILLS, seed, mean_gap_s=2.0, steps=STEPS)
        print(kills.text())
        assert kills.violations == [], f"seed {seed}: {kills.violations}"
        assert len(kills.victims) == KILLS
        for job_id in kills.jobs:  # once more without the oracle: who says that it looked at all?
            assert sorted(trained(chaos, job_id)) == sorted(
                f"{n // 2}/{n % 2}" for n in range(STEPS * SAMPLES_PER_STEP)
            )


def trained(chaos: Chaos, job_id: str) -> list[str]:
    """Samples of the last journal of every step; none is older than the bound."""
    artifacts, found = chaos.job(job_id), []
    for step in range(STEPS):
        paths = [artifacts.journal(epoch, step) for epoch in range(1, artifacts.highest_epoch() + 1)]
        rollouts = [score.rollout for score in read_step([path for path in paths if path.is_file()][-1]).scores]
        assert all(step - span.policy_version <= 1 for rollout in rollouts for span in rollout.spans)
        found += [rollout.sample_id for rollout in rollouts]
    return found
