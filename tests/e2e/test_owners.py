"""Two owners, two trainers, one teacher: jobs run at once, share what they need, and rest when they are told to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from stillhouse import Client, NotFoundError
from stillhouse.core.queue import keys
from stillhouse.trainer.journal import read_step
from tests.chaos.harness import Chaos, deployment, job, until

STEPS = 16
FAIR = 3.0
"""While both jobs run, one has at most so many times the tokens of the other scored; they are of one size."""


@pytest.mark.full
@pytest.mark.timeout(240)
def test_jobs_of_two_owners_share_a_teacher_and_a_pause_outlives_a_kill(tmp_path: Path) -> None:
    with deployment(tmp_path, teachers=1) as chaos, Client(chaos.url, chaos.api_key) as admin:
        alice, bob = (Client(chaos.url, admin.keys.create(name).key) for name in ("alice", "bob"))
        with alice, bob:
            check_shares(chaos, alice, bob)
            check_pause(chaos, alice)


def check_shares(chaos: Chaos, alice: Client, bob: Client) -> None:
    """Both jobs run at the same time and have about as much scored; the teacher's model is loaded once."""
    ids = [client.jobs.create(job(name, steps=STEPS)).id for name, client in (("a", alice), ("b", bob))]
    records = [chaos.ended(job_id, 120) for job_id in ids]
    assert [(record.status, record.owner) for record in records] == [("succeeded", "alice"), ("succeeded", "bob")]
    assert records[0].trainer != records[1].trainer
    assert [chaos.violations(job_id) for job_id in ids] == [[], []]
    with pytest.raises(NotFoundError):
        bob.jobs.get(ids[0])
    assert [found.id for found in bob.jobs.list()] == [ids[1]]

    steps = [scored(chaos, job_id) for job_id in ids]
    first, last = max(at[0][0] for at in steps), min(at[-1][0] for at in steps)
    tokens = [sum(number for at, number in each if first <= at <= last) for each in steps]
    print(f"scored tokens while both ran: {tokens}")
    assert min(tokens) > 0, f"they ran one after the other: {steps}"
    assert max(tokens) <= FAIR * min(tokens), f"scored tokens while both ran: {tokens}"
    assert loads(chaos) == 1


def scored(chaos: Chaos, job_id: str) -> list[tuple[float, int]]:
    """(unix time, completion tokens that the teacher had scored) of each step."""
    found = [read_step(chaos.job(job_id).journal(1, step)) for step in range(STEPS)]
    return [
        (each.header.written_at, sum(score.rollout.completion_ids.shape[0] for score in each.scores)) for each in found
    ]


def loads(chaos: Chaos) -> float:
    """Models that the one teacher process has loaded for jobs."""
    address: Any = chaos.redis.hget(keys.service("teacher", "teacher-0"), "metrics_address")
    lines = httpx.get(f"http://{address.decode()}/metrics", trust_env=False).raise_for_status().text.splitlines()
    name = "stillhouse_teacher_job_loads_total{"
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


def check_pause(chaos: Chaos, alice: Client) -> None:
    """The trainer is killed in the middle of a pause: the job rests anyway, and goes on when it is resumed."""
    chaos.arm("trainer.stopping", "kill", match="paused")
    job_id = alice.jobs.create(job("rests", steps=STEPS)).id
    until(lambda: (record := chaos.record(job_id)) and record.step >= 2, "two steps")
    assert alice.jobs.pause(job_id).status == "pausing"
    until(lambda: chaos.taken("trainer.stopping"), "the trainer to be killed")
    until(lambda: (record := chaos.record(job_id)) and record.status == "paused", "the job to be paused", 30)
    chaos.wait_ready(sampler=2, trainer=2)
    record = chaos.record(job_id)
    assert record is not None
    assert record.status == "paused", "a free trainer leaves it alone"
    alice.jobs.resume(job_id)
    assert chaos.ended(job_id, 120).status == "succeeded"
    assert chaos.violations(job_id) == []
