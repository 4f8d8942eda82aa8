"""docs/compose.md, done: its commands in its order, on a real engine. `make test-compose`; not part of other runs.

The job that the page submits is the quickstart's, shorter; `down -v` at the end leaves nothing.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from stillhouse.core.config import Settings

ROOT: Final = Path(__file__).resolve().parents[2]
PAGE: Final = ROOT / "docs" / "compose.md"
QUICKSTART: Final = ROOT / "examples" / "quickstart"
PROFILES: Final = ("demo", "gpu", "obs", "tls")
BUILT: Final = ("gateway", "cpu", "demo")
"""Targets of the Dockerfile that can be built here."""
STEPS: Final = 8
pytestmark = [pytest.mark.compose, pytest.mark.timeout(1500)]


class Stack:
    """A compose project of its own in a copy of the tree, as a user has it."""

    def __init__(self, folder: Path, docker_config: str) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("STILLHOUSE_", "COMPOSE_"))},
            "DOCKER_CONFIG": docker_config,
            "DOCKER_BUILDKIT": "0",  # what Compose falls back to without buildx
            "COMPOSE_PROJECT_NAME": "stillhouse-test",
            "COMPOSE_PROGRESS": "plain",
            "STILLHOUSE_PORT": str(self.port),
            "STILLHOUSE_VERSION": "test",
            "DEMO_STEPS": "2",
            "JOB": "job.yaml",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }

    def run(self, command: str, *, check: bool = True, timeout_s: float = 900, **env: str) -> str:
        """A shell command in the tree; its output."""
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=self.folder,
            env={**self.environment, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        print(f"$ {command}\n{done.stdout}", flush=True)
        assert not check or done.returncode == 0, f"`{command}` ended with {done.returncode}:\n{done.stdout[-3000:]}"
        return done.stdout


@pytest.fixture(scope="module")
def docker_config() -> str:
    """Engine, plugin and base images are there. Where they cannot be, the acceptance has failed: nothing is skipped."""
    made = subprocess.run([ROOT / "tests" / "compose" / "engine.sh"], stdout=subprocess.PIPE, text=True, check=False)
    assert made.returncode == 0, "no Docker engine: compose is NOT accepted"
    return made.stdout.strip()


@pytest.fixture(scope="module")
def stack(docker_config: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("stack") / "stillhouse"
    ignored = shutil.ignore_patterns(".git", ".venv", "build", "runs", "models", "__pycache__", "*.egg-info", ".env")
    shutil.copytree(ROOT, folder, ignore=ignored)
    write_short_job(folder / "job.yaml")
    stack = Stack(folder, docker_config)
    try:
        yield stack
    finally:
        stack.run("docker compose --profile '*' down -v --remove-orphans --timeout 30", check=False)


def write_short_job(path: Path) -> None:
    """The quickstart's job with few steps."""
    spec: dict[str, Any] = yaml.safe_load((QUICKSTART / "job.yaml").read_text())
    [stage] = spec["stages"]
    stage["data"]["path"] = str(QUICKSTART / "prompts.jsonl")
    stage["schedule"]["steps"] = STEPS
    stage["schedule"]["prompts_per_step"] = 4
    stage["sampling"]["max_tokens"] = 16
    spec["evaluation"] |= {"data": {"path": str(QUICKSTART / "heldout.jsonl")}, "num_prompts": 4, "max_tokens": 8}
    spec["checkpoint"]["every_steps"] = 2
    path.write_text(yaml.safe_dump(spec))


def commands(section: str) -> str:
    """The shell blocks of a section of the page, one after the other."""
    text = PAGE.read_text().split(f"## {section}\n")[1].split("\n## ")[0]
    return "\n".join(re.findall(r"```sh\n(.*?)```", text, re.S))


