"""Held-out measures as text: the first and the newest, of all prompts, of each teacher's and of each domain's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from stillhouse.cli.console import count, number, print_table

SHOWN: Final = (("reverse_kl", "reverse KL", 4), ("accuracy", "accuracy", 3))
"""(measure, what people call it, digits)."""
COLUMNS: Final = (
    ("reverse_kl", "reverse KL", 4),
    ("accuracy", "accuracy", 3),
    ("teacher_nll_greedy", "teacher NLL", 4),
    ("repeated_4grams", "repeated 4-grams", 3),
    ("mean_length", "length", 4),
    ("truncated", "cut off", 3),
)
"""Measures that a table may have; one without any value is left out."""
PARTS: Final = ("by_teacher", "by_domain")


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


def print_evaluations(evaluations: Sequence[Mapping[str, Any]]) -> None:
    """A row per evaluation of all prompts, and of each teacher's and domain's where there are several."""
    rows = [row for evaluation in evaluations for row in _parts(evaluation)]
    has_parts = any(name for _, name, _ in rows)
    shown = [column for column in COLUMNS if any(part.get(column[0]) is not None for _, _, part in rows)]
    ks = sorted({int(k) for _, _, part in rows for k in (part.get("pass_at_k") or {})})
    columns = (">step", *(("of",) if has_parts else ()), *(f">{label}" for _, label, _ in shown))
    print_table(
        (*columns, *(f">pass@{k}" for k in ks), ">tokens"),
        [
            (
                step,
                *((name or "all",) if has_parts else ()),
                *(number(part.get(measure), digits) for measure, _, digits in shown),
                *(number((part.get("pass_at_k") or {}).get(str(k)), 3) for k in ks),
                count(part.get("num_tokens")),
            )
            for step, name, part in rows
        ],
    )


def _parts(evaluation: Mapping[str, Any]) -> list[tuple[str, str, Mapping[str, Any]]]:
    """(step, '' or the teacher or domain, its measures)."""
    step = f"{evaluation['step']}{' (averaged)' if evaluation.get('averaged') else ''}"
    found: list[tuple[str, str, Mapping[str, Any]]] = [(step, "", evaluation)]
    for kind in PARTS:
        parts = evaluation.get(kind) or {}
        found += [(step, name, part) for name, part in parts.items() if len(parts) > 1]
    return found
