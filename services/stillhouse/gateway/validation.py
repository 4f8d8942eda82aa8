"""Static pre-flight: what can be known about a job from hashes, configs and tokenizer.json, before any GPU is touched.

Every check is a small function over a `Case` that yields findings; CHECKS is the list. No torch, under 2 s.
What needs the models themselves is checked by a trainer: see trainer/preflight.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final

from stillhouse.core.checkpoints import Models, Settled
from stillhouse.core.estimate import estimate
from stillhouse.core.explain import MAX_FINDINGS, Finding
from stillhouse.core.models import ModelEntry
from stillhouse.core.schemas import Check, Estimate, Preflight
from stillhouse.core.schemas.preflight import worst
from stillhouse.core.spec import DataSpec, JobSpec, Row, StageSpec
from stillhouse.gateway.judging import check_mixtures, check_verifiers
from stillhouse.gateway.lengths import BYTES_PER_TOKEN, MAX_ROLLOUT_BYTES, check_lengths
from stillhouse.gateway.problems import InvalidError
from stillhouse.gateway.reach import Reach
from stillhouse.gateway.reading import (
    check_chat_template,
    check_ends,
    check_heads,
    check_lineage,
    check_sampling,
    check_template_arguments,
    check_tokenizers,
)
from stillhouse.gateway.references import (
    NamedModels,
    check_models_exist,
    check_stage_teachers,
    check_start,
    look_up_models,
)
from stillhouse.gateway.rows import Rows, rows_of


@dataclass(frozen=True, slots=True)
class Source:
    """Rows of one data source, with where they came from."""

    param: str
    """Path of the data source in the spec."""
    data: DataSpec
    table: Rows
    max_tokens: int
    """Longest completion to a row of this source, tokens."""
    stage: StageSpec | None
    """Stage that trains on it; None = held-out."""

    def recorded_bytes(self) -> int:
        """Of a completion token beside the usual: likeliest tokens, entropy; the teacher's tokens and spans of text."""
        if self.stage is None:
            return 0
        select = self.stage.tokens.select
        spans = 12 * (self.stage.loss.payload() == "spans")
        return 4 * self.stage.loss.record_top_k() + 4 * (select is not None and select.by == "entropy") + spans

    def queue_tokens(self) -> int:
        """Longest rollout that a queue entry carries, prompt and completion, tokens."""
        return max(0, MAX_ROLLOUT_BYTES - self.max_tokens * self.recorded_bytes()) // BYTES_PER_TOKEN

    @property
    def rows(self) -> Sequence[Row]:
        return self.table.rows

    @property
    def file(self) -> str | None:
        return self.data.file

    def where(self, index: int) -> str:
        """Path of a row; a row of a file has none of its own."""
        return f"{self.param}.file" if self.file else f"{self.param}.rows.{index}"

    def name(self, index: int) -> str:
        """A row, for people."""
        return f"line {self.table.lines[index]} of {self.file}" if self.file else f"row {index}"


@dataclass(frozen=True, slots=True)
class Case:
    """A job with everything it names looked up, as far as it exists."""

    spec: JobSpec
    models: NamedModels
    training: list[Source]
    evaluation: Source | None
    missing_files: list[tuple[str, str]]
    """(path in the spec, file id) of files that are not there."""

    @property
    def student(self) -> ModelEntry | None:
        return self.models.student

    @property
    def teachers(self) -> dict[str, ModelEntry | None]:
        return self.models.teachers

    def known_teachers(self) -> dict[str, ModelEntry]:
        """Those whose models exist."""
        return {name: entry for name, entry in self.teachers.items() if entry is not None}

    def sources(self) -> list[Source]:
        """All rows the student answers."""
        return [*self.training, *([self.evaluation] if self.evaluation else [])]

    def teachers_of(self, row: Row) -> list[str]:
        """Names of the teachers that judge a row; none = it names none and there are several."""
        return list(row.mixture(self.spec.teachers))

    def domain_of(self, row: Row) -> str:
        """The heaviest of them; "" = none."""
        return next(iter(self.teachers_of(row)), "")

    def drawn(self, source: Source, row: Row) -> list[str]:
        """Names of the teachers that judge a row, if its source ever draws it: a mix leaves rows out."""
        mix = source.data.mix
        return self.teachers_of(row) if mix is None or self.domain_of(row) in mix else []


Looks = Callable[[Case], Iterator[Finding]]