def test_the_page_from_first_to_last_command(stack: Stack, tmp_path: Path) -> None:
    student = tmp_path / "student"
    first, deaths = commands("The first ten minutes"), commands("What may die")
    assert "docker compose run --rm demo" in first
    assert "kill -9" in deaths
    looks = "docker compose ps --all --format json > ps.json\n"
    looks += "docker inspect --format '{{.RestartCount}}' $(docker compose ps -q teacher) > restarts\n"
    looks += "docker compose logs redis > redis.log\n"
    deaths = deaths.replace("docker compose logs", f"{looks}docker compose logs", 1)
    output = stack.run(f"{first}\n{deaths}", timeout_s=1400, STUDENT=str(student))
    assert "succeeded after 2 steps" in output, "the demo"
    assert f"succeeded after {STEPS} steps" in output, "the job from outside"
    check_student(student)
    containers = [json.loads(line) for line in (stack.folder / "ps.json").read_text().splitlines()]
    assert [container["Service"] for container in containers].count("sampler") == 2
    assert all(container["State"] == "running" for container in containers if container["Service"] != "setup")
    assert int((stack.folder / "restarts").read_text()) >= 1, "the killed teacher came back"
    assert "NOPERM" not in (stack.folder / "redis.log").read_text(), "its log was replayed whole"


def check_student(folder: Path) -> None:
    """It is a model that transformers loads, and not the one that it began as."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.num_hidden_layers == 23
    assert {path.suffix for path in folder.iterdir()} >= {".safetensors", ".json"}


def test_images_hold_what_they_should(stack: Stack) -> None:
    images = {target: f"stillhouse/{target}:test" for target in BUILT}
    torch = "import importlib.util as u; print(u.find_spec('torch') is not None)"
    for target, image in images.items():
        facts = json.loads(stack.run(f"docker image inspect {image}"))[0]
        print(f"size of {target}: {facts['Size'] / 1e6:.0f} MB")
        assert facts["Config"]["User"] == "10001:10001", target
        assert facts["Config"]["Entrypoint"][0].endswith("tini"), target
        assert not [entry for entry in facts["Config"]["Env"] if re.search("TOKEN|PASSWORD|API_KEY", entry)], target
        assert stack.run(f"docker run --rm {image} stillhouse version").strip(), target
        assert stack.run(f'docker run --rm {image} python -c "{torch}"').strip() == str(target != "gateway"), target


def test_wrong_values_are_answered(stack: Stack) -> None:
    answer = stack.run("docker compose config -q", check=False, STILLHOUSE_PORT="abc")
    assert "abc" in answer
    answer = stack.run("docker compose run --rm setup", check=False, STILLHOUSE_THREADS="many")
    assert "STILLHOUSE_THREADS" in answer
    assert "integer" in answer


def test_down_leaves_nothing(stack: Stack) -> None:
    stack.run("docker compose --profile '*' down -v --remove-orphans")
    label = f"label=com.docker.compose.project={stack.environment['COMPOSE_PROJECT_NAME']}"
    for kind in ("container ls --all", "volume ls", "network ls"):
        assert stack.run(f"docker {kind} -q --filter {label}").strip() == ""


def test_every_profile_is_valid_and_hardened(stack: Stack) -> None:
    """Also those that cannot run here: images, limits, health and no more rights than needed."""
    profiles = " ".join(f"--profile {name}" for name in PROFILES)
    services = json.loads(stack.run(f"docker compose {profiles} config --format json"))["services"]
    targets = set(re.findall(r"^FROM \S+ AS (\w+)", (ROOT / "docker" / "Dockerfile").read_text(), re.M))
    for name, service in services.items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["read_only"] is True, name
        assert service["logging"]["options"]["max-size"], name
        assert name in ("setup", "demo") or service["healthcheck"]["test"], name
        assert "build" not in service or service["build"]["target"] in targets, name
        published = [port["host_ip"] for port in service.get("ports", [])]
        assert name in ("gateway", "tls") or set(published) <= {"127.0.0.1"}, name
        ours = [
            key.removeprefix("STILLHOUSE_").lower() for key in service.get("environment") or {} if "STILLHOUSE" in key
        ]
        assert set(ours) <= set(Settings.model_fields), name
    gpus = [service for name, service in services.items() if name.endswith("-gpu")]
    assert len(gpus) == 3
    for service in gpus:
        [device] = service["deploy"]["resources"]["reservations"]["devices"]
        assert len(device["device_ids"]) == 1


def test_the_example_of_env_names_every_variable() -> None:
    used = set(re.findall(r"\$\{(\w+)", (ROOT / "docker-compose.yml").read_text()))
    named = set(re.findall(r"^(\w+)=", (ROOT / ".env.example").read_text(), re.M))
    assert used - {"DEMO_STEPS"} == named
