"""The first part of a job's start and of every live pre-flight: what can be checked before a model is loaded."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from stillhouse.core.errors import PreflightError
from stillhouse.core.estimate import estimate
from stillhouse.core.models import ModelEntry
from stillhouse.core.suspicions import heads, lineage, sampling, tokenizers
from stillhouse.trainer import memory
from stillhouse.trainer.batch import TrainSample
from stillhouse.trainer.findings import first_step
from stillhouse.trainer.manifests import Opening
from stillhouse.trainer.preflight import check_all_ends, open_readers, other_readings
from stillhouse.trainer.stage import ENDS

if TYPE_CHECKING:
    from stillhouse.trainer.start import Start

TOKENIZERS: Final = "student and teachers cut texts into the same tokens, or the loss compares texts"
TEMPLATES: Final = "student and teachers read the prompts as the same tokens"


async def validate(start: Start, opening: Opening) -> None:
    """Check what can be checked before a model is loaded: the first part of every report."""
    spec, look = start.spec, start.report.look
    spans = spec.spans()[spec.span_at(opening.base.step if opening.base else 0).index :]
    await look("trainer", "this trainer, and the services that are there, can run such a job", _check_trainer, start)
    await start.stages.announce(spans[0].stage)
    models = await look("models", "the models' files are the registered ones", start.open_models)
    if models is None:
        return
    start.models = start.stages.models = models
    teachers = {name: models.entry(name) for name in start.spec.teachers}
    await _suspect(start, teachers)
    if start.report.is_live:  # all of them; other jobs end with the first
        found = tokenizers(models.student, teachers, compares_texts=start.spec.crosses_tokenizers())
        await start.report.add_found("tokenizers", TOKENIZERS, found)
        if start.report.has_errors:
            return
    readers = await look("tokenizers", TOKENIZERS, open_readers, start.spec, models.student, teachers)
    if readers is None:
        return
    await look("ends", ENDS, check_all_ends, start.spec, readers)
    await start.stages.check(readers, spans)
    every = [prompt for prompts in start.stages.prompts() for prompt in prompts]
    await start.report.add_found("chat_template", TEMPLATES, other_readings(every, start.spec, readers))
    start.report.refuse()


async def _suspect(start: Start, teachers: Mapping[str, ModelEntry]) -> None:
    """What is odd about the models, by what is registered of them, and whether there is room for the student."""
    student, add = start.models.student, start.report.add_found
    await add("heads", "the output heads have a row for every token, and equal padding", heads(student, teachers))
    await add("lineage", "student and teachers are of one family", lineage(student, teachers))
    await add("sampling", "temperature and filters are usual ones", sampling(start.spec))
    if not start.report.knows("memory"):
        limit = start.ctx.settings.trainer_memory_gib
        rooms = await asyncio.to_thread(memory.available, limit)
        parts = memory.needed(start.spec, student, teachers)
        await start.report.add(memory.memory(parts, rooms, start.learner.num_ranks))
        start.report.estimate = estimate(start.spec, student, teachers)


async def _check_trainer(start: Start) -> None:
    check_ranks(start)
    if start.spec.deterministic:
        await _check_services(start)


async def look_at_first(start: Start, samples: Sequence[TrainSample], metrics: Mapping[str, float]) -> None:
    """The checks of a live pre-flight that a job's first step answers, which costs nothing.

    Raises:
        PreflightError: samplers, trainer and teachers do not speak of one distribution.
    """
    vocabularies = {name: start.models.entry(name).num_usable_ids for name in start.spec.teachers}
    for check in first_step(start.spec, samples, metrics, vocabularies):
        await start.report.add(check)
    await start.keep_report(anew=True)
    start.report.refuse()


def check_ranks(start: Start) -> None:
    """Refuse what several ranks do not do."""
    number = start.learner.num_ranks
    if number == 1:
        return
    instead = "run the job on a trainer with trainer_ranks 1 (`stillhouse up --trainer-ranks 1`), or"
    if start.spec.student.lora is not None:
        raise PreflightError(
            f"the job trains a low-rank adapter, and this trainer has trainer_ranks {number}, which splits whole "
            f"weights only: {instead} remove student.lora"
        )
    if start.spec.deterministic:
        raise PreflightError(
            f"the job is deterministic, and this trainer has trainer_ranks {number}: sums over ranks differ in "
            f"their last bits from those of another number of ranks: {instead} remove deterministic"
        )


async def _check_services(start: Start) -> None:
    """The last bits of every sum depend on engine and threads: all samplers must agree before the first sample.
    Teachers see for themselves, those that come later, too: `TeacherTask.threads`."""
    threads = start.ctx.settings.threads
    if threads == 0:
        raise PreflightError(
            "a deterministic job needs a fixed number of threads; set STILLHOUSE_THREADS "
            "(`stillhouse up --threads`) to the same number in sampler, teacher and trainer"
        )
    for info in await start.ctx.registry.services("sampler"):
        found = (info.extra.get("engine", ""), info.extra.get("threads", ""))
        if found != ("transformers", str(threads)):
            raise PreflightError(
                f"a deterministic job needs the engine transformers with {threads} threads everywhere, as in this "
                f"trainer; {info.role} '{info.instance}' has engine {found[0]} with {found[1]} threads"
            )
