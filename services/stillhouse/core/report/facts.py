"""The report of a job, read from the files beside its artifacts: the same while it runs, at its end and afterwards."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from stillhouse.core.blobs import JobArtifacts, read_json, read_jsonl
from stillhouse.core.errors import CorruptError, NotFoundError
from stillhouse.core.evaluations import read_best, read_evaluations
from stillhouse.core.queue.jobs import JobRecord
from stillhouse.core.schemas.report import Comparison, Curve, Report, Shown

POINTS: Final = 300
"""Of a curve, at most: more than a page has pixels for says nothing more."""
WARNINGS: Final = 50
COMPARED: Final = (
    "reverse_kl",
    "accuracy",
    "teacher_nll_greedy",
    "repeated_4grams",
    "mean_length",
    "truncated",
    "ended",
)
CURVES: Final = (
    "loss/reverse_kl/",
    "loss/total",
    "lr",
    "completion/length_mean",
    "completion/truncated_fraction",
    "staleness/",
    "sample/tokens_per_s",
    "score/tokens_per_s",
    "train/tokens_per_s",
    "mismatch/logprob_abs_mean",
    "reward/mean",
    "student/entropy",
)
"""Metrics of the steps that are drawn: by their name, or by its beginning where it ends with a slash."""


def make_report(record: JobRecord, artifacts: JobArtifacts) -> Report:
    """The report of a job as it is now."""
    points = list({int(point["step"]): point for point in read_jsonl(artifacts.metrics)}.values())
    points.sort(key=lambda point: point["step"])
    evaluations = read_evaluations(artifacts)
    result = record.result or {}
    best = read_best(artifacts)
    compared = list(_comparisons(evaluations, result.get("exported_step")))
    return Report(
        job_id=record.id,
        name=str(record.spec.get("name") or ""),
        status=record.status,
        status_message=record.status_message,
        created_at=record.created_at,
        started_at=record.started_at,
        finished_at=record.finished_at,
        steps=record.step,
        stop_step=record.stop_step,
        summary=_summary(record, compared),
        asked=_asked(record.spec),
        spec=without_rows(record.spec),
        comparisons=compared,
        curves=[*_step_curves(points), *_held_out_curves(evaluations)],
        samples=_samples(evaluations, result.get("exported_step")),
        warnings=_warnings(artifacts),
        preflight=_preflight(artifacts),
        usage={name: float(value) for name, value in record.usage.items()},
        seconds=_seconds(points),
        best_checkpoint=best,
        early_stop=result.get("early_stop"),
        load=_load(record),
    )


def without_rows(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A job's spec without its inline rows, which may be megabytes."""
    short = dict(spec)
    short["stages"] = [{**stage, "data": {**stage["data"], "rows": None}} for stage in spec.get("stages", [])]
    evaluation = dict(spec.get("evaluation") or {})
    if evaluation.get("data"):
        evaluation["data"] = {**evaluation["data"], "rows": None}
    return {**short, "evaluation": evaluation}


def _summary(record: JobRecord, compared: Sequence[Comparison]) -> str:
    told = {"reverse_kl": "held-out reverse KL to the teachers", "accuracy": "held-out accuracy"}
    parts = [
        f"{told[each.measure]} {each.before:.3g} -> {each.after:.3g}"
        for each in compared
        if not each.domain and each.measure in told
    ]
    text = f"{record.step} of {record.stop_step} steps"
    return f"{text}; {', '.join(parts)}" if parts else text


def _asked(spec: Mapping[str, Any]) -> dict[str, str]:
    teachers = {name: teacher.get("model") or "an average of the student" for name, teacher in spec["teachers"].items()}
    asked = {
        "student": f"{spec['student']['model']}{' with a low-rank adapter' if spec['student'].get('lora') else ''}",
        "teachers": ", ".join(f"{name}: {model}" for name, model in teachers.items()) or "none",
    }
    for stage in spec["stages"]:
        schedule, loss = stage["schedule"], stage["loss"]
        kind = loss.get("divergence") or ""
        asked[f"stage {stage['name']}"] = (
            f"{loss['objective']}{f' ({kind})' if kind else ''}, {schedule['steps']} steps of "
            f"{schedule['prompts_per_step']} prompts x {schedule['group_size']}, "
            f"learning rate {stage['optimizer']['lr']:g}"
        )
    evaluation = spec.get("evaluation") or {}
    if evaluation.get("data"):
        every = f", every {evaluation['every_steps']} steps" if evaluation.get("every_steps") else ""
        asked["evaluation"] = f"{evaluation['num_prompts']} held-out prompts at most, before and after{every}"
    return asked


