"""A trainer of two processes: one is killed, the job goes on; then it goes on with one process; nothing is left."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from stillhouse.core.models import ModelRegistry, inspect_model
from tests.cluster import job_spec
from tests.e2e.deployment import Stillhouse, wait_until
from tests.tiny import make_tiny_model

pytestmark = [pytest.mark.full, pytest.mark.timeout(300)]
STEPS = 60


def test_a_job_survives_a_rank_and_another_number_of_ranks(tmp_path: Path) -> None:
    command = Stillhouse(tmp_path / "home")
    try:
        command("up", "--detach", "--port", "0", "--threads", "1", "--trainer-ranks", "2")
        job_id = submit(command, tmp_path)
        wait_until(lambda: step(command, job_id) >= 5, "a few steps on two ranks")
        assert command.services()["trainer-0"]["memory_bytes"] > 2 * 100 << 20, "both ranks count"
        os.kill(follower(command), signal.SIGKILL)
        wait_until(lambda: restarts(command) == 1, "the trainer to be started again")
        reached = step(command, job_id)
        wait_until(lambda: step(command, job_id) > reached, "the job to go on")
        command("down")
        assert command.processes() == []
        assert 5 < step_on_disk(command, job_id) < STEPS, "it is in the middle of the job"
        assert [path.name for path in parts(command, job_id)] == [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]

        command("up", "--detach", "--port", "0", "--threads", "1")
        wait_until(lambda: job(command, job_id)["status"] == "succeeded", "the job to end on one rank", 120)
        assert [path.name for path in parts(command, job_id)] == ["model.safetensors"]
        command("verify", job_id)
        command("download", job_id, "-o", str(tmp_path / "result"))
        command("down")
        assert command.processes() == []
    finally:
        for line in command.processes():
            os.kill(int(line.split()[0]), signal.SIGKILL)


def submit(command: Stillhouse, folder: Path) -> str:
    models = ModelRegistry(command.home / "models.yaml")
    for seed, name in enumerate(("student", "teacher")):
        models.add(inspect_model(name, make_tiny_model(folder / name, seed=seed)))
    spec = job_spec(
        stages__0__loss={"objective": "full_vocabulary"},
        stages__0__schedule={"steps": STEPS, "prompts_per_step": 3, "max_staleness": 1, "micro_batch_tokens": 64},
        checkpoint={"every_steps": 2},
    )
    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump(spec))
    return command("submit", str(file)).split()[0]


def job(command: Stillhouse, job_id: str) -> dict[str, Any]:
    return command.get(f"/v1/jobs/{job_id}")


def restarts(command: Stillhouse) -> int:
    services = json.loads((command.home / "run" / "state.json").read_text())["services"]
    return next(service["restarts"] for service in services if service["role"] == "trainer")


def step(command: Stillhouse, job_id: str) -> int:
    return job(command, job_id)["progress"]["step"]


def manifests(command: Stillhouse, job_id: str) -> list[Path]:
    """Checkpoints of the newest epoch that has some, oldest first."""
    found = (command.home / "artifacts" / "jobs" / job_id / "epochs").glob("*/manifests/0*")
    return sorted(found, key=lambda path: (int(path.parts[-3]), path.name))


def parts(command: Stillhouse, job_id: str) -> list[Path]:
    return sorted(manifests(command, job_id)[-1].glob("model*.safetensors"))


def step_on_disk(command: Stillhouse, job_id: str) -> int:
    return int(manifests(command, job_id)[-1].name[:8])


def follower(command: Stillhouse) -> int:
    """The pid of rank 1."""
    pids = [int(line.split()[0]) for line in command.processes()]
    return next(pid for pid in pids if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes())
