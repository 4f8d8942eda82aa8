"""Manifests that are wrong on purpose: each is caught, by the policy that is meant for it and by no other."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.k8s import facts
from tests.k8s.edges import network
from tests.k8s.policies import POLICIES, findings
from tests.k8s.rendered import COMPONENT, Rendered
from tests.k8s.test_overlays import OVERLAYS, overlay

REMOVED = object()
HASH = "(-[a-z0-9]{10})?"
"""At the end of a generated ConfigMap's name."""
POD = "spec.template.spec"
FIRST = f"{POD}.containers.0"


@dataclass(frozen=True)
class Broken:
    """One field of one object of an overlay with another value."""

    policy: str
    what: str
    where: str
    path: str
    value: Any
    overlay: str = "cpu-smoke"


BROKEN = [
    Broken("schema", "a misspelt field", "Deployment/gateway", f"{FIRST}.livenessProbe.periodSecondz", 5),
    Broken("schema", "a kind that nobody knows", "Deployment/gateway", "kind", "Deploymint"),
    Broken("schema", "the group of another project", "Deployment/gateway", "apiVersion", "extensions/v1beta1"),
    Broken("resources", "no limit of memory", "Deployment/sampler", f"{FIRST}.resources.limits", REMOVED),
    Broken(
        "resources",
        "a limit above what was asked for",
        "Deployment/teacher",
        f"{FIRST}.resources.limits.memory",
        "99Gi",
    ),
    Broken("probes", "never asked whether it is ready", "Deployment/sampler", f"{FIRST}.readinessProbe", REMOVED),
    Broken(
        "probes",
        "another service's health",
        "Deployment/sampler",
        f"{FIRST}.readinessProbe.grpc.service",
        "stillhouse.v1.TeacherService",
    ),
    Broken(
        "probes",
        "a queue outage restarts gateways",
        "Deployment/gateway",
        f"{FIRST}.livenessProbe.httpGet.path",
        "/readyz",
    ),
    Broken("probes", "half a minute to start", "Deployment/teacher", f"{FIRST}.startupProbe.failureThreshold", 3),
    Broken(
        "security", "may become root", "Deployment/gateway", f"{FIRST}.securityContext.allowPrivilegeEscalation", True
    ),
    Broken(
        "security",
        "a capability kept",
        "StatefulSet/trainer",
        f"{FIRST}.securityContext.capabilities",
        {"drop": ["ALL"], "add": ["SYS_PTRACE"]},
    ),
    Broken("security", "runs as root", "Deployment/teacher", f"{POD}.securityContext.runAsUser", 0),
    Broken("identity", "a token for Kubernetes", "Deployment/gateway", f"{POD}.automountServiceAccountToken", REMOVED),
    Broken("identity", "variables about neighbours", "Deployment/sampler", f"{POD}.enableServiceLinks", True),
    Broken("grace", "killed while it commits", "StatefulSet/trainer", f"{POD}.terminationGracePeriodSeconds", 10),
    Broken("images", "whatever is newest", "Deployment/gateway", f"{FIRST}.image", "stillhouse/gateway:latest"),
    Broken("images", "an image that nobody builds", "Deployment/gateway", f"{FIRST}.image", "stillhouse/gatway:0.1.0"),
    Broken(
        "settings", "a setting that nothing reads", "ConfigMap/stillhouse-config", "data.STILLHOUSE_LEASE_SECONDS", "15"
    ),
    Broken("settings", "a value out of range", "ConfigMap/stillhouse-config", "data.STILLHOUSE_LEASE_S", "-1"),
    Broken(
        "secrets",
        "a password in the address",
        "ConfigMap/stillhouse-config",
        "data.STILLHOUSE_REDIS_URL",
        "redis://stillhouse:hunter2@redis:6379/0",
    ),
    Broken(
        "reachable",
        "a sampler labelled teacher",
        "Deployment/teacher",
        f"{FIRST}.args",
        ["python", "-m", "stillhouse.sampler"],
    ),
    Broken(
        "reachable",
        "an address that only the pod knows",
        "Deployment/sampler",
        f"{FIRST}.env.@STILLHOUSE_ADVERTISE_HOST",
        {"value": "localhost"},
    ),
    Broken("ports", "the Service leads to a closed port", "Service/gateway", "spec.ports.0.targetPort", 8080),
    Broken("selectors", "a Service without pods", "Service/teacher", "spec.selector", {"app": "teacher"}),
    Broken(
        "references",
        "a claim that is not there",
        "PersistentVolumeClaim/stillhouse-artifacts",
        "metadata.name",
        "artefacts",
    ),
    Broken(
        "references",
        "a key that nobody was told of",
        "Deployment/gateway",
        f"{POD}.volumes.@secrets",
        {"secret": {"secretName": "stillhouse-secrets", "items": [{"key": "token", "path": "internal-token"}]}},
    ),
    Broken(
        "writable",
        "no place for temporary files",
        "Deployment/sampler",
        f"{FIRST}.volumeMounts.2.mountPath",
        "/scratch",
    ),
    Broken("writable", "artifacts of its own", "Deployment/sampler", f"{POD}.volumes.@artifacts", {"emptyDir": {}}),
    Broken(
        "probes",
        "a probe that speaks no TLS",
        "Deployment/sampler",
        f"{FIRST}.readinessProbe",
        {"grpc": {"port": 50051, "service": "stillhouse.v1.SamplerService"}},
        "multi-gpu",
    ),
    Broken(
        "availability",
        "two that decide how many gateways there are",
        "ScaledObject/sampler",
        "spec.scaleTargetRef",
        {"apiVersion": "apps/v1", "kind": "Deployment", "name": "gateway"},
        "multi-gpu",
    ),
    Broken(
        "queries",
        "scales by what nobody exports",
        "ScaledObject/sampler",
        "spec.triggers.0.metadata.query",
        "max(stillhouse_work_wating)",
        "multi-gpu",
    ),
    Broken("namespaces", "left in `default`", "NetworkPolicy/redis", "metadata.namespace", REMOVED),
    Broken("schema", "a field that KEDA does not know", "ScaledObject/sampler", "spec.minReplicas", 0, "multi-gpu"),
    Broken(
        "schema",
        "text where KEDA wants text, not a number",
        "ScaledObject/sampler",
        "spec.triggers.0.metadata.threshold",
        1,
        "multi-gpu",
    ),
    Broken(
        "schema",
        "a misspelt field in the pods of a JobSet",
        "JobSet/trainer",
        f"spec.replicatedJobs.0.template.{POD}.hostNetworks",
        True,
        "multi-node",
    ),
    Broken(
        "references",
        "scales what is not there",
        "ScaledObject/sampler",
        "spec.scaleTargetRef.name",
        "samplers",
        "multi-gpu",
    ),
    Broken(
        "selectors",
        "reads a port that pods do not have",
        "PodMonitor/workers",
        "spec.podMetricsEndpoints.0.port",
        "prometheus",
        "multi-gpu",
    ),
    Broken(
        "availability",
        "a volume of one node",
        "PersistentVolumeClaim/stillhouse-artifacts",
        "spec.accessModes",
        ["ReadWriteOnce"],
        "multi-gpu",
    ),
    Broken("gpus", "not let onto nodes with GPUs", "Deployment/sampler", f"{POD}.tolerations", [], "single-node-gpu"),
    Broken(
        "gpus",
        "64 MiB of shared memory",
        "Deployment/teacher",
        f"{POD}.volumes.@shm",
        {"emptyDir": {}},
        "single-node-gpu",
    ),
    Broken(
        "gpus",
        "a surge pod without a GPU",
        "Deployment/sampler",
        "spec.strategy",
        {"type": "RollingUpdate"},
        "single-node-gpu",
    ),
    Broken(
        "availability",
        "nodes that cannot be drained",
        "PodDisruptionBudget/sampler",
        "spec.maxUnavailable",
        0,
        "multi-gpu",
    ),
]


