"""A job goes on while its services die: kill -9 of each, in turn, of real processes."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from stillhouse.core.blobs import JobArtifacts
from stillhouse.trainer.journal import read_step
from tests.cluster import job_spec
from tests.e2e.deployment import Stillhouse, wait_until
from tests.tiny import make_tiny_model

pytestmark = pytest.mark.timeout(300)
STEPS = 60
PROMPTS_PER_STEP = 3


@pytest.fixture
def stillhouse(tmp_path: Path) -> Iterator[Stillhouse]:
    command = Stillhouse(tmp_path / "home")
    command.env["STILLHOUSE_LEASE_S"] = "4"
    try:
        command("up", "--detach", "--port", "0", "--threads", "1", "--samplers", "2")
        yield command
        command("down")
        assert command.processes() == []
    finally:
        for line in command.processes():
            os.kill(int(line.split()[0]), signal.SIGKILL)


def submit(stillhouse: Stillhouse, folder: Path) -> str:
    for seed, name in enumerate(("student", "teacher")):
        stillhouse("models", "add", name, str(make_tiny_model(folder / name, seed=seed)))
    spec = job_spec(
        stages__0__schedule={"steps": STEPS, "prompts_per_step": PROMPTS_PER_STEP, "max_staleness": 1},
        stages__0__optimizer__lr=1e-4,
        checkpoint={"every_steps": 10},
    )
    (folder / "job.yaml").write_text(yaml.safe_dump(spec))
    return stillhouse("submit", str(folder / "job.yaml")).split()[0]


def get(stillhouse: Stillhouse, job_id: str) -> dict[str, Any]:
    return json.loads(stillhouse("job", job_id, "--json"))


def test_every_service_may_die_and_the_job_ends_right(stillhouse: Stillhouse, tmp_path: Path) -> None:
    job_id = submit(stillhouse, tmp_path)
    for at_step, victim in ((4, "sampler-0"), (14, "teacher-0"), (24, "trainer-0"), (34, "valkey"), (44, "gateway-0")):
        wait_until(
            lambda at_step=at_step: get(stillhouse, job_id)["progress"]["step"] >= at_step, f"step {at_step}", 120
        )
        os.kill(stillhouse.services()[victim]["pid"], signal.SIGKILL)

    wait_until(lambda: get(stillhouse, job_id)["is_terminal"], "the job to end", 150)
    job = get(stillhouse, job_id)
    assert job["status"] == "succeeded", f"{job['error']}\n{stillhouse.logs()}"
    assert job["progress"]["step"] == STEPS
    assert job["epoch"] >= 2, "the trainer died, so another claim finished the job"
    assert all(row["restarts"] for row in stillhouse.services().values() if row["instance"] != "sampler-1")

    artifacts = JobArtifacts(stillhouse.home / "artifacts" / "jobs" / job_id)
    trained: list[str] = []
    for step in range(STEPS):
        epochs = [epoch for epoch in range(1, job["epoch"] + 1) if artifacts.journal(epoch, step).exists()]
        rollouts = [score.rollout for score in read_step(artifacts.journal(epochs[-1], step)).scores]
        assert all(step - span.policy_version <= 1 for rollout in rollouts for span in rollout.spans)
        trained += [rollout.sample_id for rollout in rollouts]
    assert sorted(trained) == sorted(f"{group}/0" for group in range(STEPS * PROMPTS_PER_STEP))
