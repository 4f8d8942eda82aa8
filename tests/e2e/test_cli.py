"""The quickstart's flow typed by a user, from `up` to `down`, on toy models."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.cluster import job_spec
from tests.e2e.deployment import Stillhouse, wait_until
from tests.tiny import make_tiny_model

pytestmark = [pytest.mark.full, pytest.mark.timeout(400)]


@pytest.fixture
def stillhouse(tmp_path: Path) -> Iterator[Stillhouse]:
    command = Stillhouse(tmp_path / "home")
    try:
        command("up", "--detach", "--port", "0", "--threads", "1")
        yield command
        command("down")
    finally:
        for line in command.processes():
            os.kill(int(line.split()[0]), signal.SIGKILL)


def write_job(folder: Path, **changes: object) -> str:
    spec = job_spec(**{"name": "toy", "stages__0__loss": {"objective": "policy_gradient"}, **changes})
    words = {"prompts": ("one", "two", "three"), "heldout": ("four", "five")}
    for name, row in words.items():
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps({'prompt': f'say {word}'})}\n" for word in row))
    spec["stages"][0]["data"] = {"path": "prompts.jsonl"}
    spec["evaluation"] = {"data": {"path": "heldout.jsonl"}, "max_tokens": 8}
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(spec))
    return str(path)


def test_a_user_distils_looks_compares_talks_and_takes_the_student_home(stillhouse: Stillhouse, tmp_path: Path) -> None:
    for name, seed in (("student", 1), ("teacher", 2)):
        stillhouse("models", "add", name, str(make_tiny_model(tmp_path / name, seed=seed)))
    job_file = write_job(tmp_path)
    assert "in order:" in stillhouse("validate", job_file)
    watched = stillhouse("submit", job_file, "--watch")
    assert "step 4/4" in watched
    (job,) = set(re.findall(r"job_[a-z0-9]+", watched))
    slower = write_job(tmp_path, stages__0__optimizer__lr=5e-4, stages__0__schedule__steps=40)
    other = json.loads(stillhouse("submit", slower, "--json"))["id"]
    stillhouse("pause", other)
    wait_until(lambda: stillhouse.get(f"/v1/jobs/{other}")["status"] == "paused", "the pause")
    stillhouse("resume", other)
    stillhouse("watch", other)
    assert "nats/token" in stillhouse("samples", job, "--step", "4")
    assert "stages.0.optimizer.lr" in stillhouse("compare", job, other)
    assert "teacher" in stillhouse("chat", job, "-m", "say one", "--max-tokens", "8", "--temperature", "0")
    stillhouse("plot", job, other, "-o", str(tmp_path / "curves.png"))
    stillhouse("download", job, "-o", str(tmp_path / "student-v2"))
    assert "added student-v2" in stillhouse("models", "add", "student-v2", str(tmp_path / "student-v2"))
    assert job in stillhouse("jobs", "--status", "succeeded")
