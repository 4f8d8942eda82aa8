"""Every object has a closed schema: Kubernetes' own for its kinds, ours (crds.yaml) for kinds of others. Unknown kinds
are refused, and so is every field that a schema does not know."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Final

import yaml
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match
from kubernetes_validate import SchemaNotFoundError, ValidationError, validate

from tests.k8s.rendered import Finding, Object, Rendered, title

KUBERNETES: Final = "1.33"
"""Oldest release that the manifests are written for."""
CRDS: Final = Path(__file__).with_name("crds.yaml")


def schema(rendered: Rendered) -> Iterator[Finding]:
    """Fields and types of every object."""
    for one in rendered.objects:
        for wrong in faults(one):
            yield Finding(title(one), wrong, "correct the field; new kinds need a schema in tests/k8s/crds.yaml")


def faults(one: Object) -> list[str]:
    """What the schema of an object's kind says against it."""
    return list(_faults(json.dumps(one, sort_keys=True)))


@cache
def _faults(text: str) -> tuple[str, ...]:  # overlays share most of their objects
    one = json.loads(text)
    kind = f"{one.get('apiVersion')}/{one.get('kind')}"
    if (ours := crds().get(kind)) is not None:
        return (*_ours(ours, one), *_job_templates(one))
    try:
        validate(one, KUBERNETES, strict=True)
    except SchemaNotFoundError:
        return (f"nothing here knows the kind {kind}",)
    except ValidationError as error:
        return (f"{'.'.join(map(str, error.path)) or 'the object'}: {error.message}",)
    return ()


def _ours(definition: Object, one: Object) -> Iterator[str]:
    error = best_match(Draft202012Validator(definition).iter_errors(one))
    if error is not None:
        yield f"{error.json_path.removeprefix('$.')}: {error.message}"


def _job_templates(one: Object) -> Iterator[str]:
    """The jobs of a JobSet are Kubernetes' own."""
    for job in one["spec"].get("replicatedJobs", []) if one["kind"] == "JobSet" else []:
        full = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": job["name"]}} | job["template"]
        yield from (f"replicatedJobs {job['name']}: {fault}" for fault in faults(full))


@cache
def crds() -> dict[str, Object]:
    """Our schemas by apiVersion/Kind."""
    document = yaml.safe_load(CRDS.read_text())
    shared = {name: closed(body) for name, body in document["shared"].items()}
    return {kind: _whole(kind, body) | {"$defs": shared} for kind, body in document["kinds"].items()}


def _whole(kind: str, spec: Object) -> Object:
    api_version, _, name = kind.rpartition("/")
    strings = {"type": "object", "additionalProperties": {"type": "string"}}
    metadata = {"name": {"type": "string"}, "namespace": {"type": "string"}, "labels": strings, "annotations": strings}
    properties = {
        "apiVersion": {"const": api_version},
        "kind": {"const": name},
        "metadata": {"properties": metadata, "required": ["name"]},
        "spec": spec,
    }
    needed = [field for field in properties if field != "spec" or "required" in spec]
    return closed({"properties": properties, "required": needed})


def closed(body: Any) -> Any:
    """A schema in which every object with named fields has no others."""
    if isinstance(body, list):
        return [closed(one) for one in body]
    if not isinstance(body, dict):
        return body
    inner = {key: closed(value) for key, value in body.items() if key != "properties"}
    if isinstance(body.get("properties"), dict):
        inner["properties"] = {key: closed(value) for key, value in body["properties"].items()}
        inner = {"type": "object", "additionalProperties": False} | inner
    return inner
