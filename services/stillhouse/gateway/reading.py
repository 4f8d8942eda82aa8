"""Checks of a job about its models together: tokenizers, chat templates and their arguments, ends, output heads."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from stillhouse.core import suspicions
from stillhouse.core.explain import Finding
from stillhouse.core.models import ModelEntry, chat_template, end_ids

if TYPE_CHECKING:
    from stillhouse.gateway.validation import Case


def check_tokenizers(case: Case) -> Iterator[Finding]:
    """Student and teachers speak the same tokens, or the loss compares texts."""
    if case.student is not None:
        compares_texts = case.spec.crosses_tokenizers()
        yield from suspicions.tokenizers(case.student, case.known_teachers(), compares_texts=compares_texts)


def check_chat_template(case: Case) -> Iterator[Finding]:
    """Prompts are rendered by the student's chat template, for teachers without one, too."""
    if case.student is None:
        return
    if case.student.has_chat_template:
        yield from suspicions.templates(case.student, case.known_teachers())
    else:
        yield Finding(
            "student.model",
            f"'{case.student.name}' has no chat template",
            "add chat_template.jinja to its folder and register it again, or pick an instruction-tuned model",
        )


def check_template_arguments(case: Case) -> Iterator[Finding]:
    """Arguments occur in the template they are for: one with a typing mistake would change nothing, silently."""
    if case.student is None:
        return
    for source in case.sources():
        arguments = source.data.chat_template_kwargs
        yield from _unknown(f"{source.param}.chat_template_kwargs", "", arguments, case.student)
        for index, row in source.table.where(lambda row: row.chat_template_kwargs):
            whose = f"{source.name(index)}: "
            yield from _unknown(source.where(index), whose, row.chat_template_kwargs, case.student)
    for name, spec in case.spec.teachers.items():
        entry = case.teachers[name]
        reader = entry if entry is not None and entry.has_chat_template else case.student
        yield from _unknown(f"teachers.{name}.chat_template_kwargs", "", spec.chat_template_kwargs, reader)


def _unknown(param: str, whose: str, arguments: Mapping[str, Any], reader: ModelEntry) -> Iterator[Finding]:
    for name in arguments:
        if not re.search(rf"\b{name}\b", chat_template(reader) or ""):
            message = f"{whose}the chat template of '{reader.name}' reads no argument '{name}'"
            yield Finding(param, message, "correct its name, or leave it out")


def check_ends(case: Case) -> Iterator[Finding]:
    """The student ends its texts, and stop tokens exist: one that nobody can write would end nothing, silently."""
    student = case.student
    if student is None:
        return
    if not end_ids(student):
        message = f"'{student.name}' names no end-of-sequence token, so that its completions would never end"
        yield Finding("student.model", message, "add eos_token_id to its generation_config.json and register it again")
    for index, stage in enumerate(case.spec.stages):
        for token in stage.sampling.stop_token_ids:
            if token >= student.tokenizer_size:
                message = f"'{student.name}' has no token {token}, its last is {student.tokenizer_size - 1}"
                yield Finding(f"stages.{index}.sampling.stop_token_ids", message, "use ids of its tokenizer")


def check_heads(case: Case) -> Iterator[Finding]:
    """Every token that the student writes has a row in the teachers' heads."""
    if case.student is not None:
        yield from suspicions.heads(case.student, case.known_teachers())


def check_lineage(case: Case) -> Iterator[Finding]:
    """Student and teachers are of one family."""
    if case.student is not None:
        yield from suspicions.lineage(case.student, case.known_teachers())


def check_sampling(case: Case) -> Iterator[Finding]:
    """The student writes as one usually lets it."""
    yield from suspicions.sampling(case.spec)
