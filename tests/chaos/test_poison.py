"""A sample that ends every process which touches it: the job goes on without it, and says so."""

from __future__ import annotations

import pytest

from stillhouse.client.client import Client
from stillhouse.core.queue.streams import MAX_DELIVERIES
from stillhouse.trainer.journal import read_step
from tests.chaos.harness import Chaos, job

POISON = "9/1"
STEPS = 5


@pytest.mark.full
@pytest.mark.timeout(400)
@pytest.mark.parametrize(("point", "action"), [("sampler.sampled", "kill"), ("teacher.scoring", "raise")])
def test_a_poisoned_sample_is_given_up_and_counted(chaos: Chaos, point: str, action: str, chaos_seed: int) -> None:
    chaos.arm(point, action, match=POISON, times=MAX_DELIVERIES + 1)
    name = f"poison-{point}-{action}-{chaos_seed}"
    job_id = chaos.submit(job(name, steps=STEPS, max_failed_fraction=0.5))
    record = chaos.ended(job_id, 240)
    assert record.status == "succeeded", record.error
    ends = {
        score.rollout.sample_id: score.failed
        for step in range(STEPS)
        for score in read_step(journal(chaos, job_id, step)).scores
        if score.WhichOneof("result") == "failed"
    }
    # a group is claimed as a whole: its other sample may not have been handed over either
    assert {POISON} <= set(ends) <= {POISON, "9/0"}, "samples that were with it in a batch are not given up"
    assert {failed.reason for failed in ends.values()} == {"exhausted"}
    assert ends[POISON].attempts == MAX_DELIVERIES + 1
    assert record.usage["failed_samples"] == len(ends)
    with Client(chaos.url, chaos.api_key) as client:
        letters = {letter["id"]: letter for letter in client.jobs.dead_letters(job_id)}
        lines = list(client.jobs.logs(job_id, tail=5000))
    assert letters.keys() == ends.keys()
    assert (letters[POISON]["reason"], letters[POISON]["step"]) == ("exhausted", 4)
    poisoned = point.partition(".")[0]  # others may have nothing to say on the job
    assert {line.service for line in lines} >= {"trainer", poisoned}
    crashes = [line.data["exception"] for line in lines if line.message == "service crashed"]
    assert len(crashes) == (MAX_DELIVERIES if action == "raise" else 0), "one that is killed has no last words"
    assert all("Traceback" in crash and "InjectedError" in crash for crash in crashes)
    assert chaos.violations(job_id) == []


def journal(chaos: Chaos, job_id: str, step: int):
    artifacts = chaos.job(job_id)
    paths = [artifacts.journal(epoch, step) for epoch in range(1, artifacts.highest_epoch() + 1)]
    return [path for path in paths if path.is_file()][-1]
