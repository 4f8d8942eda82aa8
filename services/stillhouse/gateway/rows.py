"""Rows of uploaded files, as validation reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
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


def rows_of(path: Path) -> tuple[Sequence[int], Sequence[Row]]:
    """Lines and rows of an uploaded file. Small ones are kept: a file is named by its content, so it never changes."""
    return _kept_rows(path) if path.stat().st_size <= LIGHT_BYTES else _all_rows(path)


def _all_rows(path: Path) -> tuple[Sequence[int], Sequence[Row]]:
    lines, rows = zip(*read_rows(path), strict=True)
    return lines, rows


_kept_rows = lru_cache(maxsize=KEPT_FILES)(_all_rows)


def read_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """(line, row) of an uploaded file, which was checked when it came."""
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield number, Row.model_validate_json(line)
