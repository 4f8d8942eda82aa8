"""Rows of uploaded files, as validation reads them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Final

from stillhouse.core.blobs import Artifacts
from stillhouse.core.spec import JobSpec, Row

LIGHT_ROWS: Final = 256
LIGHT_BYTES: Final = 256 << 10
"""Inline rows and bytes of files up to which a job is checked beside others: some ten milliseconds, some megabytes."""
KEPT_FILES: Final = 16
"""Small files whose rows stay in memory: jobs that are tried with several settings name the same ones."""


def is_light(spec: JobSpec, artifacts: Artifacts) -> bool:
    """Whether the rows of a job are few enough that many such jobs may be checked at once."""
    sources = [*(stage.data for stage in spec.stages), *([spec.evaluation.data] if spec.evaluation.data else [])]
    files = [artifacts.file(data.file) for data in sources if data.file]
    return (
        sum(len(data.rows or ()) for data in sources) <= LIGHT_ROWS
        and sum(path.stat().st_size for path in files if path.is_file()) <= LIGHT_BYTES
    )


@dataclass(frozen=True)
class Rows:
    """The rows of a source, with what most checks ask of them worked out once."""

    rows: Sequence[Row]
    lines: Sequence[int]
    """Line of each row in its file; position for inline rows."""

    @cached_property
    def kinds(self) -> dict[Kind, list[int]]:
        """The rows of each kind, by their position."""
        found: dict[Kind, list[int]] = {}
        for index, row in enumerate(self.rows):
            found.setdefault(_kind(row), []).append(index)
        return found

    @cached_property
    def longest_bytes(self) -> int:
        """Of what student or teacher reads of a row at most, without a teacher's system prompt."""
        texts = (text for row in self.rows for text in (conversation_text(row), teacher_text(row)) if text)
        return max((len(text.encode()) for text in texts), default=0)

    @cached_property
    def prompts(self) -> dict[str, int]:
        """Position of the (last) row with a prompt, by the prompt as text."""
        return {json.dumps(row.conversation(), sort_keys=True): index for index, row in enumerate(self.rows)}

    def examples(self) -> Iterator[tuple[Row, int]]:
        """A row of each kind, and how many there are of it."""
        return ((self.rows[indexes[0]], len(indexes)) for indexes in self.kinds.values())

    def where(self, is_wrong: Callable[[Row], object]) -> Iterator[tuple[int, Row]]:
        """Position and row of all whose kind `is_wrong`, in order."""
        wrong = [indexes for indexes in self.kinds.values() if is_wrong(self.rows[indexes[0]])]
        return ((index, self.rows[index]) for index in sorted(index for indexes in wrong for index in indexes))


Kind = tuple[object, ...]


def _kind(row: Row) -> Kind:
    """Equal for rows that differ in their texts only: which teachers judge them, by what verifier, with which template
    arguments, and whether they have a completion."""
    teachers = tuple(sorted(row.teacher.items())) if isinstance(row.teacher, dict) else row.teacher
    completion = row.completion if row.completion is None else bool(row.completion.strip())
    return teachers, row.verifier, tuple(row.chat_template_kwargs), completion


def conversation_text(row: Row) -> str:
    """What the student reads of a row, without the chat template."""
    return "\n".join(message["content"] for message in row.conversation())


def teacher_text(row: Row) -> str | None:
    """What its teacher reads instead; None = the same."""
    return None if row.teacher_prompt is None else "\n".join(message.content for message in row.teacher_prompt)


def rows_of(path: Path) -> Rows:
    """Rows of an uploaded file. Those of small ones are kept: a file is named by its content, so it never changes."""
    return _kept_rows(path) if path.stat().st_size <= LIGHT_BYTES else _all_rows(path)


def _all_rows(path: Path) -> Rows:
    lines, rows = zip(*read_rows(path), strict=True)
    return Rows(rows, lines)


_kept_rows = lru_cache(maxsize=KEPT_FILES)(_all_rows)


def read_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """(line, row) of an uploaded file, which was checked when it came."""
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield number, Row.model_validate_json(line)
