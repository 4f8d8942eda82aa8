"""Overlays as their cluster would get them, rendered by kustomize, and what the policies ask of them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

ROOT: Final = Path(__file__).resolve().parents[2]
MANIFESTS: Final = ROOT / "k8s"
KUBECTL: Final = Path(sys.executable).parent / "kubectl"
RENDER_TIMEOUT_S: Final = 60
COMPONENT: Final = "app.kubernetes.io/component"
"""The label that says which part of the platform a pod is."""

Object = dict[str, Any]


@dataclass(frozen=True)
class Finding:
    """What a policy found: the object, what is wrong with it, and what mends it."""

    where: str
    wrong: str
    fix: str

    def __str__(self) -> str:
        return f"{self.where}: {self.wrong}; fix: {self.fix}"


@dataclass(frozen=True)
class Pod:
    """A pod as its workload makes it."""

    owner: Object
    template: Object

    @property
    def where(self) -> str:
        """The object that makes it."""
        return title(self.owner)

    @property
    def labels(self) -> dict[str, str]:
        """Labels that Services and NetworkPolicies see."""
        return self.template.get("metadata", {}).get("labels", {})

    @property
    def component(self) -> str:
        """gateway, sampler, teacher, trainer, redis ..."""
        return self.labels.get(COMPONENT, "")

    @property
    def spec(self) -> Object:
        """The pod's spec."""
        return self.template["spec"]

    @property
    def containers(self) -> list[Object]:
        """What runs for as long as the pod does, sidecars included."""
        sidecars = [one for one in self.spec.get("initContainers", []) if one.get("restartPolicy") == "Always"]
        return [*self.spec["containers"], *sidecars]

    @property
    def all_containers(self) -> list[Object]:
        """And what runs before."""
        return [*self.spec["containers"], *self.spec.get("initContainers", [])]

    @property
    def runs_forever(self) -> bool:
        """Not a task that ends: those have nothing to probe."""
        return self.owner["kind"] in ("Deployment", "StatefulSet", "DaemonSet", "JobSet")

    def ports(self) -> dict[str, int]:
        """Its container ports by name."""
        return {port.get("name", ""): port["containerPort"] for one in self.containers for port in one.get("ports", [])}


@dataclass(frozen=True)
class Rendered:
    """All objects of an overlay."""

    name: str
    objects: list[Object] = field(repr=False)

    def kind(self, *kinds: str) -> list[Object]:
        """Objects of these kinds."""
        return [one for one in self.objects if one.get("kind") in kinds]

    def find(self, kind: str, name: str) -> Object | None:
        """An object by its kind and name."""
        return next((one for one in self.kind(kind) if one["metadata"]["name"] == name), None)

    def pods(self) -> list[Pod]:
        """A pod of every workload."""
        return [Pod(owner, template) for owner in self.objects for template in _templates(owner)]

    def environment(self, container: Object) -> dict[str, str]:
        """Variables with a literal value: of its ConfigMaps, then its own."""
        values: dict[str, str] = {}
        for source in container.get("envFrom", []):
            name = source.get("configMapRef", {}).get("name")
            if name and (config := self.find("ConfigMap", name)):
                values |= {source.get("prefix", "") + key: value for key, value in config.get("data", {}).items()}
        return values | {one["name"]: one["value"] for one in container.get("env", []) if "value" in one}


def _templates(owner: Object) -> Iterator[Object]:
    spec = owner.get("spec", {})
    match owner.get("kind"):
        case "Deployment" | "StatefulSet" | "DaemonSet" | "Job":
            yield spec["template"]
        case "CronJob":
            yield spec["jobTemplate"]["spec"]["template"]
        case "Pod":
            yield owner
        case "JobSet":
            yield from (one["template"]["spec"]["template"] for one in spec["replicatedJobs"])


def title(one: Object) -> str:
    """How findings name an object."""
    return f"{one.get('kind', 'an object without kind')} {one.get('metadata', {}).get('name', '?')}"


def matches(selector: Object | None, labels: dict[str, str]) -> bool:
    """Whether a label selector takes these labels; an empty one takes all, none at all takes nothing."""
    if selector is None:
        return False
    wanted = selector.get("matchLabels", {})
    if any(labels.get(key) != value for key, value in wanted.items()):
        return False
    return all(_holds(rule, labels) for rule in selector.get("matchExpressions", []))


def _holds(rule: Object, labels: dict[str, str]) -> bool:
    value = labels.get(rule["key"])
    match rule["operator"]:
        case "In":
            return value in rule["values"]
        case "NotIn":
            return value not in rule["values"]
        case "Exists":
            return value is not None
        case _:
            return value is None


def render(folder: Path) -> Rendered:
    """What `kubectl apply -k` would send."""
    answer = subprocess.run(
        [KUBECTL, "kustomize", folder], capture_output=True, text=True, timeout=RENDER_TIMEOUT_S, check=False
    )
    if answer.returncode:
        raise ValueError(f"kubectl kustomize {folder.relative_to(ROOT)}: {answer.stderr.strip()}")
    if "Warning" in answer.stderr:  # of a field that a coming kustomize drops
        raise ValueError(f"kubectl kustomize {folder.relative_to(ROOT)} warns: {answer.stderr.strip()}")
    return Rendered(folder.name, [one for one in yaml.load_all(answer.stdout, yaml.CSafeLoader) if one])


def overlays() -> list[Path]:
    """Every folder that a user may apply."""
    return sorted(file.parent for file in (MANIFESTS / "overlays").glob("*/kustomization.yaml"))