def broken(case: Broken) -> Rendered:
    """The overlay with the fault."""
    whole = next(overlay(folder) for folder in OVERLAYS if folder.name == case.overlay)
    objects = copy.deepcopy(whole.objects)
    kind, name = case.where.split("/")
    (target,) = (one for one in objects if one["kind"] == kind and re.fullmatch(name + HASH, one["metadata"]["name"]))
    put(target, case.path.split("."), case.value)
    return Rendered(whole.name, objects)


def put(inner: Any, keys: list[str], value: Any) -> None:
    """Set what `keys` lead to; a number or @name is an element of a list. All but the last must be there."""
    key = keys[0]
    if key.startswith("@"):
        place: Any = next(number for number, one in enumerate(inner) if one["name"] == key[1:])
        value = {"name": key[1:], **value} if len(keys) == 1 else value
    else:
        place = int(key) if isinstance(inner, list) else key
    if len(keys) > 1:
        put(inner[place], keys[1:], value)
    elif value is REMOVED:
        del inner[place]
    else:
        inner[place] = value


@pytest.mark.parametrize("case", BROKEN, ids=lambda case: f"{case.policy}: {case.what}")
def test_a_broken_manifest_is_caught_by_its_policy_alone(case: Broken) -> None:
    found = findings(broken(case))
    assert set(found) == {case.policy}, found


def test_every_policy_has_caught_something() -> None:
    tried = {case.policy for case in BROKEN} | {"network"}
    assert tried == set(POLICIES)


def rules(direction: str) -> Iterator[tuple[str, str, int]]:
    """(overlay, policy, place) of every rule."""
    for folder in OVERLAYS:
        for policy in overlay(folder).kind("NetworkPolicy"):
            for place in range(len(policy["spec"].get(direction, []))):
                yield folder.name, policy["metadata"]["name"], place


@pytest.mark.parametrize("direction", ["ingress", "egress"])
def test_every_rule_of_the_network_is_needed(direction: str) -> None:
    """Without any one of them a call of the code would hang."""
    seen = 0
    for name, policy, place in rules(direction):
        case = Broken("network", "", f"NetworkPolicy/{policy}", f"spec.{direction}.{place}", REMOVED, name)
        assert [*network(broken(case))], f"{name}: {policy} {direction} {place} allows what nothing needs"
        seen += 1
    assert seen > 10


def pairs() -> list[tuple[str, str]]:
    """Parts that do not call each other."""
    parts = [*facts.ROLES, "redis"]
    called = {(source, to) for source, to, _ in facts.calls()}
    return [(one, other) for one in parts for other in parts if one != other and (one, other) not in called]


@pytest.mark.parametrize("pair", pairs(), ids=lambda pair: f"{pair[0]} to {pair[1]}")
def test_an_edge_that_nothing_uses_is_found(pair: tuple[str, str]) -> None:
    whole = next(overlay(folder) for folder in OVERLAYS if folder.name == "cpu-smoke")
    one, other = ({"podSelector": {"matchLabels": {COMPONENT: part}}} for part in pair)
    extra = {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "extra", "namespace": "stillhouse"},
        "spec": {**one, "policyTypes": ["Egress"], "egress": [{"to": [other]}]},
    }
    assert set(findings(Rendered(whole.name, [*whole.objects, extra]))) == {"network"}


def test_without_a_default_deny_everything_is_open() -> None:
    case = Broken("network", "", "NetworkPolicy/default-deny", "spec.policyTypes", ["Egress"])
    assert "none denies all Ingress" in "".join(map(str, network(broken(case))))
