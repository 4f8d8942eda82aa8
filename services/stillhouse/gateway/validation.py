"""Static pre-flight: what can be known about a job from hashes, configs and tokenizer.json, before any GPU is touched.

Every check is a small function over a `Case` that yields findings; CHECKS is the list. No torch, under 2 s.
What needs the models themselves (initial KL, replica agreement, memory) is checked by the trainer while `validating`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from stillhouse.core.checkpoints import Models, Settled
from stillhouse.core.explain import MAX_FINDINGS, Finding
from stillhouse.core.models import ModelEntry
from stillhouse.core.spec import DataSpec, JobSpec, Row, StageSpec
from stillhouse.core.vocabulary import difference, tokenizer_of
from stillhouse.gateway.judging import check_mixtures, check_verifiers
from stillhouse.gateway.problems import InvalidError
from stillhouse.gateway.reading import (
    check_chat_template,
    check_stop_ids,
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

BYTES_PER_TOKEN: Final = 16
"""Of a rollout in the queue: id, sampled log-probability, teacher's answer and one more word, 4 bytes each."""
MAX_ROLLOUT_BYTES: Final = 900 << 10
"""A queue entry holds 1 MiB; the rest is for names, text and the message's own bytes."""
COUNT_BATCH: Final = 256
"""Texts tokenized at once."""


@dataclass(frozen=True, slots=True)
class Source:
    """Rows of one data source, with where they came from."""

    param: str
    """Path of the data source in the spec."""
    data: DataSpec
    rows: list[Row]
    lines: list[int]
    """Line of each row in the file; position for inline rows."""
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
    def file(self) -> str | None:
        return self.data.file

    def where(self, index: int) -> str:
        """Path of a row; a row of a file has none of its own."""
        return f"{self.param}.file" if self.file else f"{self.param}.rows.{index}"

    def name(self, index: int) -> str:
        """A row, for people."""
        return f"line {self.lines[index]} of {self.file}" if self.file else f"row {index}"


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


Check = Callable[[Case], Iterator[Finding]]


def preflight(spec: JobSpec, models: Models) -> dict[str, Settled]:
    """Refuse a job that cannot work; gives what its references to checkpoints mean.

    Blocks for as long as counting tokens takes: call it in a thread.

    Raises:
        InvalidError: every finding with path, both sides and the fix.
    """
    case = look_up(spec, models)
    findings: list[Finding] = []
    for check in CHECKS:
        for finding in check(case):
            findings.append(finding)
            if len(findings) == MAX_FINDINGS:
                raise InvalidError(findings)
    if findings:
        raise InvalidError(findings)
    return case.models.settled


def look_up(spec: JobSpec, models: Models) -> Case:
    """Models and rows that a spec names."""
    missing: list[tuple[str, str]] = []

    def source(param: str, data: DataSpec, max_tokens: int, stage: StageSpec | None = None) -> Source:
        if data.rows is not None:
            return Source(param, data, list(data.rows), list(range(len(data.rows))), max_tokens, stage)
        assert data.file is not None, "a data source has rows or a file"
        path = models.artifacts.file(data.file)
        if not path.is_file():
            missing.append((f"{param}.file", data.file))
            return Source(param, data, [], [], max_tokens, stage)
        lines, rows = zip(*read_rows(path), strict=True)
        return Source(param, data, list(rows), list(lines), max_tokens, stage)

    training = [
        source(f"stages.{index}.data", stage.data, stage.sampling.max_tokens, stage)
        for index, stage in enumerate(spec.stages)
    ]
    evaluation = spec.evaluation
    return Case(
        spec=spec,
        models=look_up_models(spec, models),
        training=training,
        evaluation=source("evaluation.data", evaluation.data, evaluation.max_tokens) if evaluation.data else None,
        missing_files=missing,
    )


def read_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """(line, row) of an uploaded file, which was checked when it came."""
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield number, Row.model_validate_json(line)


def check_files(case: Case) -> Iterator[Finding]:
    """Every file was uploaded."""
    for param, file_id in case.missing_files:
        yield Finding(param, f"there is no file '{file_id}'", "upload it with POST /v1/files and use the id it answers")


def check_routes(case: Case) -> Iterator[Finding]:
    """Every row is routed to a teacher that the job has, if it has any."""
    names = sorted(case.spec.teachers)
    have = ", ".join(names) or "none"
    for source in case.sources():
        for index, row in enumerate(source.rows):
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
    rows = [(source, row) for source in case.training for row in source.rows]
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
        rows = Counter(case.domain_of(row) for row in source.rows)
        for name in source.data.mix or ():
            param = f"{source.param}.mix.{name}"
            if name not in case.spec.teachers:
                have = ", ".join(sorted(case.spec.teachers)) or "none"
                yield Finding(param, f"there is no teacher '{name}', the job has {have}", "use one of these names")
            elif rows and not rows[name]:
                message = f"no row is routed to '{name}'; there are rows for {', '.join(sorted(rows))}"
                yield Finding(param, message, "remove its share, or route rows to it")


