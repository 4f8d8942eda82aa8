"""What manifests must agree with, read from the code, the Dockerfile and the compose file."""

from __future__ import annotations

import ast
import json
import re
import tomllib
from functools import cache
from pathlib import Path
from typing import Final

import yaml

from stillhouse.core.config import PREFIX, Settings
from stillhouse.core.metrics import BY_ROLE, COMMON
from stillhouse.core.service import SERVER_GRACE_S
from stillhouse.v1 import sampler_pb2, teacher_pb2, trainer_pb2
from tests.k8s.rendered import ROOT

ROLES: Final = ("gateway", "sampler", "teacher", "trainer")
GRPC_ROLES: Final = ("sampler", "teacher", "trainer")
HEALTH: Final = {
    "sampler": sampler_pb2.DESCRIPTOR.services_by_name["SamplerService"].full_name,
    "teacher": teacher_pb2.DESCRIPTOR.services_by_name["TeacherService"].full_name,
    "trainer": trainer_pb2.DESCRIPTOR.services_by_name["TrainerService"].full_name,
}
"""What says that a service is ready; "" that its process lives."""
GATEWAY_PATHS: Final = ("/healthz", "/readyz")
DRAIN_S: Final = Settings().drain_s
STOP_S: Final = SERVER_GRACE_S
"""After the drain: open calls end."""
SETTINGS: Final = {PREFIX + name.upper() for name in Settings.model_fields}
HOME: Final = "/var/lib/stillhouse"
"""STILLHOUSE_HOME of the images."""
USER_ID: Final = 10001
"""Of the images (USER in the Dockerfile)."""


@cache
def version() -> str:
    """The version of the package, which tags the images."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


@cache
def image_targets() -> frozenset[str]:
    """Targets of the Dockerfile that run something."""
    stages = re.findall(r"^FROM \S+ AS (\S+)", (ROOT / "docker/Dockerfile").read_text(), re.MULTILINE)
    return frozenset(stages) - {"base"}


def default_command(target: str) -> list[str]:
    """What an image of ours starts by itself."""
    stage = (ROOT / "docker/Dockerfile").read_text().partition(f" AS {target}\n")[2].partition("\nFROM ")[0]
    found = re.search(r"^CMD (\[.*\])$", stage, re.MULTILINE)
    return json.loads(found[1]) if found else []


@cache
def foreign_images() -> frozenset[str]:
    """Repositories of images that are not ours, as compose names them by default."""
    lines = re.findall(r"^    image: \$\{\w+_IMAGE:-([^:}]+):", (ROOT / "docker-compose.yml").read_text(), re.MULTILINE)
    return frozenset(lines)


@cache
def ports() -> dict[str, int]:
    """Ports by their name in manifests, as compose sets them."""
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    worker = compose["x-worker-environment"]
    redis_url = compose["x-environment"]["STILLHOUSE_REDIS_URL"]
    return {
        "rest": int(compose["services"]["gateway"]["environment"]["STILLHOUSE_PORT"]),
        "grpc": int(worker["STILLHOUSE_PORT"]),
        "metrics": int(worker["STILLHOUSE_METRICS_PORT"]),
        "redis": int(redis_url.rpartition(":")[2].partition("/")[0]),
    }


@cache
def exposed() -> frozenset[int]:
    """Ports that the images name."""
    lines = re.findall(r"^EXPOSE (.+)$", (ROOT / "docker/Dockerfile").read_text(), re.MULTILINE)
    return frozenset(int(port) for line in lines for port in line.split())


@cache
def metrics() -> frozenset[str]:
    """Names of all series that services export."""
    registries = [COMMON, *BY_ROLE.values()]
    return frozenset(name for registry in registries for name in registry._names_to_collectors)  # no public way


@cache
def calls() -> frozenset[tuple[str, str, str]]:
    """Who opens a connection to whom, at which port: (from, to, name of the port)."""
    grpc = {(role, peer, "grpc") for role in ROLES for peer in dialled(ROOT / "services/stillhouse" / role)}
    return frozenset(grpc | {(role, "redis", "redis") for role in ROLES})


def dialled(package: Path) -> set[str]:
    """Services that a package calls: it names their stub, or asks a job's leader (`core.pulls`), which is a trainer."""
    found = set[str]()
    for file in package.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and node.attr.endswith("ServiceStub"):
                found.add(node.attr.removesuffix("ServiceStub").lower())
            if isinstance(node, ast.ImportFrom) and node.module == "stillhouse.core.pulls":
                found.add("trainer")
    return found
