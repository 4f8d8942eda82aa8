"""From OpenAI's request for a fine-tuning job to ours, and the other way for what is wrong with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Final, Literal

from pydantic import ConfigDict, Field, ValidationError

from stillhouse.core.errors import MalformedError
from stillhouse.core.explain import Finding, explain
from stillhouse.core.spec import JobSpec, OptimizerSpec, StageSpec
from stillhouse.core.spec_base import Closed
from stillhouse.gateway.problems import InvalidError

Auto = Literal["auto"]
DEFAULT_EPOCHS: Final = 3
DEFAULT_BATCH: Final = 16
DEFAULT_LR: Final[float] = OptimizerSpec().lr
TEACHER: Final = "teacher"
"""Name of the teacher that `teacher` names."""
_STAGE_KEYS: Final = frozenset(StageSpec.model_fields) - {"data", "name"}
_JOB_KEYS: Final = frozenset(JobSpec.model_fields) - {"stages", "teachers", "name", "seed", "metadata"}
_PATHS: Final = (
    ("stages.0.data.file", "training_file"),
    ("evaluation.data.file", "validation_file"),
    ("student.model", "model"),
    (f"teachers.{TEACHER}.model", "method.distillation.teacher"),
    ("stages.0.", "method.distillation."),
    ("seed", "seed"),
    ("metadata", "metadata"),
    ("name", "suffix"),
)
"""Beginnings of paths: in our job, in the request. What is not listed stands in method.distillation."""


class RefusedError(InvalidError, MalformedError):
    """A request that cannot be accepted, as OpenAI answers it: status 400."""

    code = "invalid_request"


class HyperparametersIn(Closed):
    """OpenAI's words for how much is trained, and how fast."""

    n_epochs: Auto | Annotated[int, Field(ge=1, le=10_000)] = "auto"
    """Passes over the training file; auto = 3."""
    batch_size: Auto | Annotated[int, Field(ge=1, le=4096)] = "auto"
    """Prompts per step; auto = 16, or all rows if there are fewer."""
    learning_rate_multiplier: Auto | Annotated[float, Field(gt=0, le=100_000)] = "auto"
    """Times the default peak rate of 1e-5; auto = 1."""


class Distillation(Closed):
    """How to distil. Beside these fields: every field of a stage but `data` and `name`, and every field of a job that
    has no place of its own in the request (student, evaluation, checkpoint, priority ...)."""

    model_config = ConfigDict(extra="allow")

    teacher: str | None = Field(default=None, max_length=200)
    """The teacher's registered name, or a checkpoint of a job; `teachers` if there are several."""
    teachers: dict[str, Any] | None = None
    """As in a job."""
    hyperparameters: HyperparametersIn | None = None
    """OpenAI's words for schedule and optimizer."""


class Method(Closed):
    """What is done."""

    type: Literal["distillation"]
    """The student writes, the teacher judges every token, the student learns."""
    distillation: Distillation


class FineTuningRequest(Closed):
    """OpenAI's request for a fine-tuning job, with the method `distillation`."""

    model: str = Field(max_length=200)
    """Registered name of the student."""
    training_file: str = Field(max_length=100)
    """Id of an uploaded file."""
    method: Method
    """What is done."""
    validation_file: str | None = Field(default=None, max_length=100)
    """Id of an uploaded file with held-out prompts: evaluation.data of the job."""
    hyperparameters: HyperparametersIn | None = None
    """The older place of method.distillation.hyperparameters."""
    suffix: str | None = Field(default=None, max_length=64)
    """Name of the job."""
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    """Seed of the job; 0 if it is left out."""
    metadata: dict[str, str] | None = None
    """As in a job."""
    integrations: Annotated[list[Any], Field(max_length=0)] | None = None
    """Has to be empty: trackers are named in the job."""


