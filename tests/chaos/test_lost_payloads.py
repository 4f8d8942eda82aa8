"""A teacher dies with hidden states that nobody fetched: they are computed again, and every sample trains once."""

from __future__ import annotations

import os
import signal

import pytest

from stillhouse.core.queue import keys
from stillhouse.trainer.journal import read_step
from stillhouse.v1 import rollout_pb2
from tests.chaos.harness import Chaos, job, until

STEPS = 6
LOST = 3
"""Payloads at least that are gone."""


@pytest.mark.full
@pytest.mark.timeout(300)
def test_unfetched_hidden_states_of_a_killed_teacher_are_scored_again(chaos: Chaos, chaos_seed: int) -> None:
    """The trainer stands still where it takes its first score, so that all payloads stay with the teachers."""
    chaos.wait_ready(teacher=2)
    chaos.arm("trainer.score_taken", "stop")
    job_id = chaos.submit(job(f"lost-{chaos_seed}", steps=STEPS, objective="full_vocabulary"))
    trainer = until(lambda: chaos.taken("trainer.score_taken"), "the trainer to stand still")["pid"]
    held = until(lambda: len(found := waiting(chaos, job_id)) >= LOST and found, "scores with payloads")
    for name in {score.teacher_instance for score in held}:
        chaos.kill(name)
    os.kill(trainer, signal.SIGCONT)
    record = chaos.ended(job_id, 120)
    assert record.status == "succeeded", record.error
    assert record.usage["failed_samples"] == 0
    assert chaos.violations(job_id) == [], "every sample once"
    # a trainer that stood still for longer than its lease has a successor, which plans anew
    assert record.epoch > 1 or any(score.rollout.attempt for score in journalled(chaos, job_id))


def waiting(chaos: Chaos, job_id: str) -> list[rollout_pb2.Score]:
    """Scores on the queue whose payload a teacher holds."""
    record = chaos.record(job_id)
    entries = chaos.redis.xrange(keys.scored(job_id, record.epoch)) if record else []
    scores = [rollout_pb2.Score.FromString(fields[b"p"]) for _, fields in entries]  # type: ignore[union-attr]
    return [score for score in scores if score.WhichOneof("result") == "hidden"]


def journalled(chaos: Chaos, job_id: str) -> list[rollout_pb2.Score]:
    artifacts = chaos.job(job_id)
    paths = [artifacts.journal(1, step) for step in range(STEPS)]
    return [score for path in paths if path.is_file() for score in read_step(path).scores]