@dataclass(frozen=True, slots=True)
class Inspection:
    """What was found."""

    found: list[tuple[str, str, list[Finding]]]
    """(name, what it proves, what it found) of every check."""
    case: Case

    def errors(self) -> list[Finding]:
        """What refuses the job."""
        return [finding for _, _, findings in self.found for finding in findings if not finding.is_warning]

    def report(self) -> Preflight:
        """For people."""
        checks = []
        for name, proves, findings in self.found:
            checks += [as_check(name, each) for each in findings] or [Check(name=name, verdict="ok", message=proves)]
        return Preflight(is_live=False, verdict=worst(checks), checks=checks, estimate=self._estimate())

    def _estimate(self) -> Estimate | None:
        teachers = self.case.known_teachers()
        if self.case.student is None or len(teachers) < len(self.case.teachers):
            return None
        return estimate(self.case.spec, self.case.student, teachers)


def inspect(spec: JobSpec, models: Models, reach: Reach) -> Inspection:
    """All checks of a job. Blocks for as long as counting tokens takes: call it in a thread."""
    case = look_up(spec, models, reach)
    return Inspection([(name, proves, list(islice(check(case), MAX_FINDINGS))) for name, proves, check in CHECKS], case)


def as_check(name: str, finding: Finding) -> Check:
    """A finding in a report."""
    return Check(
        name=name,
        verdict="warning" if finding.is_warning else "error",
        message=finding.message,
        evidence=dict(finding.evidence),
        fix=finding.fix,
        param=finding.param,
    )


def preflight(spec: JobSpec, models: Models, reach: Reach) -> dict[str, Settled]:
    """Refuse a job that cannot work; gives what its references to checkpoints mean.

    Raises:
        InvalidError: every finding with path, both sides and the fix.
    """
    inspection = inspect(spec, models, reach)
    if errors := inspection.errors():
        raise InvalidError(errors)
    return inspection.case.models.settled


def misshapen(findings: Sequence[Finding]) -> Preflight:
    """The report of a body that is no job."""
    message = "not looked at: what was sent is no job yet, see the check of the format"
    skipped = [Check(name=name, verdict="skipped", message=message) for name, _, _ in CHECKS]
    checks = [as_check("format", finding) for finding in findings] + skipped
    return Preflight(is_live=False, verdict="error", checks=checks)


def look_up(spec: JobSpec, models: Models, reach: Reach) -> Case:
    """Models and rows that a spec names, as far as its owner may."""
    missing: list[tuple[str, str]] = []

    def source(param: str, data: DataSpec, max_tokens: int, stage: StageSpec | None = None) -> Source:
        if data.rows is not None:
            return Source(param, data, Rows(data.rows, range(len(data.rows))), max_tokens, stage)
        assert data.file is not None, "a data source has rows or a file"
        path = models.artifacts.file(data.file)
        if not reach.has_file(data.file):
            missing.append((f"{param}.file", data.file))
            return Source(param, data, Rows((), ()), max_tokens, stage)
        return Source(param, data, rows_of(path), max_tokens, stage)

    training = [
        source(f"stages.{index}.data", stage.data, stage.sampling.max_tokens, stage)
        for index, stage in enumerate(spec.stages)
    ]
    evaluation = spec.evaluation
    return Case(
        spec=spec,
        models=look_up_models(spec, models, reach),
        training=training,
        evaluation=source("evaluation.data", evaluation.data, evaluation.max_tokens) if evaluation.data else None,
        missing_files=missing,
    )


def check_files(case: Case) -> Iterator[Finding]:
    """Every file was uploaded."""
    for param, file_id in case.missing_files:
        yield Finding(param, f"there is no file '{file_id}'", "upload it with POST /v1/files and use the id it answers")


def check_routes(case: Case) -> Iterator[Finding]:
    """Every row is routed to a teacher that the job has, if it has any."""
    names = sorted(case.spec.teachers)
    have = ", ".join(names) or "none"
    for source in case.sources():
        for index, row in source.table.where(lambda row: not set(case.teachers_of(row) or [""]) <= set(names)):
            routed = case.teachers_of(row)
            if not routed and names:
                message = f"{source.name(index)} names no teacher and the job has {have}"
                yield Finding(source.where(index), message, "set the row's 'teacher'")
            for teacher in routed:
                if teacher not in case.spec.teachers:
                    message = f"{source.name(index)} is routed to '{teacher}', the job has {have}"
                    yield Finding(source.where(index), message, "use one of these names, or add the teacher")


