"""Every overlay renders, has valid objects and keeps every policy."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from stillhouse.core.config import Settings
from tests.k8s import facts, schemas
from tests.k8s.policies import POLICIES
from tests.k8s.rendered import MANIFESTS, ROOT, Object, Rendered, overlays, render, title
from tests.pages import Block, run_by

OVERLAYS = overlays()


@cache
def overlay(folder: Path) -> Rendered:
    """Rendered once; nobody changes it."""
    return render(folder)


def test_the_overlays_are_found() -> None:
    assert {"cpu-smoke", "single-node-gpu", "multi-gpu", "multi-node"} <= {folder.name for folder in OVERLAYS}


@pytest.mark.parametrize("folder", OVERLAYS, ids=lambda folder: folder.name)
def test_an_overlay_has_every_part_of_the_platform(folder: Path) -> None:
    assert {*facts.ROLES, "redis"} <= {pod.component for pod in overlay(folder).pods()}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("folder", OVERLAYS, ids=lambda folder: folder.name)
def test_an_overlay_keeps_the_policy(folder: Path, policy: str) -> None:
    assert [str(one) for one in POLICIES[policy](overlay(folder))] == []


@pytest.mark.parametrize("block", run_by("tests/k8s/test_overlays.py"), ids=str)
def test_the_commands_of_the_pages_render(block: Block) -> None:
    """docs/kubernetes.md and k8s/README.md."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    shell = ["bash", "-euc", block.text]
    answer = subprocess.run(
        shell, cwd=ROOT, env=os.environ | {"PATH": path}, capture_output=True, text=True, timeout=50
    )
    assert answer.returncode == 0, answer.stderr
    assert "kind: Deployment" in answer.stdout


def test_every_component_is_in_an_overlay() -> None:
    """What no overlay renders is checked by nobody."""
    used = "".join(file.read_text() for file in MANIFESTS.rglob("kustomization.yaml"))
    names = [folder.name for folder in (MANIFESTS / "components").iterdir() if folder.is_dir()]
    assert [name for name in names if f"components/{name}" not in used] == []


def custom_objects() -> Iterator[Object]:
    for folder in OVERLAYS:
        for one in overlay(folder).objects:
            if f"{one['apiVersion']}/{one['kind']}" in schemas.crds():
                yield one


def test_our_schemas_refuse_an_unknown_field_at_every_level() -> None:
    seen = set[str]()
    for one in custom_objects():
        for path in ([], ["metadata"], ["spec"]):
            changed = copy.deepcopy(one)
            inner = changed
            for key in path:
                inner = inner.setdefault(key, {})
            inner["unknownField"] = 1
            assert schemas.faults(changed), f"{title(one)} takes any field of {'.'.join(path) or 'itself'}"
        seen.add(one["kind"])
    assert {"JobSet", "ScaledObject", "PodMonitor", "PrometheusRule", "Certificate"} <= seen


def test_the_facts_agree_among_themselves() -> None:
    assert {facts.ports()[name] for name in ("rest", "grpc", "metrics")} == facts.exposed()
    assert {"gateway", "cpu", "trainer", "vllm"} <= facts.image_targets()
    assert Settings.model_fields["drain_s"].default == facts.DRAIN_S


def test_the_calls_are_those_that_the_architecture_names() -> None:
    """Read from the code: whoever adds a call adds it here, to the NetworkPolicies and to docs/kubernetes.md."""
    grpc = {(source, to) for source, to, port in facts.calls() if port == "grpc"}
    assert grpc == {
        ("gateway", "sampler"),  # chat
        ("gateway", "teacher"),  # scoring without a job
        ("gateway", "trainer"),  # another try for dead letters
        ("sampler", "trainer"),  # weights
        ("teacher", "trainer"),  # weights of teachers that follow the student
        ("trainer", "sampler"),  # pre-flight, held-out texts, news of weights
        ("trainer", "teacher"),  # pre-flight, hidden states, heads, news of weights
    }
