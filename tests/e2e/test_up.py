"""`stillhouse up` for real: all services as processes, a job through all of them, kills, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from openai import OpenAI

from stillhouse import Client
from tests.conftest import ROOT
from tests.e2e.deployment import Stillhouse, wait_until
from tests.tiny import make_tiny_model

pytestmark = pytest.mark.timeout(300)
ROLES = ("gateway", "sampler", "teacher", "trainer", "valkey")


@pytest.fixture(scope="module")
def stillhouse(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stillhouse]:
    """A running deployment; at the end `down` must leave nothing."""
    command = Stillhouse(tmp_path_factory.mktemp("up") / "home")
    try:
        assert "Stillhouse is up: http://127.0.0.1:" in command("up", "--detach", "--port", "0", "--threads", "1")
        yield command
        assert "stopping 5 processes" in command("down")
        assert command.processes() == []
        assert "nothing is running" in command("down")
        assert "nothing is running" in command("ps")
    finally:
        for line in command.processes():
            os.kill(int(line.split()[0]), signal.SIGKILL)


def test_every_service_runs_and_is_known(stillhouse: Stillhouse) -> None:
    rows = stillhouse.services()
    assert sorted(row["role"] for row in rows.values()) == list(ROLES)
    for row in rows.values():
        assert row["pid"]
        assert row["address"].startswith("127.0.0.1:")
        assert row["memory_bytes"] > 1 << 20
    assert rows["sampler-0"]["state"] == "idle"


def test_secrets_are_private_and_in_no_command_line(stillhouse: Stillhouse) -> None:
    client = json.loads((stillhouse.home / "client.json").read_text())
    files = [stillhouse.home / "client.json", stillhouse.home / "api-keys.json"]
    files += [stillhouse.home / "run" / name for name in ("internal-token", "valkey-password", "valkey.conf")]
    for file in files:
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    assert stat.S_IMODE(stillhouse.home.stat().st_mode) == 0o700
    secrets = [
        client["api_key"],
        *((stillhouse.home / "run" / n).read_text() for n in ("internal-token", "valkey-password")),
    ]
    for row in stillhouse.services().values():
        visible = Path(f"/proc/{row['pid']}/cmdline").read_bytes() + Path(f"/proc/{row['pid']}/environ").read_bytes()
        for secret in secrets:
            assert secret.encode() not in visible, f"{row['instance']} shows a secret"


def test_a_second_up_is_refused_and_changes_nothing(stillhouse: Stillhouse) -> None:
    before = {name: row["pid"] for name, row in stillhouse.services().items()}
    message = stillhouse("up", "--detach", code=3)
    assert "already running in" in message
    assert str(stillhouse.home) in message
    assert {name: row["pid"] for name, row in stillhouse.services().items()} == before


def test_killed_services_come_back(stillhouse: Stillhouse) -> None:
    before = stillhouse.services()
    for name in ("sampler-0", "valkey"):
        os.kill(before[name]["pid"], signal.SIGKILL)

    def is_back() -> bool:
        rows = stillhouse.services()
        return (
            all(
                rows[name]["restarts"] == before[name]["restarts"] + 1
                and rows[name]["pid"] not in (None, before[name]["pid"])
                for name in ("sampler-0", "valkey")
            )
            and rows["sampler-0"]["state"] == "idle"
        )

    wait_until(is_back, "sampler and queue server to come back")
    after = stillhouse.services()
    for name in ("gateway-0", "teacher-0", "trainer-0"):
        assert after[name]["pid"] == before[name]["pid"], f"{name} lives through it"


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="parent-death signals are Linux's")
def test_nothing_outlives_a_killed_supervisor(tmp_path: Path) -> None:
    command = Stillhouse(tmp_path / "home")
    command("up", "--detach", "--port", "0", "--threads", "1")
    os.kill(json.loads(command("ps", "--json"))["pid"], signal.SIGKILL)
    assert "nothing is running" in command("ps")
    wait_until(lambda: command.processes() == [], "the services and the queue server to follow")


def check_logs(stillhouse: Stillhouse, job_id: str) -> None:
    """Every line of every service is JSON and says whose it is; a request is found again at the job that it made."""
    lines = []
    for role in ("gateway", "sampler", "teacher", "trainer"):
        text = (stillhouse.home / "logs" / f"{role}-0.log").read_text()
        own = [json.loads(line) for line in text.splitlines() if line]
        assert all(line["instance"] == f"{role}-0" and line["event"] and line["timestamp"] for line in own)
        assert [line for line in own if line.get("job_id") == job_id], f"{role} names no job"
        lines += own
    accepted = next(line for line in lines if line["event"] == "job accepted" and line["job_id"] == job_id)
    request = next(
        line for line in lines if line["event"] == "request" and line["request_id"] == accepted["request_id"]
    )
    assert (request["path"], request["status"]) == ("/v1/jobs", 201)
    assert [line for line in lines if line["event"] == "weights pulled" and "group" in line]
    text = json.dumps(lines)
    for secret in (stillhouse.home / "run" / "internal-token", stillhouse.home / "run" / "valkey-password"):
        assert secret.read_text().strip() not in text
    assert json.loads((stillhouse.home / "client.json").read_text())["api_key"] not in text
    assert "job accepted" in stillhouse("logs", job_id)


def test_a_job_runs_from_submit_to_download(stillhouse: Stillhouse, tmp_path: Path) -> None:
    for seed, name in enumerate(("student", "teacher")):
        stillhouse("models", "add", name, str(make_tiny_model(tmp_path / name, seed=seed)))
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Say {n}"}) + "\n" for n in range(8)))
    job = {
        "name": "tiny",
        "student": {"model": "student"},
        "teachers": {"main": {"model": "teacher"}},
        "stages": [
            {
                "data": {"path": "prompts.jsonl"},
                "sampling": {"max_tokens": 12},
                "loss": {"objective": "policy_gradient"},
                "optimizer": {"lr": 1e-3},
                "schedule": {"steps": 3, "prompts_per_step": 2, "group_size": 2},
            }
        ],
    }
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(job))
    shown = stillhouse("submit", str(file), "--watch").splitlines()
    job_id = next(line.split()[0] for line in shown if line.startswith("job_"))
    assert "uploaded prompts.jsonl: 8 rows" in shown[0]
    assert [line.split()[1] for line in shown if line.startswith("step ")] == ["1/3", "2/3", "3/3"]
    assert any(line.startswith("succeeded after 3 steps") for line in shown)
    assert stillhouse("watch", job_id, "--json").splitlines()[-1].startswith('{"type": "status"')
    check_logs(stillhouse, job_id)
    assert job_id in stillhouse("jobs")
    assert json.loads(stillhouse("job", job_id, "--json"))["status"] == "succeeded"
    assert "job." in stillhouse("events", job_id)
    stillhouse("plot", job_id, "-o", str(tmp_path / "curves.png"))
    assert (tmp_path / "curves.png").stat().st_size > 20_000
    stillhouse("download", job_id, "-o", str(tmp_path / "result"))
    assert (tmp_path / "result" / "model.safetensors").is_file()
    stillhouse("models", "add", "student-v2", str(tmp_path / "result"))
    assert "error: " in stillhouse("cancel", job_id, code=1)
    (tmp_path / "texts.jsonl").write_text(json.dumps("a text") + "\n" + json.dumps({"token_ids": [5, 6, 7]}) + "\n")
    answers = stillhouse("score", "teacher", "--file", str(tmp_path / "texts.jsonl"), "--top-k", "2", "--json")
    assert [len(json.loads(line)["top_logprobs"]) for line in answers.splitlines()] == [5, 2]
    assert "perplexity" in stillhouse("score", "student-v2", "--prompt", "Say", "--text", " one")


@pytest.mark.full
def test_the_python_client_takes_a_job_to_its_end(stillhouse: Stillhouse, tmp_path: Path) -> None:
    """What the quickstart does, from Python: while its events are read the gateway dies, and so does a download."""
    for seed, name in enumerate(("py-student", "py-teacher")):
        stillhouse("models", "add", name, str(make_tiny_model(tmp_path / name, seed=seed)))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Say {n}"}) + "\n" for n in range(8)))
    gateway = stillhouse.services()["gateway-0"]["pid"]
    entrance = json.loads((stillhouse.home / "client.json").read_text())
    with Client(entrance["url"], entrance["api_key"]) as client:
        data = {"file": client.files.upload(prompts).id}
        spec = {
            "name": "python",
            "student": {"model": "py-student"},
            "teachers": {"main": {"model": "py-teacher"}},
            "stages": [
                {
                    "data": data,
                    "sampling": {"max_tokens": 12},
                    "loss": {"objective": "full_vocabulary"},
                    "schedule": {"steps": 3, "prompts_per_step": 2},
                }
            ],
            "evaluation": {"data": {"rows": [{"prompt": "Speak"}]}, "max_tokens": 12},
            "checkpoint": {"every_steps": 1},
        }
        found = client.jobs.validate(spec)
        assert [check.message for check in found.checks if check.verdict == "error"] == []
        job = client.jobs.create(spec)
        events = []
        for event in client.jobs.stream_events(job.id):
            events.append(event)
            if len(events) == 2:
                os.kill(gateway, signal.SIGKILL)
        assert events == list(client.jobs.events(job.id)), "each once, in order"
        assert len({event.id for event in events}) == len(events)
        told: list[str] = []
        job = client.jobs.wait(job.id, on_event=lambda event: told.append(event.id), timeout_s=60)
        assert (job.status, told) == ("succeeded", [event.id for event in events])
        assert [point.step for point in client.jobs.metrics(job.id)] == [1, 2, 3]
        assert [one["step"] for one in client.jobs.evaluations(job.id)] == [0, 3]
        sample = client.jobs.samples(job.id, step=1, limit=1)[0]
        assert sample.completion == "".join(token.text for token in sample.tokens)
        kinds = [one.kind for one in client.jobs.checkpoints(job.id)]
        assert kinds[-1] == "export"
        assert "checkpoint" in kinds
        assert client.jobs.report(job.id).to_dict()
        assert "<html" in client.jobs.report_html(job.id)

        def interrupt(done: int, _: int | None) -> None:
            raise KeyboardInterrupt

        target = tmp_path / "student-v2"
        with pytest.raises(KeyboardInterrupt):
            client.jobs.download(job.id, target, on_progress=interrupt)
        come = (tmp_path / ".student-v2.part").stat().st_size
        progress: list[int] = []
        client.jobs.download(job.id, target, on_progress=lambda done, _: progress.append(done))
        assert progress[0] > come > 0
        assert (target / "model.safetensors").is_file()
        assert not list(tmp_path.glob(".student-v2*"))


@pytest.mark.full
def test_openais_client_takes_a_job_to_its_end(stillhouse: Stillhouse, tmp_path: Path) -> None:
    """The quickstart's prompts, toy models; a second job is cancelled while it runs."""
    for seed, name in enumerate(("oa-student", "oa-teacher")):
        stillhouse("models", "add", name, str(make_tiny_model(tmp_path / name, seed=seed)))
    entrance = json.loads((stillhouse.home / "client.json").read_text())
    distillation = {"teacher": "oa-teacher", "sampling": {"max_tokens": 8}, "checkpoint": {"every_steps": 1}}
    with OpenAI(base_url=f"{entrance['url']}/v1", api_key=entrance["api_key"]) as client:
        jobs = client.fine_tuning.jobs
        with (ROOT / "examples/quickstart/prompts.jsonl").open("rb") as prompts:
            file = client.files.create(file=prompts, purpose="fine-tune")

        def create(steps: int) -> str:
            method: Any = {"type": "distillation"}
            method["distillation"] = {**distillation, "schedule": {"steps": steps, "prompts_per_step": 2}}
            return jobs.create(model="oa-student", training_file=file.id, method=method).id

        def status_of(job_id: str) -> str:
            return str(jobs.retrieve(job_id).status)

        long = create(10_000)
        wait_until(lambda: status_of(long) == "running", "the long job to run")
        jobs.cancel(long)
        wait_until(lambda: status_of(long) == "cancelled", "the long job to be cancelled")
        short = create(3)
        seen: list[str] = []

        def follow() -> bool:
            after = {"after": seen[-1]} if seen else {}
            page = jobs.list_events(short, extra_query={"order": "asc", **after})
            seen.extend(event.id for event in page.data)
            return any(cast(Any, event.data).get("status") in ("succeeded", "failed") for event in page.data)

        wait_until(follow, "the last event")
        assert seen == [event.id for event in jobs.list_events(short)][::-1], "each once, in order"
        job = jobs.retrieve(short)
        assert (job.status, job.fine_tuned_model, job.error) == ("succeeded", short, None)
        assert (job.trained_tokens or 0) > 0
        checkpoints = list(jobs.checkpoints.list(short))
        assert [one.step_number for one in checkpoints] == [3, 2, 1][: len(checkpoints)], "newest first"
        assert checkpoints[0].metrics.train_loss is not None
    with Client(entrance["url"], entrance["api_key"]) as ours:
        assert ours.generate(short, "Hello", max_tokens=4).data[0].num_tokens > 0