def check_completions(case: Case) -> Iterator[Finding]:
    """Rows have completions where a stage trains on those; elsewhere they may have them."""
    for source in case.training:
        if source.stage is None or not source.stage.reads_completions():
            continue
        for index, row in enumerate(source.rows):
            if not (row.completion or "").strip():
                message = f"{source.name(index)}: 'completion' is {'missing' if row.completion is None else 'empty'}, "
                message += f"and the stage trains on it (on_policy_fraction {source.stage.on_policy_fraction:g})"
                yield Finding(source.where(index), message, "add it, or set off_policy_source to teacher")


def check_lengths(case: Case) -> Iterator[Finding]:
    """Prompt and completion fit into the student, the teacher and the queue. Counted without the chat template, so what
    is refused here certainly does not fit. Teachers with another tokenizer count when they read."""
    counted = _with_the_students_tokens(case)
    for source in case.sources():
        readers = list(_readers(case, source, counted))
        fix = "shorten the prompt or lower max_tokens" + (
            " or loss.k" if source.stage and source.stage.loss.record_top_k() else ""
        )
        # a token is at least a byte of text in practically every tokenizer: short texts need no counting
        long = [reader for reader in readers if len(reader.text.encode()) + source.max_tokens > reader.limit]
        for start in range(0, len(long), COUNT_BATCH):
            batch = long[start : start + COUNT_BATCH]
            for reader, tokens in zip(batch, _count(case, batch), strict=True):
                if tokens + source.max_tokens > reader.limit:
                    yield Finding(
                        source.where(reader.index),
                        f"{source.name(reader.index)}: {tokens} prompt tokens + {source.max_tokens} completion tokens "
                        f"are more than {reader.what} of {reader.limit}",
                        fix,
                    )


@dataclass(frozen=True, slots=True)
class _Reader:
    """A text and who has to read it."""

    index: int
    text: str
    limit: int
    what: str


def _with_the_students_tokens(case: Case) -> dict[str, ModelEntry]:
    """The teachers that read as many tokens as the student, by name."""
    student, teachers = case.student, case.teachers.items()
    return {name: entry for name, entry in teachers if student and entry and not difference(student, entry)}


def _readers(case: Case, source: Source, teachers: Mapping[str, ModelEntry]) -> Iterable[_Reader]:
    if case.student is None:
        return
    student_limit = min(case.student.max_sequence_length, source.queue_tokens())
    student_what = f"the max_sequence_length of the student '{case.student.name}'"
    if student_limit == source.queue_tokens():
        student_what = f"the longest rollout the queue carries ({MAX_ROLLOUT_BYTES >> 10} KiB)"
    is_read = source.stage is None or source.stage.needs_teacher()
    for index, row in enumerate(source.rows):
        text = "\n".join(message["content"] for message in row.conversation())
        yield _Reader(index, text, student_limit, student_what)
        for name in case.teachers_of(row) if is_read else ():
            teacher = teachers.get(name)
            if teacher is not None:
                read = _teacher_text(row, case.spec.teachers[name].system_prompt)
                what = f"the max_sequence_length of the teacher '{name}' ({teacher.name})"
                yield _Reader(index, text if read is None else read, teacher.max_sequence_length, what)


def _teacher_text(row: Row, system_prompt: str | None) -> str | None:
    if row.teacher_prompt is not None:
        return "\n".join(message.content for message in row.teacher_prompt)
    if system_prompt is not None:
        turns = [message["content"] for message in row.conversation() if message["role"] != "system"]
        return "\n".join([system_prompt, *turns])
    return None


def _count(case: Case, readers: list[_Reader]) -> list[int]:
    assert case.student is not None, "texts are only read where there is a student"
    tokenizer = tokenizer_of(case.student)
    return [len(encoding) for encoding in tokenizer.encode_batch([r.text for r in readers], add_special_tokens=False)]


def check_held_out(case: Case) -> Iterator[Finding]:
    """Held-out prompts are not trained on: the result would mean nothing."""
    if case.evaluation is None:
        return
    seen = {_identity(row): source.name(i) for source in case.training for i, row in enumerate(source.rows)}
    for index, row in enumerate(case.evaluation.rows):
        if (twin := seen.get(_identity(row))) is not None:
            yield Finding(
                case.evaluation.where(index),
                f"held-out {case.evaluation.name(index)} is also a training prompt ({twin})",
                "remove it from one of the two",
            )


def _identity(row: Row) -> str:
    return json.dumps(row.conversation(), sort_keys=True)


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


CHECKS: Final[tuple[Check, ...]] = (
    check_models_exist,
    check_start,
    check_stage_teachers,
    check_tokenizers,
    check_chat_template,
    check_template_arguments,
    check_stop_ids,
    check_files,
    check_routes,
    check_mix,
    check_mixtures,
    check_teachers_used,
    check_completions,
    check_verifiers,
    check_held_out,
    check_evaluation_size,
    check_lengths,
)
