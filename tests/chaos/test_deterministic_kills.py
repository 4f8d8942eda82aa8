"""`deterministic: true` under kill -9 of real processes: the killed run equals the run without, bit for bit."""

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
from stillhouse.core.failpoints import ENVIRONMENT
from tests.chaos.equality import assert_same, everything
from tests.chaos.test_deterministic import spec
from tests.chaos.test_deterministic_stages import spec as two_stages
from tests.e2e.deployment import Stillhouse, wait_until
from tests.tiny import make_tiny_model

pytestmark = [pytest.mark.full, pytest.mark.timeout(540)]

KILLS: list[list[tuple[str, int]]] = [
    [("trainer.mid_backward", 3)],
    [("trainer.committing", 0)],
    [("sampler.generating", 20)],
    [("teacher.scored", 7)],
    [("sampler.generating", 31), ("trainer.stepped", 4), ("teacher.handed_over", 3)],
]
"""(point, visits to pass before) of each run."""


@pytest.fixture
def stillhouse(tmp_path: Path) -> Iterator[Stillhouse]:
    command = Stillhouse(tmp_path / "home")
    command.env |= {"STILLHOUSE_LEASE_S": "3", ENVIRONMENT: str(tmp_path / "failpoints")}
    (tmp_path / "failpoints").mkdir()
    try:
        command("up", "--detach", "--port", "0", "--threads", "1", "--samplers", "2", "--trainers", "2")
        yield command
        command("down")
    finally:
        for line in command.processes():
            os.kill(int(line.split()[0]), signal.SIGKILL)


def run(
    stillhouse: Stillhouse, job_file: Path, kills: list[tuple[str, int]], patience_s: float = 120
) -> tuple[dict[str, Any], int]:
    """(what the run left, number of claims)."""
    folder = Path(stillhouse.env[ENVIRONMENT])
    for point, skip in kills:
        (folder / f"{point}.hit").unlink(missing_ok=True)
        (folder / f"{point}.armed").write_text(json.dumps({"action": "kill", "skip": skip}))
    job_id = stillhouse("submit", str(job_file)).split()[0]

    def ended() -> dict[str, Any] | None:
        job = stillhouse.get(f"/v1/jobs/{job_id}")
        return job if job["is_terminal"] else None

    job = wait_until(ended, f"{job_id} to end under {kills}", patience_s)
    assert job["status"] == "succeeded", f"{job['error']}\n{stillhouse.logs()}"
    for point, _ in kills:
        assert (folder / f"{point}.hit").is_file(), f"{point} was never reached"
    return everything(JobArtifacts(stillhouse.home / "artifacts" / "jobs" / job_id)), job["epoch"]


def test_killed_runs_equal_the_run_without(stillhouse: Stillhouse, tmp_path: Path) -> None:
    for seed, name in enumerate(("student", "teacher")):
        stillhouse("models", "add", name, str(make_tiny_model(tmp_path / name, seed=seed)))
    job_file = tmp_path / "job.yaml"
    job_file.write_text(yaml.safe_dump(spec()))
    expected, claims = run(stillhouse, job_file, [])
    assert claims == 1
    for kills in KILLS:
        found, claims = run(stillhouse, job_file, kills)
        assert_same(found, expected)
        assert claims == 1 + sum(point.startswith("trainer.") for point, _ in kills)


def test_a_job_of_two_stages_killed_in_each_and_between_equals_the_run_without(
    stillhouse: Stillhouse, tmp_path: Path
) -> None:
    """Trainers die in the first stage, when it has ended, and in the second."""
    for seed, name in enumerate(("student", "teacher")):
        stillhouse("models", "add", name, str(make_tiny_model(tmp_path / name, seed=seed)))
    job_file = tmp_path / "job.yaml"
    job_file.write_text(yaml.safe_dump(two_stages()))
    expected, _ = run(stillhouse, job_file, [])
    # visits are counted in each process: the first journals two steps, the second two, the third those of its stage
    kills = [("trainer.mid_backward", 1), ("trainer.stage_ended", 0), ("trainer.journalled", 3)]
    found, claims = run(stillhouse, job_file, kills, patience_s=240)
    assert_same(found, expected)
    assert claims == 1 + len(kills)
