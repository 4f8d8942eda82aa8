"""Random kill -9 of any process while jobs run."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.chaos.harness import Chaos, clock, job, until

MEAN_GAP_S = 3.0
"""Exponential gaps: some kills come while the last one is not dealt with."""
PAIR_SHARE = 0.2
"""Share of the kills that hit a second process in the same moment."""
ROLES = ("gateway", "sampler", "teacher", "trainer", "valkey")
JOBS = 2
"""Jobs that run at once."""


@dataclass
class Kills:
    """What a series of kills did."""

    seed: int
    victims: list[str] = field(default_factory=list)
    jobs: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    epochs: int = 0
    seconds: float = 0.0

    def text(self) -> str:
        by_role = Counter(victim.partition("-")[0] for victim in self.victims)
        return (
            f"random kills: {len(self.victims)} ({dict(sorted(by_role.items()))}), {len(self.jobs)} jobs in "
            f"{self.epochs} epochs, {len(self.violations)} violations, {self.seconds:.0f} s, seed {self.seed}"
        )


def random_kills(chaos: Chaos, number: int, seed: int, *, mean_gap_s: float = MEAN_GAP_S, steps: int = 30) -> Kills:
    """Kill `number` processes, roles in shuffled rounds, while jobs run; all of them must succeed."""
    draw = random.Random(f"{seed}/kills")
    kills, roles, started = Kills(seed), shuffled_rounds(draw), time.monotonic()
    while len(kills.victims) < number:
        _keep_busy(chaos, kills, draw, steps)
        until(clock(draw.expovariate(1 / mean_gap_s)), "the next kill", 60)
        for _ in range(2 if draw.random() < PAIR_SHARE else 1):
            if len(kills.victims) < number:
                victim = draw.choice(_living(chaos, next(roles)))
                chaos.kill(victim, signal.SIGKILL)
                kills.victims.append(victim)
    for job_id in kills.jobs:
        record = chaos.ended(job_id, 180)
        kills.epochs += record.epoch
        if record.status != "succeeded":
            kills.violations.append(f"{job_id} ended '{record.status}': {record.error}")
        kills.violations += [f"{job_id}: {violation}" for violation in chaos.violations(job_id)]
    kills.seconds = time.monotonic() - started
    return kills


def _living(chaos: Chaos, role: str) -> list[str]:
    return until(lambda: sorted(chaos.pids(role)), f"a {role} to kill")


def shuffled_rounds(draw: random.Random) -> Iterator[str]:
    """Every role once in each round, in a random order, for ever."""
    while True:
        yield from draw.sample(ROLES, len(ROLES))


def _keep_busy(chaos: Chaos, kills: Kills, draw: random.Random, steps: int) -> None:
    """Submit jobs until `JOBS` run."""
    running = sum(not ((record := chaos.record(job_id)) and record.is_terminal) for job_id in kills.jobs)
    for _ in range(JOBS - running):
        objective = draw.choice(("full_vocabulary", "policy_gradient"))
        name = f"kills-{kills.seed}-{len(kills.jobs)}"
        kills.jobs.append(chaos.submit(job(name, objective=objective, steps=steps, every_steps=4)))
