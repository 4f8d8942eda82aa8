"""Held-out measures as text: the first and the newest, of all prompts and of each teacher's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from stillhouse.cli.console import number

SHOWN: Final = (("reverse_kl", "reverse KL", 4), ("accuracy", "accuracy", 3))
"""(measure, what people call it, digits)."""


def facts(evaluations: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(label, text) of evaluations in step order, as REST lists them or their events tell them."""
    if not evaluations:
        return []
    first, last = evaluations[0], evaluations[-1]
    return [("held out", between(first, last)), *by_teacher(first, last)]


def by_teacher(first: Mapping[str, Any], last: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The same of each teacher, if there are several."""
    earlier, later = first.get("by_teacher") or {}, last.get("by_teacher") or {}
    return [(f"  {name}", between(earlier.get(name, {}), later[name])) for name in later if len(later) > 1]


def between(first: Mapping[str, Any], last: Mapping[str, Any]) -> str:
    """`reverse KL 1.23 -> 0.456   accuracy 0.1 -> 0.72`; one value each if there is only one evaluation."""
    parts = []
    for name, label, digits in SHOWN:
        if name in last:
            values = [number(found.get(name), digits) for found in (first, last)]
            parts.append(f"{label} {values[1] if first is last else ' -> '.join(values)}")
    return "   ".join(parts)
