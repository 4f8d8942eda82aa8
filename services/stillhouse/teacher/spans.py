"""What a student with another tokenizer wrote, as the teacher reads it: its text, written with the teacher's tokenizer.

    student   Hel|lo| wor|ld|<end>        spans end where both models have the end of a token:
    teacher   Hello| world|</s>           Hello| world|<end>

Offsets are bytes of the text, so both may also meet inside a character. The teacher reads the one tokenization that its
tokenizer gives; docs/cross-tokenizer.md says what follows from that.
"""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import Sequence
from typing import Final

from stillhouse.core.errors import ConflictError, WireError
from stillhouse.core.models import ModelRegistry
from stillhouse.core.spelling import Spelling, spelling_of
from stillhouse.core.tensors import ids_list
from stillhouse.teacher.engines.base import ScoreItem, Spans
from stillhouse.teacher.messages import make_item
from stillhouse.v1 import rollout_pb2 as pb

REPLACEMENT_BYTES: Final = len("\ufffd".encode())
"""What bytes that are no UTF-8 become, as for any reader."""
NOWHERE: Final = -1
"""Offset of a token's end that is no place in the text."""


def retokenize(
    ids: Sequence[int], student: Spelling, teacher: Spelling, *, end_token_id: int | None, is_cut: bool
) -> tuple[list[int], Spans]:
    """([U] a completion's text in the teacher's tokens, spans).

    `end_token_id` is the teacher's token for the special token that `ids` end with; none = they end with text. A
    completion that was cut off loses a last character that is not whole, and its last span: where the text goes on, the
    last tokens may be others.
    """
    spoken = list(ids if end_token_id is None else ids[:-1])
    text, student_ends = _text(student.spell(spoken), is_cut)
    teacher_ids = teacher.write(text)
    ends = _common(student_ends, _ends(teacher.spell(teacher_ids), text.encode()))
    if is_cut:
        ends = ends[:-1]
    is_canonical = _canonical(spoken, student_ends, [end for end, _ in ends], text, student, is_cut)
    if end_token_id is not None:
        teacher_ids.append(end_token_id)
        ends.append((len(ids), len(teacher_ids)))
        is_canonical.append(True)
    return teacher_ids, Spans([end for end, _ in ends], [end for _, end in ends], is_canonical)


def _text(pieces: Sequence[bytes], is_cut: bool) -> tuple[str, list[int]]:
    """(text, [T] offset in its UTF-8 of the end of each piece). What is no UTF-8 becomes U+FFFD; a piece that ends
    inside of such bytes ends nowhere."""
    raw = memoryview(b"".join(pieces))
    parts: list[str] = []
    bad: list[tuple[int, int]] = []
    start = 0
    while start < len(raw):
        try:
            parts.append(codecs.utf_8_decode(raw[start:], "strict", True)[0])
            break
        except UnicodeDecodeError as error:
            parts.append(str(raw[start : start + error.start], "utf-8"))
            if is_cut and start + error.end == len(raw) and error.reason == "unexpected end of data":
                break
            parts.append("\ufffd")
            bad.append((start + error.start, start + error.end))
            start += error.end
    return "".join(parts), _moved(_cumulated(pieces), bad)


def _moved(ends: Sequence[int], bad: Sequence[tuple[int, int]]) -> list[int]:
    """Offsets in raw bytes as offsets in the text where the stretches `bad` are replaced."""
    moved, shift, passed = [], 0, 0
    for end in ends:
        while passed < len(bad) and bad[passed][1] <= end:
            shift += REPLACEMENT_BYTES - (bad[passed][1] - bad[passed][0])
            passed += 1
        is_inside = passed < len(bad) and bad[passed][0] < end
        moved.append(NOWHERE if is_inside else end + shift)
    return moved


def _canonical(
    ids: list[int], offsets: Sequence[int], ends: Sequence[int], text: str, student: Spelling, is_cut: bool
) -> list[bool]:
    """[S] whether the student's tokenizer writes the span with these tokens, too, as part of the whole text.

    In doubt it does: the first token may stand with or without the blank of sentencepiece, as the prompt ends, and how
    the last word of a completion that was cut off is written nobody knows.
    """
    written = student.write(text)
    if written == ids:
        return [True for _ in ends]
    known = len(text[: max(0, *map(text.rfind, " \n\t"))].encode()) if is_cut else len(text.encode())
    # of the tokens that end at an offset the last one counts, as in `_common`
    number = {0: 0} | {end: n for n, end in enumerate(_ends(student.spell(written), text.encode()), start=1)}
    found, first, offset = [], 0, 0
    for last in ends:
        start, offset = number.get(offset), offsets[last - 1]
        stop = number.get(offset)
        is_same = start is not None and stop is not None and written[start:stop] == ids[first:last]
        found.append(is_same or offset > known or (first == 0 and student.adds_blank))
        first = last
    return found


