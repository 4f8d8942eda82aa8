"""docs/runbook.md, followed: each failure is provoked on real processes, looked at with the page's commands, which must
show the page's words, and cured as the page says.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from stillhouse.core.keys import create_key, remove_key
from stillhouse.core.models import ModelRegistry, inspect_model
from stillhouse.core.queue import keys
from tests.chaos.harness import Chaos, deployment, job, until
from tests.cli_kit import Shell
from tests.runbook import failures, says
from tests.tiny import SPECIAL_TOKENS, make_tiny_model

pytestmark = [pytest.mark.full, pytest.mark.timeout(300)]
LONG = 3000
"""Steps of a job that does not end by itself."""


class Runbook:
    """A deployment, and somebody who has the page."""

    def __init__(self, chaos: Chaos, folder: Path) -> None:
        self.chaos, self.folder = chaos, folder
        self.shell = Shell(chaos.home, chaos.url, chaos.api_key)
        self._number = 0

    def job(self, **changes: Any) -> dict[str, Any]:
        """A job, also as the file job.yaml."""
        self._number += 1
        spec = job(f"runbook-{self._number}", **changes)
        (self.folder / "job.yaml").write_text(json.dumps(spec))
        return spec

    @contextmanager
    def running(self) -> Iterator[str]:
        """A job that has made a step; at the end it is cancelled."""
        job_id = self.chaos.submit(self.job(steps=LONG))
        try:
            until(lambda: (record := self.chaos.record(job_id)) and record.step >= 1, "a step")
            yield job_id
        finally:
            self.chaos.cancel(job_id)
            self.chaos.ended(job_id)

    def says(self, job_id: str, reason: str) -> None:
        """Wait until the job has a reason."""
        until(lambda: (record := self.chaos.record(job_id)) and record.status_reason == reason, f"reason '{reason}'")

    def goes_on(self, job_id: str) -> None:
        """Wait until it has made another step."""
        before = self.chaos.record(job_id)
        assert before is not None
        until(lambda: (record := self.chaos.record(job_id)) and record.step > before.step, "another step")

    def look(self, anchor: str, job_id: str = "", only: str = "", **env: str) -> None:
        """Every symptom of a section (those whose first column begins with `only`) is seen with its command."""
        seen = [(look, words) for look, words in failures()[anchor].symptoms if look.startswith(only)]
        assert seen, f"{anchor} has no symptom '{only}'"
        said = {look: self._show(look, job_id, env) for look in dict(seen)}
        for look, words in seen:
            assert says(said[look], words), f"{anchor}: '{look}' does not say '{words}' but:\n{said[look]}"

    def _show(self, look: str, job_id: str, env: dict[str, str]) -> str:
        if look.startswith("HOME/"):
            return (self.chaos.home / look.removeprefix("HOME/")).read_text()
        return self._stillhouse(look.partition(" with a ")[0], job_id, env, code=None)

    def cure(self, anchor: str, job_id: str = "") -> None:
        """Every command under Cure; each must succeed."""
        assert failures()[anchor].cure, f"{anchor} has no cure"
        for line in failures()[anchor].cure:
            if line.startswith("valkey-cli "):
                self.chaos.redis.execute_command(*shlex.split(line)[1:])
            else:
                self._stillhouse(line, job_id, {}, code=0)

    def _stillhouse(self, line: str, job_id: str, env: dict[str, str], code: int | None) -> str:
        command, *arguments = shlex.split(line.replace("JOB", job_id).replace("NAME", "cured"))
        assert command == "stillhouse", line
        here = [str(self.folder / word) if word.endswith(".yaml") else word for word in arguments]
        said = self.shell(*here, code=code, env={"COLUMNS": "400", **env})
        return said.out + said.err

    def model(self, name: str, seed: int = 1, **changes: float) -> None:
        """Register a damaged teacher: `nan` = the input embedding of "~", `head` = a factor of the output head."""
        folder = make_tiny_model(self.folder / name, seed=seed, tie=False)
        tensors = {key: value.copy() for key, value in load_file(folder / "model.safetensors").items()}
        if "nan" in changes:
            vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
            assert vocabulary["~"] >= len(SPECIAL_TOKENS)
            tensors["model.embed_tokens.weight"][vocabulary["~"]] = np.nan
        tensors["lm_head.weight"] *= np.float32(changes.get("head", 1.0))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        ModelRegistry(self.chaos.home / "models.yaml").add(inspect_model(name, folder))


@pytest.fixture(scope="module")
def runbook(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runbook]:
    folder = tmp_path_factory.mktemp("runbook")
    with deployment(folder, samplers=1, teachers=1, trainers=1) as chaos:
        yield Runbook(chaos, folder)


def test_first_look_and_a_queue_server_that_is_full(runbook: Runbook) -> None:
    with runbook.running() as job_id:
        runbook.chaos.redis.config_set("maxmemory", "1")
        runbook.says(job_id, "queue_full")
        runbook.look("queue-server-full", job_id)
        runbook.cure("queue-server-full", job_id)
        runbook.goes_on(job_id)
        runbook.cure("first-look", job_id)


def test_a_queue_server_that_fails_over_and_forgets(runbook: Runbook) -> None:
    with runbook.running() as job_id:
        runbook.chaos.redis.execute_command("replicaof", "127.0.0.1", "1")
        runbook.look("queue-server-down", only="stillhouse submit")
        runbook.cure("queue-server-down", job_id)
        runbook.goes_on(job_id)
        runbook.chaos.redis.flushall()
        until(lambda: runbook.chaos.record(job_id), "the job to be rebuilt")
        runbook.look("queue-server-down", job_id, only="stillhouse events")
        until(lambda: (record := runbook.chaos.record(job_id)) and record.status == "running", "it to run")


def test_a_full_disk(runbook: Runbook) -> None:
    with runbook.running() as job_id:
        runbook.chaos.arm("disk.written", "no_space", match=".journal", times=100)
        runbook.says(job_id, "no_space")
        runbook.look("disk-full", job_id)
        runbook.chaos.disarm()
        runbook.cure("disk-full", job_id)
        runbook.goes_on(job_id)


def test_a_killed_trainer_and_a_damaged_checkpoint(runbook: Runbook) -> None:
    chaos = runbook.chaos
    with runbook.running() as job_id:
        until(lambda: (record := chaos.record(job_id)) and record.committed_step >= 4, "checkpoints")
        pid = chaos.kill("trainer-0", signal.SIGSTOP)
        runbook.says(job_id, "no_trainer")
        newest = max(chaos.job(job_id).root.rglob("manifests/*/model.safetensors"), key=lambda path: path.parent.name)
        content = bytearray(newest.read_bytes())
        content[len(content) // 2] ^= 1
        newest.write_bytes(content)
        os.kill(pid, signal.SIGKILL)
        until(
            lambda: (record := chaos.record(job_id)) and (record.epoch, record.status) == (2, "running"), "a takeover"
        )
        runbook.look("no-trainer", job_id)
        runbook.look("damaged-files", job_id)
        runbook.cure("no-trainer", job_id)
        runbook.cure("damaged-files", job_id)


def test_dead_letters(runbook: Runbook) -> None:
    runbook.model("nan-teacher", nan=1)
    rows = [{"prompt": f"say {word}"} for word in ("one", "two", "three", "four", "~")]
    changes = {"steps": 4, "teachers": {"main": {"model": "nan-teacher"}}, "stages__0__data": {"rows": rows}}
    job_id = runbook.chaos.submit(runbook.job(**changes))
    assert runbook.chaos.ended(job_id).status == "failed"
    runbook.look("dead-letters", job_id)
    runbook.job(**changes, max_failed_fraction=0.5)
    runbook.cure("dead-letters", job_id)
    assert newest(runbook) == "succeeded"


def test_bad_steps(runbook: Runbook) -> None:
    runbook.model("huge-teacher", head=1e20)
    job_id = runbook.chaos.submit(runbook.job(steps=5, teachers={"main": {"model": "huge-teacher"}}))
    assert runbook.chaos.ended(job_id).status == "failed"
    runbook.look("bad-steps", job_id)
    runbook.job(steps=2)
    runbook.cure("bad-steps", job_id)
    assert newest(runbook) == "succeeded"


def newest(runbook: Runbook) -> str:
    """How the job ends that was submitted last."""
    [found] = runbook.shell("jobs", "--limit", "1", "--json").json()
    return runbook.chaos.ended(found["id"]).status


def test_refused_before_training(runbook: Runbook) -> None:
    runbook.job(teachers={"main": {"model": "unknown"}})
    runbook.look("refused-before-training", only="stillhouse submit")
    other = make_tiny_model(runbook.folder / "other", seed=3)
    document = json.loads((other / "tokenizer.json").read_text())
    vocabulary = document["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(document))
    ModelRegistry(runbook.chaos.home / "models.yaml").add(inspect_model("other", other))
    spec = runbook.job(teachers={"main": {"model": "other"}})
    (runbook.folder / "other-tokenizer.yaml").write_text(json.dumps(spec))
    runbook.look("refused-before-training", only="stillhouse validate")
    runbook.job()
    runbook.cure("refused-before-training")


def test_keys_and_limits(runbook: Runbook) -> None:
    path = runbook.chaos.home / "api-keys.json"
    runbook.job(steps=LONG)

    def look(row: str, key: str) -> None:
        runbook.look("keys-and-limits", only=row, STILLHOUSE_URL=runbook.chaos.url, STILLHOUSE_API_KEY=key)

    look("stillhouse jobs with a wrong", "stillhouse_wrong")
    look("stillhouse submit job.yaml with a read", create_key(path, "reader", scopes=["read"]))
    small = create_key(path, "small", limits={"active_jobs": 1})
    env = {"STILLHOUSE_URL": runbook.chaos.url, "STILLHOUSE_API_KEY": small}
    job_id = runbook.shell("submit", str(runbook.folder / "job.yaml"), env=env).out.split()[0]
    look("stillhouse submit job.yaml with a small", small)
    runbook.cure("keys-and-limits")
    runbook.chaos.cancel(job_id)
    runbook.chaos.ended(job_id)
    for name in ("reader", "small", "cured"):
        remove_key(path, name)


def test_an_internal_token_that_is_another(runbook: Runbook) -> None:
    chaos = runbook.chaos
    (runbook.folder / "wrong").write_text("x" * 40)
    own = {"STILLHOUSE_INTERNAL_TOKEN_FILE": str(runbook.folder / "wrong")}
    pid = chaos.kill("sampler-0", signal.SIGSTOP)  # the job has the other one alone
    with sampler(runbook, "sampler-9", own):
        until(lambda: registered(chaos) == ["sampler-9"], "sampler-9 to announce itself", 120)
        job_id = chaos.submit(runbook.job(steps=1))
        runbook.says(job_id, "no_student")
        runbook.look("internal-token", job_id, only="stillhouse")
    os.kill(pid, signal.SIGCONT)
    assert chaos.ended(job_id).status == "succeeded"


def registered(chaos: Chaos) -> list[str]:
    """Samplers that the deployment knows."""
    found: Any = chaos.redis.keys(keys.service("sampler", "*"))
    return [key.decode().rpartition(":")[2] for key in found]


@contextmanager
def sampler(runbook: Runbook, name: str, token: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Another sampler of the deployment, with a token of its own; at the end it is stopped."""
    environ = Path(f"/proc/{runbook.chaos.pids()['sampler-0']}/environ").read_bytes().decode().split("\0")
    env = dict(entry.split("=", 1) for entry in environ if entry) | {"STILLHOUSE_INSTANCE": name}
    env.pop("STILLHOUSE_INTERNAL_TOKEN_FILE")
    with (runbook.chaos.home / "logs" / f"{name}.log").open("wb") as log:
        command = [sys.executable, "-m", "stillhouse.sampler"]
        process = subprocess.Popen(command, env=env | token, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield process
        finally:
            process.kill()
            process.wait()
