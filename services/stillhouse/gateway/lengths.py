"""Checks of a job about lengths: prompts and completions fit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from stillhouse.core.explain import Finding
from stillhouse.core.models import ModelEntry
from stillhouse.core.spec import Row
from stillhouse.core.vocabulary import difference, tokenizer_of
from stillhouse.gateway.rows import conversation_text, teacher_text

if TYPE_CHECKING:
    from stillhouse.gateway.validation import Case, Source

BYTES_PER_TOKEN: Final = 16
"""Of a rollout in the queue: id, sampled log-probability, teacher's answer and one more word, 4 bytes each."""
MAX_ROLLOUT_BYTES: Final = 900 << 10
"""A queue entry holds 1 MiB; the rest is for names, text and the message's own bytes."""
COUNT_BATCH: Final = 256
"""Texts tokenized at once."""


def check_lengths(case: Case) -> Iterator[Finding]:
    """Prompt and completion fit into the student, the teacher and the queue. Counted without the chat template, so what
    is refused here certainly does not fit. Teachers with another tokenizer count when they read."""
    counted = _with_the_students_tokens(case)
    for source in case.sources():
        if _all_fit(case, source):
            continue
        readers = list(_readers(case, source, counted))
        fix = "shorten the prompt or lower max_tokens" + (
            " or loss.k" if source.stage and source.stage.loss.record_top_k() else ""
        )
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


def _all_fit(case: Case, source: Source) -> bool:
    """A token is at least a byte of text in practically every tokenizer: short texts need no counting."""
    models = [entry for entry in (case.student, *case.teachers.values()) if entry is not None]
    limit = min([source.queue_tokens(), *(entry.max_sequence_length for entry in models)])
    added = [len(spec.system_prompt.encode()) + 1 for spec in case.spec.teachers.values() if spec.system_prompt]
    return source.table.longest_bytes + max(added, default=0) + source.max_tokens <= limit


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
        text = conversation_text(row)
        yield _Reader(index, text, student_limit, student_what)
        for name in case.teachers_of(row) if is_read else ():
            teacher = teachers.get(name)
            if teacher is not None:
                read = _teacher_text(row, case.spec.teachers[name].system_prompt)
                what = f"the max_sequence_length of the teacher '{name}' ({teacher.name})"
                yield _Reader(index, text if read is None else read, teacher.max_sequence_length, what)


def _teacher_text(row: Row, system_prompt: str | None) -> str | None:
    if row.teacher_prompt is not None:
        return teacher_text(row)
    if system_prompt is not None:
        turns = [message["content"] for message in row.conversation() if message["role"] != "system"]
        return "\n".join([system_prompt, *turns])
    return None


def _count(case: Case, readers: list[_Reader]) -> list[int]:
    assert case.student is not None, "texts are only read where there is a student"
    tokenizer = tokenizer_of(case.student)
    return [len(encoding) for encoding in tokenizer.encode_batch([r.text for r in readers], add_special_tokens=False)]
