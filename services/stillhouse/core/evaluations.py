"""What follows from held-out evaluations: which checkpoint is the best, and whether the job may end.

Both are functions of the evaluations that lie beside the job's artifacts, so any trainer that takes a job over decides
the same, and the oracle can check it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse.core.blobs import JobArtifacts, read_json, unsealed
from stillhouse.core.errors import CorruptError, NotFoundError
from stillhouse.core.spec import EarlyStopSpec, JobSpec
from stillhouse.core.spec_evaluation import Mode, mode_of


@dataclass(frozen=True, slots=True)
class Best:
    """The best of some evaluations."""

    step: int
    metric: str
    mode: Mode
    value: float


def value_of(evaluation: Mapping[str, Any], metric: str) -> float | None:
    """A measure by its name in a job; None if the evaluation has none, or it is not finite."""
    name, _, teacher = metric.partition("/")
    found: Any = evaluation.get("by_teacher", {}).get(teacher, {}) if teacher else evaluation
    value = found.get("pass_at_k", {}).get(name.removeprefix("pass@")) if name.startswith("pass@") else found.get(name)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def best_metric(spec: JobSpec) -> tuple[str, Mode]:
    """The measure that makes a checkpoint the best, and which way."""
    best = spec.evaluation.best
    if best is not None:
        return best.metric, mode_of(best.metric, best.mode)
    return ("reverse_kl", "min") if spec.teachers else ("accuracy", "max")


def best_of(spec: JobSpec, evaluations: Sequence[Mapping[str, Any]], steps: Collection[int]) -> Best | None:
    """The best of the evaluations of `steps`; of equals the later. None if there is none."""
    metric, mode = best_metric(spec)
    sign = 1 if mode == "min" else -1
    values = {int(each["step"]): value_of(each, metric) for each in evaluations if int(each["step"]) in steps}
    known = [(sign * value, -step) for step, value in values.items() if value is not None]
    if not known:
        return None
    value, step = min(known)
    return Best(-step, metric, mode, sign * value)


def is_over(early: EarlyStopSpec, mode: Mode, values: Sequence[float]) -> bool:
    """Whether the newest of `values` ends the job, or an earlier one did.

    plateau is the rule of Keras' EarlyStopping: what counts as better than the best must be so by more than min_delta.
    """
    best, waited = math.inf, 0
    for value in (value if mode == "min" else -value for value in values):
        if early.when == "plateau":
            is_bad = not value < best - early.min_delta
            best = best if is_bad else value
        else:
            is_bad = value > best + early.min_delta
            best = min(best, value)
        waited = waited + 1 if is_bad else 0
        if waited >= early.patience:
            return True
    return False


def stopping(spec: JobSpec, evaluations: Sequence[Mapping[str, Any]]) -> tuple[str, list[float]] | None:
    """The measure and its values if evaluations say that the job may end; only those of its last stage count."""
    early = spec.evaluation.early_stop
    if early is None:
        return None
    metric, mode = best_metric(spec)
    if early.metric is not None:
        metric, mode = early.metric, mode_of(early.metric, early.mode)
    elif early.mode is not None:
        mode = early.mode
    first = spec.spans()[-1].first_step
    ordered = sorted((each for each in evaluations if each["step"] >= first), key=lambda each: each["step"])
    values = [value for each in ordered if (value := value_of(each, metric)) is not None]
    return (metric, values) if is_over(early, mode, values) else None


def read_evaluations(artifacts: JobArtifacts) -> list[dict[str, Any]]:
    """All that can be read, by step."""
    found: dict[int, dict[str, Any]] = {}
    for path in artifacts.evaluations.glob("[0-9]*.json"):
        try:
            document = read_json(path)
            found[int(document["step"])] = document
        except (CorruptError, NotFoundError, KeyError, TypeError, ValueError):
            continue  # the oracle names it; a decision goes by what can be read
    return [found[step] for step in sorted(found)]


def read_stop(artifacts: JobArtifacts) -> dict[str, Any] | None:
    """The recorded early end of a job: {stop_step, step, metric, values, reason}; None = it has none.

    Raises:
        CorruptError: it cannot be read, so nobody knows when the job ends.
    """
    try:
        return unsealed(artifacts.stop)
    except NotFoundError:
        return None


def read_best(artifacts: JobArtifacts) -> dict[str, Any] | None:
    """The best checkpoint so far: {checkpoint, step, metric, mode, value}; None if none is known."""
    try:
        return unsealed(artifacts.best_checkpoint)
    except (NotFoundError, CorruptError):
        return None


def folder_of(artifacts: JobArtifacts, checkpoint: str) -> Path:
    """Of a checkpoint of the job by its id, `ckpt_{epoch}-{name}`."""
    epoch, _, name = checkpoint.removeprefix("ckpt_").partition("-")
    return artifacts.manifests(int(epoch)) / name


def stop_step(spec: JobSpec, artifacts: JobArtifacts) -> int:
    """Optimizer steps of the job: as planned, or fewer if it was recorded that evaluations end it.

    Raises:
        CorruptError: the record of its end cannot be read.
    """
    stop = read_stop(artifacts)
    return spec.stop_step() if stop is None else min(spec.stop_step(), int(stop["stop_step"]))
