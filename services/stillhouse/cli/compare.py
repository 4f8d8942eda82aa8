"""`stillhouse compare A B`: what differs in what was asked for, and in what came of it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from stillhouse.cli.console import count, duration, number, print_json, print_table, say
from stillhouse.client.client import Client
from stillhouse.core.schemas import Job, MetricPoint

METRICS: Final = ("loss/reverse_kl/mean", "reward/mean", "loss/total", "mismatch/logprob_abs_mean", "tokens/trained")
LAST_SHARE: Final = 10
"""The last metrics are means over the last tenth of a job's steps: one step alone is noise."""
MEASURES: Final = ("reverse_kl", "accuracy", "mean_length", "truncated")
IGNORED: Final = ("name", "metadata")
"""Parts of a spec that change nothing."""
MAX_VALUE: Final = 60
"""Characters of a value in the table."""


@dataclass(frozen=True, slots=True)
class Side:
    """One of the jobs."""

    job: Job
    points: Sequence[MetricPoint]
    evaluations: Sequence[Mapping[str, Any]]


def compare(first: str, second: str, *, as_json: bool) -> None:
    """Print what differs."""
    with Client() as client:
        a, b = (
            Side(client.jobs.get(job), client.jobs.metrics(job), client.jobs.evaluations(job))
            for job in (first, second)
        )
    found = {
        "jobs": [side.job.id for side in (a, b)],
        "status": [side.job.status for side in (a, b)],
        "spec": differences(a.job.spec, b.job.spec),
        "held_out": _both(_held_out(a), _held_out(b)),
        "last_metrics": _both(_last_metrics(a), _last_metrics(b)),
        "usage": _both(_usage(a), _usage(b)),
    }
    if as_json:
        print_json(found)
    else:
        _show(a, b, found)


def _show(a: Side, b: Side, found: Mapping[str, Any]) -> None:
    heads = [f"{side.job.name or side.job.id} ({side.job.status})" for side in (a, b)]
    say(f"A  {a.job.id}  {heads[0]}\nB  {b.job.id}  {heads[1]}\n")
    if found["spec"]:
        say("asked for")
        rows = [(path, *(_short(value) for value in pair)) for path, pair in found["spec"].items()]
        print_table(("field", "A", "B"), rows)
    else:
        say("both were asked for the same")
    for title, key, shown in (
        ("held out, before -> after", "held_out", _ends),
        (f"metrics, mean of the last {100 // LAST_SHARE} % of the steps", "last_metrics", _metric),
        ("what they cost", "usage", _cost),
    ):
        if found[key]:
            say(f"\n{title}")
            rows = [(name, *(shown(value, name) for value in pair), _ratio(pair)) for name, pair in found[key].items()]
            print_table(("", ">A", ">B", ">B / A"), rows)


def differences(first: Any, second: Any) -> dict[str, list[Any]]:
    """Path -> [A's value, B's value] where two specs differ; None = it has no such field."""
    a, b = dict(_leaves(first)), dict(_leaves(second))
    paths = [path for path in dict.fromkeys([*a, *b]) if path.partition(".")[0] not in IGNORED]
    return {path: [a.get(path), b.get(path)] for path in paths if a.get(path) != b.get(path)}


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of what is no mapping. Rows count: which they are is a long list."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _leaves(item, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
        if path.endswith("rows"):
            yield path, f"{len(value)} rows {_hash(value)}"
            return
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}.{index}")
    else:
        yield path, value


def _hash(value: Any) -> str:
    """Tells two lists of rows apart."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def _both(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, list[Any]]:
    return {name: [a.get(name), b.get(name)] for name in dict.fromkeys([*a, *b])}


def _held_out(side: Side) -> dict[str, Any]:
    """Measure, or measure of a teacher or domain -> [before, after]."""
    if not side.evaluations:
        return {}
    first, last = side.evaluations[0], side.evaluations[-1]
    found = {name: [first.get(name), last[name]] for name in MEASURES if last.get(name) is not None}
    for kind in ("by_teacher", "by_domain"):
        parts = last.get(kind) or {}
        for part in parts if len(parts) > 1 else ():
            earlier = (first.get(kind) or {}).get(part, {})
            names = [name for name in MEASURES if parts[part].get(name) is not None]
            found |= {f"{name} of {part}": [earlier.get(name), parts[part][name]] for name in names}
    return found


def _last_metrics(side: Side) -> dict[str, float]:
    points = side.points[-max(1, len(side.points) // LAST_SHARE) :]
    found = {}
    for name in METRICS:
        values = [value for point in points if (value := point.values.get(name)) is not None]
        if values:
            found[name] = sum(values) / len(values)
    return found


def _usage(side: Side) -> dict[str, float]:
    job = side.job
    found: dict[str, float] = {"steps": job.progress.step}
    if job.started_at and job.finished_at:
        begin, end = (datetime.fromisoformat(moment) for moment in (job.started_at, job.finished_at))
        found["seconds"] = (end - begin).total_seconds()
    return found | {name: value for name, value in (job.usage or {}).items() if value}


def _metric(value: float | None, name: str) -> str:
    return number(value)


def _ends(pair: Sequence[float | None] | None, name: str) -> str:
    return "-" if pair is None else " -> ".join(number(value) for value in pair)


def _cost(value: float | None, name: str) -> str:
    if value is None:
        return "-"
    return duration(value) if name == "seconds" or name.endswith("_s") else count(value)


def _ratio(pair: Iterable[Any]) -> str:
    """How B's (last) value compares with A's."""
    a, b = ((value[-1] if isinstance(value, list) else value) for value in pair)
    if a is None or b is None or not (math.isfinite(a) and math.isfinite(b)) or a <= 0 or b < 0:
        return ""
    return f"{b / a:.2f}"


def _short(value: Any) -> str:
    if value is None:
        return "-"
    text = value if isinstance(value, str) else str(value)
    return text if len(text) <= MAX_VALUE else text[: MAX_VALUE - 3] + "..."