def _comparisons(evaluations: Sequence[Mapping[str, Any]], exported: int | None) -> Iterator[Comparison]:
    """Before beside after, of all prompts and of each of several domains."""
    if len(evaluations) < 2:
        return
    before, after = evaluations[0], evaluations[-1]
    after = next((each for each in evaluations if each["step"] == exported), after)
    domains = {"": (before, after)}
    if len(after.get("by_teacher", {})) > 1:
        earlier = before.get("by_teacher", {})
        domains |= {name: (earlier.get(name, {}), found) for name, found in after["by_teacher"].items()}
    for domain, (first, last) in domains.items():
        found = {name: (first.get(name), last.get(name)) for name in COMPARED}
        passed = last.get("pass_at_k", {})
        found |= {f"pass@{k}": (first.get("pass_at_k", {}).get(k), value) for k, value in passed.items()}
        for name, (was, now) in found.items():
            if was is not None and now is not None:
                yield Comparison(measure=name, domain=domain, before=was, after=now)


def _step_curves(points: Sequence[Mapping[str, Any]]) -> list[Curve]:
    names = sorted({name for point in points for name in point["values"] if _is_drawn(name)})
    return [
        _thinned(name, [(int(p["step"]), p["values"][name]) for p in points if name in p["values"]]) for name in names
    ]


def _is_drawn(name: str) -> bool:
    return any(name.startswith(each) if each.endswith("/") else name == each for each in CURVES)


def _held_out_curves(evaluations: Sequence[Mapping[str, Any]]) -> list[Curve]:
    found: dict[str, list[tuple[int, Any]]] = {}
    for each in evaluations:
        parts = {"": each, **(each["by_teacher"] if len(each.get("by_teacher", {})) > 1 else {})}
        for domain, measures in parts.items():
            values = {name: measures.get(name) for name in ("reverse_kl", "accuracy", "mean_length", "truncated")}
            values |= {f"pass@{k}": value for k, value in measures.get("pass_at_k", {}).items()}
            for name, value in values.items():
                if value is not None:
                    label = f"held_out/{name}/{domain}" if domain else f"held_out/{name}"
                    found.setdefault(label, []).append((int(each["step"]), value))
    return [_thinned(name, values) for name, values in found.items()]


def _thinned(name: str, values: Sequence[tuple[int, Any]]) -> Curve:
    """At most POINTS points; each is the mean of as many neighbours."""
    width = math.ceil(len(values) / POINTS)
    steps, means = [], []
    for first in range(0, len(values), width):
        part = values[first : first + width]
        known = [float(v) for _, v in part if isinstance(v, int | float) and math.isfinite(v)]
        steps.append(part[-1][0])
        means.append(sum(known) / len(known) if known else None)
    return Curve(name=name, steps=steps, values=means)


def _samples(evaluations: Sequence[Mapping[str, Any]], exported: int | None) -> list[Shown]:
    if not evaluations:
        return []
    before, after = evaluations[0], evaluations[-1]
    after = next((each for each in evaluations if each["step"] == exported), after)
    later = {each["prompt"]: each for each in after.get("samples", [])}
    return [
        Shown(
            prompt=each["prompt"],
            before=each["student"],
            after=later.get(each["prompt"], {}).get("student", ""),
            teacher=each.get("teacher", ""),
        )
        for each in before.get("samples", [])
    ]


def _warnings(artifacts: JobArtifacts) -> list[str]:
    """What events warned of, each once, with how often."""
    counts: dict[str, int] = {}
    for event in read_jsonl(artifacts.events):
        if event.get("level") in ("warning", "error"):
            message = str(event.get("message"))
            counts[message] = counts.get(message, 0) + 1
    shown = [f"{message} ({count} times)" if count > 1 else message for message, count in counts.items()]
    return shown[:WARNINGS] + ([f"and {len(shown) - WARNINGS} more"] if len(shown) > WARNINGS else [])


def _preflight(artifacts: JobArtifacts) -> list[dict[str, Any]]:
    try:
        checks = read_json(artifacts.preflight).get("checks", [])
    except (NotFoundError, CorruptError):
        return []
    kept = ("name", "verdict", "message", "fix")
    return [
        {name: check.get(name) or "" for name in kept}
        for check in checks
        if check.get("verdict") in ("warning", "error")
    ]


def _seconds(points: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for point in points:
        for name, value in point["values"].items():
            if name.startswith("time/") and name != "time/step_s" and isinstance(value, int | float):
                phase = name.removeprefix("time/").removesuffix("_s")
                found[phase] = found.get(phase, 0.0) + value
    return {phase: round(value, 2) for phase, value in found.items()}


def _load(record: JobRecord) -> str:
    return (
        f"# stillhouse download {record.id} -o student\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("student")\n'
        'tokenizer = AutoTokenizer.from_pretrained("student")\n'
    )
