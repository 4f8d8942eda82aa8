"""The failing control: every seeded bug is planted in the simulation, and the simulation finds it for what it is.

A clean run of the simulation proves as much as these tests say. What a planted bug breaks by crashing counts for
nothing: a rule of the oracle, a job that does not end, or the truth that the toy learner remembers must show it.
"""

from __future__ import annotations

import re
from typing import Final

import pytest

from tests.chaos.bugs import BUGS
from tests.chaos.sim.plants import PLANTS
from tests.chaos.sim.run import simulate

MOST_SEEDS: Final = 150
"""A bug must show within so many runs."""
FIRST_SEEDS: Final = {"stage_lost_at_restore": 290}
"""Where to begin to look, other than at 0: a death exactly between two stages is rare."""
SHOWN_BY: Final[dict[str, str]] = {
    "ack_before_result": "^hang",
    "train_before_journal": r"\[(trained|journal)\]",
    "skip_fsync": r"^(jobs|hang)|\[(spec|journal|checkpoint|lineage|trained|success|final|retention)\]",
    "trim_streams": "^hang",
    "no_fencing": r"^fence|\[(success|status|final|lineage|retention)\]",
    "no_version_check": r"\[(staleness|spans)\]",
    "cursor_last_yielded": r"\[prefix\]",
    "reseed_after_restore": r"\[seed\]",
    "keep_nan": r"\[(values|non_finite)\]",
    "early_cleanup": r"\[retention\]",
    "no_dedup": r"\[duplicate\]",
    "group_at_dollar": "^hang",
    "silent_exit": r"\[success\]",
    "swallowed_error": r"\[reason\]",
    "replay_twice": r"\[ledger\]|^truth",
    "out_of_order": r"\[prefix\]",
    "stage_not_drained": r"\[stage\]",
    "stage_lost_at_restore": r"\[stage\]|^truth",
    "wrong_teachers": r"\[teachers\]",
}
"""Bug -> the violation that shows it."""


def test_every_bug_is_planted() -> None:
    assert PLANTS.keys() == BUGS.keys() == SHOWN_BY.keys()


@pytest.mark.parametrize("bug", BUGS)
def test_the_simulation_finds(bug: str) -> None:
    first = FIRST_SEEDS.get(bug, 0)
    for seed in range(first, first + MOST_SEEDS):
        for violation in simulate(seed, PLANTS[bug]).violations:
            if re.search(SHOWN_BY[bug], violation):
                print(f"{bug}: seed {seed}: {violation[:200]}")
                assert simulate(seed).violations == [], f"seed {seed} fails without the bug, too"
                return
    pytest.fail(f"{MOST_SEEDS} runs with '{bug}' look healthy: {BUGS[bug]}")