def check_teachers_used(case: Case) -> Iterator[Finding]:
    """A teacher that no row is routed to is a typing mistake somewhere, and so is one that nothing asks."""
    if case.missing_files:
        return
    if not any(stage.needs_teacher() for stage in case.spec.stages) and case.evaluation is None:
        for name in case.spec.teachers:
            message = "the loss asks no teacher, and there is no held-out evaluation that would"
            yield Finding(f"teachers.{name}", message, "remove it, or add evaluation.data")
        return
    rows = [(source, row) for source in case.training for row, _ in source.table.examples()]
    used = {name for _, row in rows for name in case.teachers_of(row)}
    drawn = {name for source, row in rows for name in case.drawn(source, row)}
    for name in case.spec.teachers:
        if name not in used:
            yield Finding(f"teachers.{name}", "no row is routed to this teacher", "remove it, or route rows to it")
        elif name not in drawn:
            message = "'data.mix' has no share for this teacher, so that its rows are never drawn"
            yield Finding(f"teachers.{name}", message, "give it a share, or remove the teacher and its rows")


def check_mix(case: Case) -> Iterator[Finding]:
    """Every domain of a mix is a teacher of the job and has rows."""
    for source in case.training:
        rows = {case.domain_of(row) for row, _ in source.table.examples()}
        for name in source.data.mix or ():
            param = f"{source.param}.mix.{name}"
            if name not in case.spec.teachers:
                have = ", ".join(sorted(case.spec.teachers)) or "none"
                yield Finding(param, f"there is no teacher '{name}', the job has {have}", "use one of these names")
            elif rows and name not in rows:
                message = f"no row is routed to '{name}'; there are rows for {', '.join(sorted(rows))}"
                yield Finding(param, message, "remove its share, or route rows to it")


def check_completions(case: Case) -> Iterator[Finding]:
    """Rows have completions where a stage trains on those; elsewhere they may have them."""
    for source in case.training:
        if source.stage is None or not source.stage.reads_completions():
            continue
        for index, row in source.table.where(lambda row: not (row.completion or "").strip()):
            message = f"{source.name(index)}: 'completion' is {'missing' if row.completion is None else 'empty'}, "
            message += f"and the stage trains on it (on_policy_fraction {source.stage.on_policy_fraction:g})"
            yield Finding(source.where(index), message, "add it, or set off_policy_source to teacher")


def check_held_out(case: Case) -> Iterator[Finding]:
    """Held-out prompts are not trained on: the result would mean nothing."""
    if case.evaluation is None:
        return
    held_out = case.evaluation
    for prompt, index in held_out.table.prompts.items():
        for source in case.training:
            if (twin := source.table.prompts.get(prompt)) is not None:
                message = f"held-out {held_out.name(index)} is also a training prompt ({source.name(twin)})"
                yield Finding(held_out.where(index), message, "remove it from one of the two")
                break


def check_evaluation_size(case: Case) -> Iterator[Finding]:
    """There are as many held-out prompts as are asked for."""
    evaluation = case.spec.evaluation
    if case.evaluation is None or case.missing_files:
        return
    rows = len(case.evaluation.rows)
    asked = "num_prompts" in evaluation.model_fields_set
    if asked and evaluation.num_prompts > rows:
        yield Finding(
            "evaluation.num_prompts",
            f"{evaluation.num_prompts} prompts are asked for, evaluation.data has {rows}",
            f"use at most {rows}, or add held-out rows",
        )


CHECKS: Final[tuple[tuple[str, str, Looks], ...]] = (
    ("models", "every model and every checkpoint that the job names is there", check_models_exist),
    ("init_from", "the weights it begins with are those of the student's model", check_start),
    ("stage_teachers", "students that teach at the end of a stage are asked after it only", check_stage_teachers),
    ("tokenizers", "student and teachers cut texts into the same tokens, or the loss compares texts", check_tokenizers),
    ("chat_template", "student and teachers read prompts by the same chat template", check_chat_template),
    ("template_arguments", "the chat templates read every argument", check_template_arguments),
    ("ends", "the student's model says which token ends a completion, and stop tokens exist", check_ends),
    ("heads", "the output heads have a row for every token, and no padding or the same", check_heads),
    ("lineage", "student and teachers are of one family", check_lineage),
    ("sampling", "temperature and filters are usual ones", check_sampling),
    ("files", "every file was uploaded", check_files),
    ("routes", "every row has a teacher of the job", check_routes),
    ("mix", "every share is of a teacher with rows", check_mix),
    ("mixtures", "several teachers judge a sample only where the loss asks for scores", check_mixtures),
    ("teachers_used", "every teacher is asked", check_teachers_used),
    ("completions", "rows have the completions that are trained on", check_completions),
    ("verifiers", "every row that is judged has a verifier, and what that needs", check_verifiers),
    ("held_out", "held-out prompts are not trained on", check_held_out),
    ("evaluation_size", "there are as many held-out prompts as are asked for", check_evaluation_size),
    ("lengths", "prompts and completions fit into models and queue (counted without the chat template)", check_lengths),
)
"""(name, what it proves, check), in the order of the report."""
