"""Which samples of a job to show: pages over the step journals of the newest claim's lineage."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from tokenizers import Tokenizer

from stillhouse.core.blobs import Artifacts
from stillhouse.core.errors import ConflictError, CorruptError, DeadlineError, NotFoundError
from stillhouse.core.models import ModelEntry
from stillhouse.core.oracle.lineage import lineage_of, working_epochs
from stillhouse.core.oracle.read import read_epochs, read_journal
from stillhouse.core.queue.jobs import JobRecord
from stillhouse.core.schemas import Page, Sample
from stillhouse.core.service import Context
from stillhouse.core.spec_stages import ScheduleSpec, step_of
from stillhouse.core.vocabulary import tokenizer_of
from stillhouse.gateway.samples import sample_view, teachers_of
from stillhouse.v1 import rollout_pb2

MAX_CELLS: Final = 100_000
"""Tokens, alternatives included, after which a page ends early: about 10 MB of JSON."""
SEARCH_S: Final = 10.0
"""Time to look for samples of one teacher: half of what a request may take."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which samples."""

    step: int | None = None
    """Of this step alone, from 1."""
    teacher: str = ""
    """That it judged; '' = all."""
    limit: int = 20
    after: str = ""
    """Sample id."""
    order: Literal["asc", "desc"] = "desc"
    """Of the steps."""
    top: int = 5


@dataclass(frozen=True, slots=True)
class _Found:
    step: int
    """From 0."""
    epoch: int
    stage: int
    score: rollout_pb2.Score


def read_samples(ctx: Context, record: JobRecord, wanted: Wanted) -> Page[Sample]:
    """A page of samples. Blocks: reads the journals of the steps it shows.

    Raises:
        NotFoundError: there is no sample `after`, or no such teacher.
        ConflictError: the tokens cannot be read: the student's model is gone, or became another.
        DeadlineError: samples of the teacher are too rare to be found in time.
    """
    if wanted.teacher and wanted.teacher not in record.spec.get("teachers", {}):
        known = ", ".join(record.spec.get("teachers", {})) or "none"
        raise NotFoundError(f"job {record.id} has no teacher '{wanted.teacher}'; it has {known}", param="teacher")
    stages = [str(stage.get("name", "")) for stage in record.spec["stages"]]
    data: list[Sample] = []
    tokenizer: Tokenizer | None = None
    cells = 0
    for found in _walk(ctx, record, wanted):
        if len(data) == wanted.limit or cells > MAX_CELLS:
            return Page(data=data, has_more=True)
        tokenizer = tokenizer or _tokenizer(ctx, record, found.score.rollout.tokenizer_sha256)
        stage = stages[found.stage] if found.stage < len(stages) else ""
        data.append(
            sample_view(
                found.score,
                tokenizer,
                step=found.step + 1,
                epoch=found.epoch,
                stage=stage,
                teacher=wanted.teacher,
                top=wanted.top,
            )
        )
        cells += sum(1 + len(token.top) + len(token.student_top) for token in data[-1].tokens)
    return Page(data=data)


def _walk(ctx: Context, record: JobRecord, wanted: Wanted) -> Iterator[_Found]:
    """Samples from `after` on: by step, inside a step in the order of the journal."""
    steps = _steps(ctx.artifacts, record.id)
    start = _step_after(record, wanted.after) if wanted.after else None
    if start is not None and start not in steps:
        raise _unknown(record, wanted.after)
    until = time.monotonic() + SEARCH_S
    for step in sorted(steps, reverse=wanted.order == "desc"):
        if wanted.step is not None and step + 1 != wanted.step:
            continue
        if start is not None and (step > start if wanted.order == "desc" else step < start):
            continue
        if time.monotonic() > until:
            raise DeadlineError(f"no sample of teacher '{wanted.teacher}' found within {SEARCH_S:g} s; name a step")
        yield from _of_step(ctx, record, step, steps[step], wanted, wanted.after if step == start else "")


def _of_step(ctx: Context, record: JobRecord, step: int, path: Path, wanted: Wanted, after: str) -> Iterator[_Found]:
    try:
        header, scores = read_journal(path)
    except (CorruptError, OSError) as error:
        ctx.log.warning("a journal cannot be read", job_id=record.id, error=str(error))
        return
    names = [score.rollout.sample_id for score in scores]
    if after and after not in names:
        raise _unknown(record, after)
    for score in scores[names.index(after) + 1 if after else 0 :]:
        if not wanted.teacher or wanted.teacher in teachers_of(score):
            yield _Found(step, header.epoch, header.stage, score)


def _steps(artifacts: Artifacts, job_id: str) -> dict[int, Path]:
    """Step from 0 -> its journal, of the lineage of the newest epoch."""
    job = artifacts.job(job_id)
    epochs = read_epochs(job)
    head = next(iter(working_epochs(epochs)), 0)
    return {step: job.journal(epoch, step) for step, epoch in lineage_of(epochs, head).steps.items()}


def _step_after(record: JobRecord, sample_id: str) -> int:
    """The step of a sample, from 0."""
    group = sample_id.partition("/")[0]
    schedules = [ScheduleSpec.model_validate(stage["schedule"]) for stage in record.spec["stages"]]
    return step_of(int(group), schedules)


def _unknown(record: JobRecord, sample_id: str) -> NotFoundError:
    return NotFoundError(f"job {record.id} trained on no sample '{sample_id}'", param="after")


def _tokenizer(ctx: Context, record: JobRecord, sha256: str) -> Tokenizer:
    """The student's, and no other: tokens of another would be other texts."""
    name = record.spec["student"]["model"]
    try:
        entry: ModelEntry = ctx.models.get(name)
    except NotFoundError as error:
        raise ConflictError(f"the texts need the student's tokenizer: {error.message}") from None
    if sha256 and sha256 != entry.tokenizer_sha256:
        raise ConflictError(
            f"the samples were written with tokenizer {sha256[:12]}, model '{name}' now has "
            f"{entry.tokenizer_sha256[:12]}; register the model of then under this name to read them"
        )
    return tokenizer_of(entry)
