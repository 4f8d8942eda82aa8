"""What is proved of a job with its tokenizers and rows, before a model is loaded: every reader gets what it should.

    vocabularies    a teacher's token ids are the student's, and texts become the same tokens
    templates       every row renders, for the student and for its teacher; the assistant's turn is open at the end
    ends            what a teacher ends its turns with ends the student's completions
    lengths         prompt and completion fit, for both

A completion then is, id by id, a continuation of the student's prompt and of the teacher's.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from stillhouse.core.blobs import Artifacts
from stillhouse.core.errors import PreflightError, SpecError
from stillhouse.core.explain import Finding
from stillhouse.core.models import ModelEntry
from stillhouse.core.spec import DataSpec, JobSpec, StageSpec
from stillhouse.core.spelling import spelling_of
from stillhouse.core.vocabulary import difference
from stillhouse.trainer.prompts import Prompt, check_lengths, load_rows, prepare, with_completions
from stillhouse.trainer.templates import Renderer, check_ends, naming, teacher_renderers
from stillhouse.trainer.tokens import special_token_ids, stop_token_ids


@dataclass(frozen=True)
class Readers:
    """Who reads prompts, and how."""

    student: ModelEntry
    teachers: Mapping[str, ModelEntry]
    renderer: Renderer
    """The student's."""
    for_teachers: Mapping[str, Renderer]
    """Each teacher's."""
    crossing: Mapping[str, Sequence[int]]
    """Teachers with another tokenizer, which read completions as texts -> the tokens with which they end texts."""


def open_readers(spec: JobSpec, student: ModelEntry, teachers: Mapping[str, ModelEntry]) -> Readers:
    """Tokenizers of the job's models, which speak the same tokens, or else write the same texts and the loss compares
    those. Blocks while it reads them.

    Raises:
        PreflightError: names the first difference.
    """
    crossing: dict[str, Sequence[int]] = {}
    for name, entry in teachers.items():
        problem = difference(student, entry)
        if problem and not spec.crosses_tokenizers():
            raise PreflightError(
                f"teacher '{name}' ({entry.name}) and student ({student.name}) have different tokenizers, so that "
                f"their tokens cannot be compared: {problem}. policy_gradient with cross_tokenizer compares texts"
            )
        if problem:
            check_texts(student, entry)
            crossing[name] = stop_token_ids(entry)
    renderer = Renderer(Path(student.path))
    for_teachers = teacher_renderers(student, teachers, renderer, Renderer)
    return Readers(student, teachers, renderer, for_teachers, crossing)


def check_all_ends(spec: JobSpec, readers: Readers) -> None:
    """The student ends its completions, and teachers end theirs with the same tokens.

    Raises:
        PreflightError: names the token and the fix.
    """
    same = {name: entry for name, entry in readers.teachers.items() if name not in readers.crossing}
    judged = [stage for stage in spec.stages if stage.asks_teachers()]
    for stage in [*judged, spec.stages[-1]]:
        stop_ids = all_stop_ids(stage, readers.student)
        if stage.asks_teachers() or (spec.evaluation.data is not None and spec.asks_teachers()):
            check_ends(readers.student, same, readers.for_teachers, stop_ids)


def other_readings(prompts: Sequence[Prompt], spec: JobSpec, readers: Readers) -> Iterator[Finding]:
    """Teachers that read the job's prompts as other tokens than the student: by another chat template."""
    for name in readers.for_teachers if spec.teachers else ():
        if name in readers.crossing or spec.teachers[name].system_prompt is not None:
            continue
        plain = (prompt for prompt in prompts if prompt.teacher == name and prompt.source.teacher_prompt is None)
        for prompt in plain:
            if (theirs := prompt.teacher_prompt_ids) is not None and theirs != prompt.prompt_ids:
                yield _other_reading(name, prompt, theirs, readers)
                break


def _other_reading(name: str, prompt: Prompt, theirs: Sequence[int], readers: Readers) -> Finding:
    ours = prompt.prompt_ids
    place = next(i for i in range(len(ours) + 1) if tuple(ours[: i + 1]) != tuple(theirs[: i + 1]))
    shown = slice(max(0, place - 4), place + 8)
    left, right = readers.renderer.spelt(ours[shown]), readers.for_teachers[name].spelt(theirs[shown])
    message = f"row {prompt.row} is read in other words by teacher '{name}' ({readers.teachers[name].name}) from token "
    message += f"{place} on: {left!r} for the student, {right!r} for the teacher: their chat templates differ"
    fix = "right if each was trained with its own; else make chat_template.jinja (or chat_template_kwargs) the same"
    facts = {"row": prompt.row, "token": place, "student": left, "teacher": right}
    return Finding(f"teachers.{name}.model", message, fix, is_warning=True, evidence=facts)


