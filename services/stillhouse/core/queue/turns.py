"""Whose turn it is: which of the waiting jobs a free trainer leads next.

    priority   the highest first
    share      then those of the owner who has the fewest jobs running; of several such owners, of the one whose last
               turn is the longest ago
    age        then the oldest

A job that runs is never interrupted for another one. No clock and no random choice: every trainer sees the same order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

CLAIMABLE: Final = ("queued", "validating", "starting", "running", "stalled", "resuming", "cancelling")
"""Statuses in which a trainer takes a job that nobody leads: those that a trainer before it died in are among them."""


@dataclass(frozen=True, slots=True)
class ActiveJob:
    """A job that is not finished."""

    id: str
    status: str
    owner: str
    priority: int
    is_led: bool
    """A trainer holds its lease."""
    owner_turn: int = 0
    """Number of the owner's newest claim; 0 = none yet."""


def in_turn(jobs: Sequence[ActiveJob]) -> list[str]:
    """Ids of the jobs that wait for a trainer, in the order of their turns; `jobs` come oldest first."""
    running = Counter(job.owner for job in jobs if job.is_led)
    waiting = [job for job in jobs if not job.is_led and job.status in CLAIMABLE]
    return [job.id for job in sorted(waiting, key=lambda job: (-job.priority, running[job.owner], job.owner_turn))]