def to_spec(request: FineTuningRequest, num_rows: int) -> JobSpec:
    """The job that a request means; `num_rows` = rows of its training file.

    Raises:
        RefusedError: names the field of the request.
    """
    method = request.method.distillation
    extra = dict(method.model_extra or {})
    unknown = sorted(extra.keys() - _STAGE_KEYS - _JOB_KEYS)
    if unknown:
        fix = f"fields are {', '.join(sorted({'teacher', 'teachers', 'hyperparameters'} | _STAGE_KEYS | _JOB_KEYS))}"
        raise RefusedError([Finding(f"method.distillation.{unknown[0]}", f"unknown key '{unknown[0]}'", fix)])
    stage = {name: value for name, value in extra.items() if name in _STAGE_KEYS}
    job = {name: value for name, value in extra.items() if name in _JOB_KEYS}
    _set_amount(stage, _hyperparameters(request), num_rows)
    if "recipe" not in stage:
        stage.setdefault("loss", {"objective": "full_vocabulary"})
    stage["data"] = {"file": request.training_file}
    document: dict[str, Any] = {**job, "stages": [stage], "teachers": _teachers(method)}
    document["student"] = {**_section(job, "student"), "model": request.model}
    if request.validation_file:
        document["evaluation"] = {**_section(job, "evaluation"), "data": {"file": request.validation_file}}
    given = {"name": request.suffix, "seed": request.seed, "metadata": request.metadata}
    document |= {name: value for name, value in given.items() if value is not None}
    try:
        return JobSpec.model_validate(document)
    except ValidationError as error:
        errors = [{**item, "loc": ("body", *item["loc"])} for item in error.errors()]
        raise RefusedError(translated(explain(errors, document, JobSpec))) from None


def translated(findings: Sequence[Finding]) -> list[Finding]:
    """Findings with the paths that the fields have in the request."""
    return [replace(finding, param=_request_path(finding.param)) for finding in findings]


def _request_path(param: str | None) -> str | None:
    if not param or param == "Idempotency-Key":
        return param
    for ours, theirs in _PATHS:
        if param == ours.rstrip(".") or param.startswith(ours if ours.endswith(".") else f"{ours}."):
            return theirs.rstrip(".") + ("." if param[len(ours) :] and ours.endswith(".") else "") + param[len(ours) :]
    return f"method.distillation.{param}"


def _teachers(method: Distillation) -> dict[str, Any]:
    if method.teacher and method.teachers:
        message = "'teacher' and 'teachers' are both given"
        raise RefusedError([Finding("method.distillation.teacher", message, "give one of the two")])
    return {TEACHER: {"model": method.teacher}} if method.teacher else method.teachers or {}


def _section(document: dict[str, Any], name: str) -> dict[str, Any]:
    """A part of the job that the request may give in part."""
    section = document.get(name) or {}
    if not isinstance(section, dict):
        raise RefusedError([Finding(f"method.distillation.{name}", "is not an object", "give its fields")])
    return section


def _hyperparameters(request: FineTuningRequest) -> HyperparametersIn:
    method = request.method.distillation
    if request.hyperparameters and method.hyperparameters:
        message = "is given here and in method.distillation.hyperparameters"
        raise RefusedError([Finding("hyperparameters", message, "leave one of the two out")])
    return request.hyperparameters or method.hyperparameters or HyperparametersIn()


def _set_amount(stage: dict[str, Any], wanted: HyperparametersIn, num_rows: int) -> None:
    """Steps, prompts per step and learning rate, from OpenAI's words unless ours are given; a recipe gives its own."""
    schedule, optimizer = dict(_section(stage, "schedule")), dict(_section(stage, "optimizer"))
    for word, value, section, field in (
        ("n_epochs", wanted.n_epochs, schedule, "steps"),
        ("batch_size", wanted.batch_size, schedule, "prompts_per_step"),
        ("learning_rate_multiplier", wanted.learning_rate_multiplier, optimizer, "lr"),
    ):
        if value != "auto" and field in section:
            message = f"says the same as '{field}' in method.distillation"
            raise RefusedError([Finding(f"hyperparameters.{word}", message, "leave one of the two out")])
    if wanted.batch_size != "auto":
        schedule["prompts_per_step"] = wanted.batch_size
    elif "recipe" not in stage:
        schedule.setdefault("prompts_per_step", max(1, min(DEFAULT_BATCH, num_rows)))
    if "steps" not in schedule:
        epochs = DEFAULT_EPOCHS if wanted.n_epochs == "auto" else wanted.n_epochs
        batch = schedule.get("prompts_per_step", DEFAULT_BATCH)
        if isinstance(batch, int) and batch > 0:  # else the job's own check says what is wrong with it
            schedule["steps"] = math.ceil(epochs * num_rows / batch)
    if wanted.learning_rate_multiplier != "auto":
        optimizer["lr"] = wanted.learning_rate_multiplier * DEFAULT_LR
    stage["schedule"] = schedule
    if optimizer:
        stage["optimizer"] = optimizer