def check_texts(student: ModelEntry, teacher: ModelEntry) -> None:
    """Refuse models that have no text in common: see core/spelling.py.

    Raises:
        PreflightError: names the model and what is wrong with it.
    """
    if not teacher.has_chat_template:
        raise PreflightError(
            f"the teacher's model '{teacher.name}' has no chat template, and the student's is made of other tokens; "
            "add chat_template.jinja to its folder and register it again"
        )
    for entry in (student, teacher):
        with naming(f"model '{entry.name}'"):
            try:
                problem = spelling_of(entry).rewrites()
            except SpecError as error:
                raise PreflightError(error.message) from None
            if problem:
                raise PreflightError(f"its tokenizer changes texts, which cannot be compared then: {problem}")
    if plain := set(stop_token_ids(student)) - set(special_token_ids(student)):
        raise PreflightError(
            f"the student '{student.name}' ends with {sorted(plain)}, which tokenizer.json does not mark as special: "
            "a teacher with another tokenizer would read it as text"
        )


def all_stop_ids(stage: StageSpec, student: ModelEntry) -> list[int]:
    """Token ids that end a completion: the student's own, and the stage's."""
    return [*stop_token_ids(student), *stage.sampling.stop_token_ids]


def load_prompts(stage: StageSpec, spec: JobSpec, readers: Readers, artifacts: Artifacts) -> list[Prompt]:
    """The prompts of a stage, rendered and checked. Blocks.

    Raises:
        PreflightError: names the row, both sides and the fix.
    """
    with naming(f"stage '{stage.name}'") if len(spec.stages) > 1 else nullcontext():
        prompts = _load(stage.data, stage.sampling.max_tokens, spec, readers, artifacts, is_read=stage.needs_teacher())
        if not stage.asks_teachers() and (several := [prompt.row for prompt in prompts if prompt.further]):
            raise PreflightError(
                f"row {several[0]} names several teachers, and the loss asks none for scores; name one"
            )
        if stage.reads_completions():
            prompts = with_completions(prompts, readers.renderer, stop_token_ids(readers.student))
    return prompts


def load_held_out(spec: JobSpec, readers: Readers, artifacts: Artifacts) -> list[Prompt]:
    """The held-out prompts, as `load_prompts`."""
    evaluation = spec.evaluation
    if evaluation.data is None:
        return []
    with naming("evaluation.data"):
        return _load(evaluation.data, evaluation.max_tokens, spec, readers, artifacts)


def check_writers(stage: StageSpec, student: ModelEntry, teachers: Mapping[str, ModelEntry]) -> None:
    """Teachers whose texts a stage trains on end them as the student does.

    Raises:
        PreflightError: names the tokens.
    """
    writes = stage.on_policy_fraction < 1 and stage.off_policy_source == "teacher"
    known = all_stop_ids(stage, student)
    for name, entry in teachers.items() if writes else ():
        if odd := sorted(set(stop_token_ids(entry)) - set(known)):
            raise PreflightError(
                f"teacher '{name}' ({entry.name}) ends its texts with the tokens {odd}, too, at which the student "
                f"({student.name}) would go on; add them to sampling.stop_token_ids"
            )


def _load(
    data: DataSpec, max_tokens: int, spec: JobSpec, readers: Readers, artifacts: Artifacts, *, is_read: bool = True
) -> list[Prompt]:
    """The prompts of one source; `is_read` = the teachers read them, too."""
    rows = load_rows(data, artifacts.file(data.file) if data.file else None)
    prompts = prepare(
        rows,
        spec.teachers,
        readers.renderer,
        for_teachers=readers.for_teachers,
        arguments=data.chat_template_kwargs,
    )
    if not prompts:
        raise PreflightError("no prompts: the data has no rows")
    limits = {name: entry.max_sequence_length if is_read else sys.maxsize for name, entry in readers.teachers.items()}
    limits["student"] = readers.student.max_sequence_length
    check_lengths(prompts, max_tokens, limits, readers.crossing)
    return prompts


def short_warning(prompts: Sequence[Prompt], max_tokens: int, samplers: Mapping[str, int]) -> str:
    """What samplers that read less than the student does mean for completions of `max_tokens`; "" = nothing.

    `samplers` = longest sequence of each, prompt and completion, tokens; 0 = as long as the student can.
    """
    limits = {instance: limit for instance, limit in samplers.items() if limit}
    if not limits:
        return ""
    limit, instance = min((limit, instance) for instance, limit in limits.items())
    number = sum(len(prompt.prompt_ids) + max_tokens > limit for prompt in prompts)
    if not number:
        return ""
    return (
        f"sampler '{instance}' reads {limit} tokens, prompt and completion (its vllm_max_length): completions of "
        f"{number} of {len(prompts)} prompts end there, before max_tokens {max_tokens}; raise vllm_max_length or lower "
        "max_tokens"
    )
