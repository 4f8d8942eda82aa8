"""Frozen services: the job says why it stands still, the supervisor restarts the guilty one, the job succeeds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from stillhouse.core.models import ModelRegistry, inspect_model
from tests.cluster import job_spec
from tests.e2e.deployment import Stillhouse, wait_until
from tests.runbook import failures, says
from tests.tiny import make_tiny_model

pytestmark = pytest.mark.timeout(400)
STALLED_S = 15.0
"""The promise: a job says `stalled` within this time of the freeze."""
ENDED_S = 60.0
"""The promise: the guilty one is restarted and the (short) job succeeds within this time of the freeze."""
ANSWER_S = 45.0
"""Every command gives up within this time: 20 s of the gateway or 30 s of the client, and a Python that starts."""


class Watched(Stillhouse):
    """A deployment whose REST interface is asked directly: often, and with a deadline."""

    def open(self, *options: str) -> None:
        self("up", "--detach", "--port", "0", "--threads", "1", *options)
        client = json.loads((self.home / "client.json").read_text())
        self.http = httpx.Client(
            base_url=client["url"],
            headers={"Authorization": f"Bearer {client['api_key']}"},
            timeout=25,
            trust_env=False,
        )
        models = ModelRegistry(self.home / "models.yaml")
        for seed, name in enumerate(("student", "teacher")):
            models.add(inspect_model(name, make_tiny_model(self.home / "made" / name, seed=seed)))

    def submit(self, steps: int) -> str:
        spec = job_spec(
            stages__0__schedule={"steps": steps, "prompts_per_step": 3, "max_staleness": 1},
            checkpoint={"every_steps": 10},
        )
        file = self.home / "job.yaml"
        file.write_text(yaml.safe_dump(spec))
        return self("submit", str(file)).split()[0]

    def job(self, job_id: str) -> dict[str, Any]:
        return self.http.get(f"/v1/jobs/{job_id}").raise_for_status().json()

    def runs(self, job_id: str) -> str:
        """The job, once it has made some steps."""
        wait_until(lambda: self.job(job_id)["progress"]["step"] >= 3, "a few steps", 90)
        return job_id

    def freeze(self, name: str) -> tuple[int, float]:
        """Stop a service; its pid, and when that was."""
        pid = self.restarts()[name][0]
        os.kill(pid, signal.SIGSTOP)
        return pid, time.monotonic()

    def restarts(self) -> dict[str, tuple[int, int]]:
        """(pid, restarts) by name."""
        state = json.loads((self.home / "run" / "state.json").read_text())
        return {service["name"]: (service["pid"], service["restarts"]) for service in state["services"]}

    def waits(self, job_id: str, since: float) -> tuple[str, str, float]:
        """(status, reason, seconds since then) once the job says what it waits for."""

        def has_reason() -> dict[str, Any] | None:
            job = self.job(job_id)
            assert not job["is_terminal"], f"it should have stalled: {job['status']}, {job['error']}"
            return job if job["status_reason"] else None

        job = wait_until(has_reason, "the job to say what it waits for")
        anchor = job["status_reason"].replace("_", "-")
        if anchor in ("no-sampler", "no-teacher"):  # docs/runbook.md quotes them
            assert says(job["status_message"], failures()[anchor].words("stillhouse job JOB")[0]), job
        return job["status"], job["status_reason"], time.monotonic() - since


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    yield from opened(Watched(tmp_path_factory.mktemp("stalls") / "home"))


@pytest.fixture
def unguarded(tmp_path: Path) -> Iterator[Watched]:
    """Its supervisor kills nothing."""
    yield from opened(Watched(tmp_path / "home"), "--hang", "0")


def opened(command: Watched, *options: str) -> Iterator[Watched]:
    try:
        command.open(*options)
        yield command
        command("down")
        assert command.processes() == []
    finally:
        for line in command.processes():
            os.kill(int(line.split()[0]), signal.SIGKILL)


def test_a_job_says_that_its_teacher_is_silent_and_goes_on_when_it_wakes_up(unguarded: Watched) -> None:
    job_id = unguarded.runs(unguarded.submit(steps=20))
    pid, frozen_at = unguarded.freeze("teacher-0")
    status, reason, seconds = unguarded.waits(job_id, frozen_at)
    os.kill(pid, signal.SIGCONT)
    assert (status, reason, seconds <= STALLED_S) == ("stalled", "no_teacher", True), seconds
    wait_until(lambda: unguarded.job(job_id)["is_terminal"], "the job to end")
    job = unguarded.job(job_id)
    assert (job["status"], job["status_reason"]) == ("succeeded", ""), unguarded.logs()


@pytest.mark.full
@pytest.mark.parametrize(
    ("victim", "reason", "when"),
    [
        ("sampler-0", "no_sampler", "while it runs"),
        ("teacher-0", "no_teacher", "while it runs"),
        ("trainer-0", "no_trainer", "while it runs"),
        ("sampler-0", "no_sampler", "before the job comes"),
        ("trainer-0", "no_trainer", "before the job comes"),
    ],
)
def test_a_frozen_service_stalls_the_job_and_is_restarted(made: Watched, victim: str, reason: str, when: str) -> None:
    before = made.restarts()
    if when == "while it runs":
        job_id = made.runs(made.submit(steps=40))
        _, frozen_at = made.freeze(victim)
    else:
        _, frozen_at = made.freeze(victim)
        job_id = made.submit(steps=10)
    status, found, seconds = made.waits(job_id, frozen_at)
    # a job that no trainer ever had is not stalled: it is queued, and says why
    expected = "queued" if (victim, when) == ("trainer-0", "before the job comes") else "stalled"
    assert (status, found, seconds <= STALLED_S) == (expected, reason, True), seconds
    succeeds(made, job_id, victim, before, frozen_at, f"{when}: {status} after {seconds:.1f} s")


@pytest.mark.full
@pytest.mark.parametrize("victim", ["gateway-0", "valkey"])
def test_nobody_hangs_when_the_gateway_or_the_queue_server_is_frozen(made: Watched, victim: str) -> None:
    before = made.restarts()
    job_id = made.runs(made.submit(steps=150))
    _, frozen_at = made.freeze(victim)
    asked = subprocess.run(
        [sys.executable, "-m", "stillhouse.cli.main", "job", job_id],
        env=made.env,
        capture_output=True,
        text=True,
        timeout=ANSWER_S,
        check=False,
    )
    answer_s = time.monotonic() - frozen_at
    assert asked.returncode in (0, 1, 4), asked.stderr
    assert "Traceback" not in asked.stderr
    succeeds(made, job_id, victim, before, frozen_at, f"`job` answered {asked.returncode} after {answer_s:.1f} s")


def succeeds(
    made: Watched, job_id: str, victim: str, before: dict[str, tuple[int, int]], frozen_at: float, said: str
) -> None:
    """The job succeeds in time, and the victim alone was restarted, once."""

    def is_over() -> bool:
        try:
            return made.job(job_id)["is_terminal"]
        except httpx.HTTPError:  # the gateway or its queue server is being restarted
            return False

    wait_until(is_over, "the job to end", ENDED_S + 30)
    seconds = time.monotonic() - frozen_at
    print(f"{victim} frozen: {said}, job over after {seconds:.1f} s")
    job = made.job(job_id)
    assert job["status"] == "succeeded", f"{job['error']}\n{made.logs()}"
    assert seconds <= ENDED_S
    after = made.restarts()
    assert {name for name in after if after[name] != before[name]} == {victim}
    assert after[victim][1] == before[victim][1] + 1
    assert f"{victim} gave no sign of life" in (made.home / "logs" / "supervisor.log").read_text()
