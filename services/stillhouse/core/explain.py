"""From pydantic's errors to findings that a person can act on: the field's path as the user wrote it, and the fix."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Final

from pydantic import BaseModel

from stillhouse.core import recipes
from stillhouse.core.spec import JobSpec

MAX_FINDINGS: Final = 20
"""Findings reported at once: ten thousand bad rows are one mistake."""
_LIMITS: Final = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


@dataclass(frozen=True, slots=True)
class Finding:
    """Something wrong with a request."""

    param: str | None
    """Path of the field, for example stages.0.loss.objective."""
    message: str
    """What is wrong, with both sides."""
    fix: str = ""
    """What to do about it."""
    is_warning: bool = False
    """Suspicious, but possible: it is told, and refuses nothing."""
    evidence: Mapping[str, Any] = field(default_factory=dict)
    """The figures behind it."""

    def text(self) -> str:
        """Path, message and fix in one line."""
        where = f"{self.param}: " if self.param else ""
        return f"{where}{self.message}" + (f"; {self.fix}" if self.fix else "")

    def as_json(self) -> dict[str, str]:
        return {"param": self.param or "", "message": self.message, "fix": self.fix}


def explain(errors: Sequence[Mapping[str, Any]], body: Any, model: type[BaseModel] = JobSpec) -> list[Finding]:
    """Findings for FastAPI's `errors`, whose paths start with the value's origin: "body" (a `model`), "query" ..."""
    findings = []
    if model is JobSpec:
        body = recipes.with_presets(body)  # as it was checked
    for error in _without_echoes(errors):
        loc = list(error["loc"][1:])
        if error["loc"][0] == "body":
            finding = _finding(error, _user_path(loc, body), _known_keys(model, loc[:-1]))
            findings.append(_with_origin(finding, error, body))
        else:
            findings.append(_finding(error, [str(part) for part in loc], ()))
    return findings[:MAX_FINDINGS]


def _finding(error: Mapping[str, Any], path: list[str], known: Sequence[str]) -> Finding:
    """`known`: the keys that the format has where the error is."""
    kind, context = str(error["type"]), error.get("ctx") or {}
    message, fix = str(error["msg"]).removeprefix("Value error, "), ""
    if kind == "extra_forbidden":
        message, fix = f"unknown key '{path[-1]}'", _closest(path[-1], known)
    elif kind == "missing":
        message, fix = "is required", "add it"
        if not path:
            message, fix = "the body is empty", "send JSON with Content-Type: application/json"
    elif kind == "value_error":
        named = re.match(r"((?:\w+\.)+\w+): (.*)", message)
        if named and not path:
            path, message = [named[1]], named[2]
        fix = "change it accordingly"
    elif kind in ("union_tag_invalid", "union_tag_not_found"):
        path.append(str(context["discriminator"]).strip("'"))
        message = f"unknown value '{context['tag']}'" if "tag" in context else "is required"
        fix = f"use one of {context['expected_tags']}" if "tag" in context else "add it"
    elif kind in ("literal_error", "enum"):
        message, fix = f"got {_short(error['input'])}", f"use {context['expected']}"
    elif limits := [f"{sign} {context[name]:g}" for name, sign in _LIMITS.items() if name in context]:
        message, fix = f"{_short(error['input'])} is out of range", f"use a value {' and '.join(limits)}"
    elif "pattern" in context:
        message, fix = f"{_short(error['input'])} does not match", f"it must match {context['pattern']}"
    else:
        fix = f"got {_short(error['input'])}" if "input" in error else ""
    return Finding(".".join(path) or None, message, fix)


def _with_origin(finding: Finding, error: Mapping[str, Any], body: Any) -> Finding:
    """Where fields do not go together, some may be none that the user wrote."""
    name = recipes.named_in(body, tuple(error["loc"][1:]))
    if not name or error["type"] != "value_error" or not isinstance(error.get("input"), Mapping):
        return finding
    return replace(finding, fix=f"{finding.fix} (what you did not write is from recipe '{name}')")


def _without_echoes(errors: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Drops what only follows from another error.

    "At least 1 item, not 0" about a list that has items, all of them wrong: pydantic counts the valid ones. And "is
    required" in a stage whose recipe there is not: it would have given the field.
    """
    stages = [tuple(error["loc"][:-1]) for error in errors if error["loc"][-1] == "recipe"]

    def echoes(error: Mapping[str, Any]) -> bool:
        if error["type"] in ("missing", "union_tag_not_found"):
            return any(tuple(error["loc"][: len(stage)]) == stage for stage in stages)
        return error["type"] == "too_short" and len(error["input"]) >= error["ctx"]["min_length"]

    return [error for error in errors if not echoes(error)] or list(errors)


def _user_path(loc: Sequence[Any], body: Any) -> list[str]:
    """`loc` without the tags that pydantic adds for the member of a union, and without its "[key]" markers."""
    path: list[str] = []
    value = body
    for index, part in enumerate(loc):
        is_last = index == len(loc) - 1
        if part == "[key]":
            continue
        if isinstance(part, str) and isinstance(value, Mapping) and part not in value:
            is_tag = not is_last or part in value.values()
            if is_tag:  # such as "policy_gradient"; any other last part is a key that is missing
                continue
        if isinstance(part, str) and isinstance(value, str | int | float):
            continue  # a kind of value that this one might have been
        path.append(str(part))
        if isinstance(value, Mapping):
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            value = value[part]
        else:
            value = None
    return path


@lru_cache(maxsize=256)  # bounded: `loc` holds names that users chose
def _known_keys_of(model: type[BaseModel], loc: tuple[Any, ...]) -> tuple[str, ...]:
    schema = model.model_json_schema()

    def deref(node: dict[str, Any]) -> dict[str, Any]:
        while "$ref" in node:
            node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]]
        options = [option for option in node.get("anyOf", []) if option.get("type") != "null"]
        return deref(options[0]) if options else node  # X | None

    node = deref(schema)
    for part in loc:
        mapping = node.get("discriminator", {}).get("mapping", {})
        if part in mapping:
            node = deref({"$ref": mapping[part]})
        elif isinstance(part, int):
            node = deref(node.get("items", {}))
        else:
            node = deref(node.get("properties", {}).get(part) or node.get("additionalProperties") or {})
    return tuple(node.get("properties", {}))


def _known_keys(model: type[BaseModel], loc: Sequence[Any]) -> tuple[str, ...]:
    """Keys that the format of `model` has at `loc` (a pydantic path, union tags included)."""
    return _known_keys_of(model, tuple(0 if isinstance(part, int) else part for part in loc))


def _closest(key: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if near:
        return f"did you mean '{near[0]}'?"
    return f"remove it, or use one of {', '.join(known)}" if known else "remove it"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