def _ends(pieces: Sequence[bytes], text: bytes) -> list[int]:
    """[U] offset in the text of the end of each piece. A tokenizer may rewrite it (é as one character instead of two):
    then offsets are known before the first difference and after the last, and nowhere between."""
    ends, written = _cumulated(pieces), b"".join(pieces)
    if written == text:
        return ends
    before = _agreeing(written, text)
    after = _agreeing(written[before:][::-1], text[before:][::-1])
    longer = len(text) - len(written)

    def place(end: int) -> int:
        if end <= before:
            return end
        return end + longer if end >= len(written) - after else NOWHERE

    return [place(end) for end in ends]


def _agreeing(a: bytes, b: bytes) -> int:
    """Bytes at the beginning that are the same."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _cumulated(pieces: Sequence[bytes]) -> list[int]:
    ends, total = [], 0
    for piece in pieces:
        total += len(piece)
        ends.append(total)
    return ends


def _common(student_ends: Sequence[int], teacher_ends: Sequence[int]) -> list[tuple[int, int]]:
    """(tokens of the student, tokens of the teacher) up to each offset that both have, in order; a token without bytes
    belongs to the span before it."""
    student = {offset: number for number, offset in enumerate(student_ends, start=1) if offset > 0}
    teacher = {offset: number for number, offset in enumerate(teacher_ends, start=1) if offset > 0}
    return [(student[offset], teacher[offset]) for offset in sorted(student.keys() & teacher.keys())]


class Reader:
    """Makes engine items of rollouts; for scores of spans with the tokenizers of student and teacher."""

    def __init__(self, registry: ModelRegistry) -> None:
        self._registry = registry

    async def item(self, task: pb.TeacherTask, rollout: pb.Rollout) -> ScoreItem:
        """What the engine scores. Reading a tokenizer takes up to a second, hence a thread.

        Raises:
            WireError: the rollout makes no sense.
            StillhouseError: its text cannot be read here; perhaps by another process.
        """
        if rollout.score.kind != pb.SCORE_KIND_SPANS:
            return make_item(rollout)
        return await asyncio.to_thread(self._spans_item, task, rollout)

    def _spans_item(self, task: pb.TeacherTask, rollout: pb.Rollout) -> ScoreItem:
        ids = ids_list(rollout.completion_ids)
        if not task.HasField("retokenize"):  # one tokenizer: each token is a span
            if rollout.tokenizer_sha256 != task.tokenizer_sha256:
                raise WireError(
                    f"sample {rollout.sample_id} was written with tokenizer {rollout.tokenizer_sha256[:12]}, the "
                    f"teacher has {task.tokenizer_sha256[:12]}, and nothing says how to read it"
                )
            each = list(range(1, len(ids) + 1))
            return make_item(rollout, ids, Spans(each, each, [True] * len(ids)))
        student = self._spelling(task.retokenize.student, rollout.tokenizer_sha256)
        teacher = self._spelling(task.model, task.tokenizer_sha256)
        is_ended = rollout.finish_reason == pb.FINISH_REASON_STOP and bool(ids) and ids[-1] in student.special_ids
        teacher_ids, spans = retokenize(
            ids,
            student,
            teacher,
            end_token_id=task.retokenize.end_token_id if is_ended else None,
            is_cut=rollout.finish_reason == pb.FINISH_REASON_LENGTH,
        )
        return make_item(rollout, teacher_ids, spans)

    def _spelling(self, model: str, tokenizer_sha256: str) -> Spelling:
        """The tokenizer of a registered model, which must be the one that is meant.

        Raises:
            NotFoundError: the model is not registered here.
            ConflictError: it is, with another tokenizer.
            SpecError: the file is no longer what was registered.
        """
        entry = self._registry.get(model)
        if entry.tokenizer_sha256 != tokenizer_sha256:
            raise ConflictError(
                f"model '{model}' is registered here with tokenizer {entry.tokenizer_sha256[:12]}, meant is "
                f"{tokenizer_sha256[:12]}; it was registered again after the job was accepted"
            )
        return spelling_of(entry)
