"""A teacher with another tokenizer at the start of a job: what it reads, and which models have no text in common."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, normalizers

from stillhouse.core.blobs import Artifacts
from stillhouse.core.errors import PreflightError
from stillhouse.core.models import ModelEntry, inspect_model
from stillhouse.core.spec import JobSpec
from stillhouse.trainer.preflight import load_prompts, open_readers
from tests.cluster import job_spec
from tests.gateway_kit import make_model
from tests.spellings import END_ID, as_pretrained, byte_level
from tests.tiny import EOS_ID, make_tokenizer

SPEC = JobSpec.model_validate(
    job_spec(
        stages__0__data={"rows": [{"prompt": "why"}]},
        stages__0__loss={"objective": "policy_gradient", "cross_tokenizer": True},
    )
)


def add(home: Path, name: str, tokenizer: Any, eos: int) -> ModelEntry:
    """A registered model; its weights are never loaded."""
    folder = make_model(home / name, has_template=False)
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    return inspect_model(name, folder)


@pytest.fixture
def student(tmp_path: Path) -> ModelEntry:
    return add(tmp_path, "student", make_tokenizer(), EOS_ID)


@pytest.fixture
def teacher(tmp_path: Path) -> ModelEntry:
    return add(tmp_path, "teacher", as_pretrained(byte_level(tmp_path / "tokenizer.json")), END_ID)


def test_it_reads_its_own_tokens_by_its_own_template(student: ModelEntry, teacher: ModelEntry) -> None:
    readers = open_readers(SPEC, student, {"main": teacher})
    ((prompt,), _) = load_prompts(SPEC, readers, Artifacts(Path("/nowhere")))
    assert prompt.teacher_prompt_ids is not None
    read = Tokenizer.from_file(str(Path(teacher.path) / "tokenizer.json")).decode(
        list(prompt.teacher_prompt_ids), skip_special_tokens=False
    )
    assert read == "<|turn|>user: why<|end|><|turn|>assistant: "
    assert readers.crossing == {"main": [END_ID]}
    assert readers.for_teachers["main"].end_of_turn([END_ID]) == END_ID


def test_a_teacher_with_the_students_tokenizer_reads_ids(student: ModelEntry) -> None:
    assert not open_readers(SPEC, student, {"main": student}).crossing


def _lowers(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save(str(folder / "tokenizer.json"))


def _has_no_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def _ends_with_text(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 70}))


def _names_pieces(folder: Path) -> None:
    document = json.loads((folder / "tokenizer.json").read_text())
    document["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    (folder / "tokenizer.json").write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("whose", "spoil", "message"),
    [
        ("teacher", _lowers, "'teacher': its tokenizer changes texts.*why\\?"),
        ("student", _lowers, "'student': its tokenizer changes texts"),
        ("teacher", _has_no_template, "'teacher' has no chat template"),
        ("student", _ends_with_text, r"'student' ends with \[70\], which tokenizer.json does not mark as special"),
        ("teacher", _names_pieces, "'teacher': .*decoder of \\['WordPiece'\\]"),
    ],
)
def test_models_without_a_text_in_common_are_refused(
    student: ModelEntry, teacher: ModelEntry, whose: str, spoil: Callable[[Path], None], message: str
) -> None:
    entries = {"student": student, "teacher": teacher}
    spoil(Path(entries[whose].path))
    entries[whose] = inspect_model(whose, Path(entries[whose].path))
    with pytest.raises(PreflightError, match=message):
        open_readers(SPEC, entries["student"], {"main": entries["teacher"]})
