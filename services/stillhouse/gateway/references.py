"""The models that a job names, looked up: registered ones, checkpoints of jobs, ends of the job's own stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from stillhouse.core.blobs import unsealed
from stillhouse.core.checkpoints import START, Models, Settled, locate, parse
from stillhouse.core.errors import NotFoundError, StillhouseError
from stillhouse.core.explain import Finding
from stillhouse.core.models import ModelEntry
from stillhouse.core.spec import JobSpec
from stillhouse.core.spec_base import STAGE_PREFIX
from stillhouse.core.vocabulary import difference
from stillhouse.gateway.reach import Reach

if TYPE_CHECKING:
    from stillhouse.gateway.validation import Case


@dataclass(slots=True)
class NamedModels:
    """Who learns and who judges, as far as that exists."""

    student: ModelEntry | None = None
    start: ModelEntry | None = None
    """Whose weights the student begins with."""
    teachers: dict[str, ModelEntry | None] = field(default_factory=dict)
    settled: dict[str, Settled] = field(default_factory=dict)
    """What the job's references to checkpoints mean from now on."""
    problems: list[Finding] = field(default_factory=list)
    """Models and checkpoints that do not exist."""


def look_up_models(spec: JobSpec, models: Models, reach: Reach) -> NamedModels:
    """All models of a job. A checkpoint that is no model yet counts as the registered student of its job: it has the
    same tokenizer, template and architecture."""
    found = NamedModels()

    def find(param: str, name: str, look_up: Callable[[str], ModelEntry]) -> ModelEntry | None:
        try:
            return look_up(name)
        except StillhouseError as error:
            found.problems.append(Finding(param, error.message, "name one that there is"))
            return None

    def checkpoint(name: str) -> ModelEntry:
        reach.check_job(name.partition("/")[0])
        return _checkpoint(name, models, found)

    found.student = find("student.model", spec.student.model, models.get)
    found.start = found.student if spec.init_from is None else find("init_from", spec.init_from, checkpoint)
    for name, teacher in spec.teachers.items():
        if teacher.model.startswith(STAGE_PREFIX):
            own = found.start if teacher.model == START else found.student
            found.teachers[name] = own and own.model_copy(update={"name": teacher.model})
        else:
            look_up = checkpoint if parse(teacher.model) else models.get
            found.teachers[name] = find(f"teachers.{name}.model", teacher.model, look_up)
    return found


def _checkpoint(reference: str, models: Models, found: NamedModels) -> ModelEntry:
    name = locate(models.artifacts, reference)
    entry = models.made(name)
    found.settled[reference] = Settled(name, entry.sha256 if entry else "")
    if entry is None:
        job_id = name.partition("/")[0]
        student = unsealed(models.artifacts.job(job_id).job_json)["spec"]["student"]["model"]
        try:
            entry = models.get(student).model_copy(update={"name": name})
        except NotFoundError as error:
            raise NotFoundError(f"it is of a job whose student is not registered any more: {error.message}") from None
    return entry


def check_models_exist(case: Case) -> Iterator[Finding]:
    """Every model is registered, every checkpoint there."""
    yield from case.models.problems


def check_start(case: Case) -> Iterator[Finding]:
    """The weights of `init_from` fit the student. The rest of the two configurations is compared by the trainer."""
    student, start = case.models.student, case.models.start
    if student is None or start is None or start is student:
        return
    for name in ("architecture", "vocab_size", "hidden_size", "num_layers"):
        ours, theirs = getattr(student, name), getattr(start, name)
        if ours != theirs:
            message = f"the {name} of {start.name} is {theirs}, that of the student '{student.name}' is {ours}"
            yield Finding("init_from", message, "name the model that the checkpoint is of as student.model")
            return
    if problem := difference(student, start):
        message = f"the tokenizer of {start.name} differs from that of the student '{student.name}': {problem}"
        yield Finding("init_from", message, "name the model that the checkpoint is of as student.model")


def check_stage_teachers(case: Case) -> Iterator[Finding]:
    """A teacher that is the student at the end of a stage judges after that stage only."""
    stages = [stage.name for stage in case.spec.stages]
    references = {name: teacher.model for name, teacher in case.spec.teachers.items()}
    ends = {
        name: stages.index(model.removeprefix(STAGE_PREFIX))
        for name, model in references.items()
        if model.startswith(STAGE_PREFIX) and model != START
    }
    for source in case.sources():
        if source.stage is not None and not source.stage.needs_teacher():
            continue
        index = stages.index(source.stage.name) if source.stage else 0
        when = f"stage '{source.stage.name}'" if source.stage else "held-out evaluation, from the first step on,"
        for number, row in source.table.where(lambda row, source=source: ends and case.drawn(source, row)):
            for teacher in case.drawn(source, row):
                if ends.get(teacher, -1) >= index:
                    message = f"{source.name(number)} asks the teacher '{teacher}' in {when} and that is "
                    message += f"{references[teacher]}, which has not ended then"
                    yield Finding(source.where(number), message, f"route it to another teacher, or name {START}")
