"""What checks know of a source's rows without looking at each, against looking at each; how a job is written down."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stillhouse.core.blobs import sealed, sealed_line, unsealed
from stillhouse.core.errors import CorruptError
from stillhouse.core.spec import Row
from stillhouse.gateway.rows import Rows

ALL_KINDS = [
    {"prompt": "one"},
    {"prompt": "two", "teacher": "main", "completion": " "},
    {"prompt": "three", "teacher": {"main": 1, "b": 2}, "completion": "yes"},
    {"prompt": "four", "verifier": "exact", "answer": "4", "chat_template_kwargs": {"thinking": True}},
]
ASKED: dict[str, Callable[[Row], object]] = {
    "teachers": lambda row: row.mixture(["main"]) == {"main": 1.0},
    "several teachers": lambda row: len(row.mixture(["main", "b"])) > 1,
    "completion": lambda row: not (row.completion or "").strip(),
    "verifier": lambda row: row.verifier,
    "template arguments": lambda row: row.chat_template_kwargs,
    "all": lambda _: True,
    "none": lambda _: False,
}
"""What checks ask of a row without reading its texts."""


@pytest.mark.parametrize("asked", ASKED)
def test_rows_found_by_their_kind_are_those_found_one_by_one(asked: str) -> None:
    picked = random.Random(1).choices(ALL_KINDS, k=40)
    rows = [Row.model_validate({**row, "prompt": f"{row['prompt']} {n}"}) for n, row in enumerate(picked)]
    table = Rows(rows, range(len(rows)))
    slow = [(index, row) for index, row in enumerate(rows) if ASKED[asked](row)]
    assert list(table.where(ASKED[asked])) == slow
    assert sum(count for row, count in table.examples() if ASKED[asked](row)) == len(slow)


@pytest.mark.parametrize(
    "longest", [{"prompt": "é" * 20}, {"prompt": "x", "teacher_prompt": [{"role": "user", "content": "é" * 20}]}]
)
def test_the_longest_text_is_known_in_bytes(longest: dict[str, Any]) -> None:
    rows = [Row.model_validate(row) for row in ({"prompt": "short"}, longest)]
    assert Rows(rows, range(2)).longest_bytes == 40


def test_a_sealed_line_is_read_back_as_the_document(tmp_path: Path) -> None:
    document = {"spec": {"b": [1.5, None], "a": "é😀"}, "id": "job_1", "idempotency": ["", "x"]}
    path = tmp_path / "job.json"
    path.write_bytes(sealed_line({name: json.dumps(value, sort_keys=True) for name, value in document.items()}))
    assert unsealed(path) == document
    assert json.loads(path.read_bytes()) == sealed(document)
    path.write_bytes(path.read_bytes().replace(b"1.5", b"1.6"))
    with pytest.raises(CorruptError):
        unsealed(path)
