"""What is odd about a job's models and sampling, from their registered facts alone: the gateway's checks and the
trainer's pre-flight say the same.

Each function yields findings; nothing = nothing is odd.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, Final

from stillhouse.core.explain import Finding
from stillhouse.core.models import ModelEntry, chat_template
from stillhouse.core.spec import FullVocabularyLoss, JobSpec, PolicyGradientLoss, StageSpec
from stillhouse.core.vocabulary import difference

HOT: Final = 1.5
"""Sampling temperatures above it write mostly noise."""
COLD: Final = 0.3
"""Below it the student hardly explores, and log-probabilities of what it did not sample count by exp(1 / t)."""
NARROW_TOP_P: Final = 0.5
"""Below it most of the student's distribution is never sampled."""
AROUND: Final = 24
"""Characters shown on both sides of the first difference of two texts."""


def tokenizers(student: ModelEntry, teachers: Mapping[str, ModelEntry], *, compares_texts: bool) -> Iterator[Finding]:
    """Student and teachers speak the same tokens, or the loss compares texts: else every score would be nonsense."""
    for name, teacher in teachers.items():
        if not (problem := difference(student, teacher)):
            continue
        param, facts = f"teachers.{name}.model", {"first_difference": problem}
        if not compares_texts:
            fix = "pick models with the same tokenizer, or take objective policy_gradient with cross_tokenizer: true"
            yield Finding(param, f"its tokenizer differs from the student's: {problem}", fix, evidence=facts)
        elif not teacher.has_chat_template:
            message = f"'{teacher.name}' has no chat template, and the student's would be other tokens to it"
            yield Finding(param, message, "add chat_template.jinja to its folder and register it again")


def heads(student: ModelEntry, teachers: Mapping[str, ModelEntry]) -> Iterator[Finding]:
    """Rows of the output heads that no token of the tokenizer has: padding, which is left out of all distributions."""
    for name, teacher in teachers.items():
        param = f"teachers.{name}.model"
        facts = {"student": _rows(student), f"teacher {name}": _rows(teacher)}
        if student.tokenizer_sha256 != teacher.tokenizer_sha256:
            continue  # said by the check of tokenizers
        if teacher.num_usable_ids < student.num_usable_ids:
            message = f"the head of '{teacher.name}' has {teacher.vocab_size:,} rows, and the student "
            message += f"('{student.name}') may write any of {student.num_usable_ids:,} tokens: it has no probability "
            message += f"for those from {teacher.num_usable_ids:,} on"
            yield Finding(param, message, "take a teacher that knows every token of its tokenizer", evidence=facts)
        elif student.vocab_size != teacher.vocab_size:
            message = f"padded head: that of '{teacher.name}' has {teacher.vocab_size:,} rows, the student's "
            message += f"{student.vocab_size:,}, the tokenizer {student.tokenizer_size:,} tokens; rows beyond "
            message += f"{student.num_usable_ids:,} are padding and left out on both sides"
            fix = "nothing here; other tools may sample from the padding, or compare heads of unequal size"
            yield Finding(param, message, fix, is_warning=True, evidence=facts)


def _rows(entry: ModelEntry) -> dict[str, int]:
    padding = max(0, entry.vocab_size - entry.tokenizer_size)
    return {"head_rows": entry.vocab_size, "tokens": entry.tokenizer_size, "padding_rows": padding}


def lineage(student: ModelEntry, teachers: Mapping[str, ModelEntry]) -> Iterator[Finding]:
    """Teachers of another family than the student: nothing is wrong with that, but most that fail are of this kind."""
    for name, teacher in teachers.items():
        if teacher.architecture != student.architecture:
            message = f"foreign lineage: '{teacher.name}' is a {teacher.architecture}, the student '{student.name}' a "
            message += f"{student.architecture}"
            fix = "look at the initial KL: models of one family begin near each other; else fine-tune the student on "
            fix += "texts of the teacher first (on_policy_fraction: 0)"
            facts = {"student": student.architecture, "teacher": teacher.architecture}
            yield Finding(f"teachers.{name}.model", message, fix, is_warning=True, evidence=facts)


def templates(student: ModelEntry, teachers: Mapping[str, ModelEntry]) -> Iterator[Finding]:
    """Chat templates that are not the same text: each model then reads prompts in its own way."""
    ours = chat_template(student)
    for name, teacher in teachers.items():
        theirs = chat_template(teacher)
        if ours is None or theirs == ours or difference(student, teacher):
            continue
        param = f"teachers.{name}.model"
        if theirs is None:
            message = f"'{teacher.name}' has no chat template and reads by the student's: is it a base model, which "
            message += "never saw such prompts?"
            yield Finding(param, message, "take the instruction-tuned model, or see its initial KL", is_warning=True)
            continue
        place, left, right = first_difference(ours, theirs)
        message = f"the chat templates differ from character {place} on: {left!r} for '{student.name}', {right!r} for "
        message += f"'{teacher.name}'; each model reads prompts by its own"
        fix = "right if the teacher was trained with its own; else make chat_template.jinja the same in both folders"
        facts: dict[str, Any] = {"character": place, "student": left, "teacher": right}
        yield Finding(param, message, fix, is_warning=True, evidence=facts)


def first_difference(ours: str, theirs: str) -> tuple[int, str, str]:
    """(place, what stands there on both sides) of two texts that differ."""
    pairs = enumerate(itertools.zip_longest(ours, theirs))
    place = next(place for place, (left, right) in pairs if left != right)
    shown = slice(max(0, place - AROUND), place + AROUND)
    return place, ours[shown], theirs[shown]


def sampling(spec: JobSpec) -> Iterator[Finding]:
    """Temperatures and filters that hardly mean what was meant."""
    for index, stage in enumerate(spec.stages):
        if stage.on_policy_fraction == 0:
            continue
        param, temperature = f"stages.{index}.sampling", stage.sampling.temperature
        if not COLD <= temperature <= HOT:
            what = "mostly noise" if temperature > HOT else "nearly always the same"
            message = f"the student writes at temperature {temperature:g}: {what}"
            fix = f"usual is 1, and hardly anything below {COLD:g} or above {HOT:g}"
            yield Finding(f"{param}.temperature", message, fix, is_warning=True)
        if stage.sampling.top_p < NARROW_TOP_P:
            message = f"top_p {stage.sampling.top_p:g} keeps most of what the student would say from being judged"
            yield Finding(f"{param}.top_p", message, "usual is 1", is_warning=True)
        if message := filtered(stage):
            yield Finding(param, message, "set top_p: 1, top_k: 0, min_p: 0", is_warning=True)


def filtered(stage: StageSpec) -> str:
    """What truncated sampling means for a loss that is taken at the sampled token; "" = nothing."""
    filters, loss = stage.sampling.filters(), stage.loss
    at_sampled = isinstance(loss, PolicyGradientLoss) or (
        isinstance(loss, FullVocabularyLoss) and loss.divergence == "k2"
    )
    if not filters or not at_sampled:
        return ""
    return (
        f"the loss is taken at sampled tokens, and {filters} keeps unlikely ones from being sampled: the student "
        "learns the teacher's probabilities of the others, and of the rest only how much it is together; "
        "loss/reverse_kl is measured on those tokens, too"
    )
