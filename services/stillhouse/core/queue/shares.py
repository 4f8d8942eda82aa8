"""How the samplers are shared out: how many each job may lease, computed alike by every trainer from what all ask for.

    1. jobs that have begun keep their `min`
    2. then those that wait get theirs, all or nothing, by priority and time of waiting; for one that has to wait longer
       nobody behind it is let past, so a job that wants many is not starved by a stream of small ones
    3. what is left goes to the jobs of the highest priority, evenly, up to their `max`; then to the next

So whoever holds more than its share gives it back as soon as another one asks, and nobody holds a part of what it waits
for. No sampler is left idle while a job that has begun can use it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Want:
    """What one job asks for."""

    job_id: str
    at_least: int
    at_most: int
    priority: int
    has_begun: bool
    """It has had `at_least`."""
    since: float
    """Unix time when it began to ask."""


def shares(wants: Iterable[Want], number: int) -> dict[str, int]:
    """Samplers by job id; `number` = samplers that are there."""
    ranked = sorted(wants, key=lambda want: (not want.has_begun, -want.priority, want.since, want.job_id))
    share = dict.fromkeys((want.job_id for want in ranked), 0)
    left, is_blocked = number, False
    for want in ranked:
        if want.has_begun:
            share[want.job_id] = min(want.at_least, left)
        elif want.at_least <= left and not is_blocked:
            share[want.job_id] = want.at_least
        else:  # one that asks for more than there are blocks nobody
            is_blocked |= want.at_least <= number
        left -= share[want.job_id]
    served = [want for want in ranked if share[want.job_id] >= want.at_least]
    for want in sorted(served, key=lambda want: -want.priority):
        level = [other for other in served if other.priority == want.priority]
        while left and (open_ := [other for other in level if share[other.job_id] < other.at_most]):
            poorest = min(open_, key=lambda other: share[other.job_id])
            share[poorest.job_id] += 1
            left -= 1
    return share
