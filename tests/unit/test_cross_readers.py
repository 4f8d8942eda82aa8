"""A teacher with another tokenizer: what it reads, and which models have no text in common."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, normalizers

from stillhouse.core.blobs import Artifacts
from stillhouse.core.errors import ConflictError, NotFoundError, PreflightError, SpecError, WireError
from stillhouse.core.models import ModelEntry, ModelRegistry, inspect_model
from stillhouse.core.spec import JobSpec
from stillhouse.core.spelling import Spelling
from stillhouse.core.tensors import ids_tensor
from stillhouse.teacher.spans import Reader
from stillhouse.trainer.preflight import load_prompts, open_readers
from stillhouse.v1 import rollout_pb2 as pb
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
    (prompt,) = load_prompts(SPEC.stages[0], SPEC, readers, Artifacts(Path("/nowhere")))
    assert prompt.teacher_prompt_ids is not None
    read = Tokenizer.from_file(str(Path(teacher.path) / "tokenizer.json")).decode(
        list(prompt.teacher_prompt_ids), skip_special_tokens=False
    )
    assert read == "<|turn|>user: why<|end|><|turn|>assistant: "
    assert readers.crossing == {"main": [END_ID]}
    assert readers.for_teachers["main"].end_of_turn([END_ID]) == END_ID


def test_the_students_tokens_are_not_counted_against_the_teachers_limit(
    student: ModelEntry, teacher: ModelEntry
) -> None:
    def load(entry: ModelEntry, limit: int) -> None:
        readers = open_readers(SPEC, student, {"main": entry.model_copy(update={"max_sequence_length": limit})})
        load_prompts(SPEC.stages[0], SPEC, readers, Artifacts(Path("/nowhere")))

    (prompt,) = load_prompts(
        SPEC.stages[0], SPEC, open_readers(SPEC, student, {"main": teacher}), Artifacts(Path("/nowhere"))
    )
    own, most = len(prompt.teacher_prompt_ids or ()), SPEC.stages[0].sampling.max_tokens
    assert most > 1
    load(teacher, own + 1)
    with pytest.raises(PreflightError, match=rf"{own} prompt tokens \+ 1 completion tokens exceed the {own} that main"):
        load(teacher, own)
    with pytest.raises(PreflightError, match=rf"\+ {most} completion tokens exceed the"):
        load(student, len(prompt.prompt_ids) + most - 1)


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


@pytest.fixture
def registry(tmp_path: Path, student: ModelEntry, teacher: ModelEntry) -> ModelRegistry:
    made = ModelRegistry(tmp_path / "models.yaml")
    made.add(student)
    made.add(teacher)
    return made


def rollout(student: ModelEntry, text: str, **fields: Any) -> pb.Rollout:
    """A completion that ended by itself."""
    ids = [*Spelling(Path(student.path) / "tokenizer.json").write(text), EOS_ID]
    return pb.Rollout(
        sample_id="1/0",
        prompt_ids=ids_tensor([5]),
        teacher_prompt_ids=ids_tensor([6, 7]),
        completion_ids=ids_tensor(ids),
        finish_reason=pb.FINISH_REASON_STOP,
        score=pb.ScoreSpec(kind=pb.SCORE_KIND_SPANS),
        **{"tokenizer_sha256": student.tokenizer_sha256, **fields},
    )


def task(student: ModelEntry, teacher: ModelEntry) -> pb.TeacherTask:
    made = pb.TeacherTask(model="teacher", tokenizer_sha256=teacher.tokenizer_sha256)
    made.retokenize.CopyFrom(pb.Retokenize(student="student", end_token_id=END_ID))
    return made


async def test_an_engine_gets_the_teachers_tokens(
    registry: ModelRegistry, student: ModelEntry, teacher: ModelEntry
) -> None:
    item = await Reader(registry).item(task(student, teacher), rollout(student, "the fox"))
    written = Spelling(Path(teacher.path) / "tokenizer.json").write("the fox")
    assert item.completion_ids == [*written, END_ID]
    assert item.prompt_ids == [6, 7]
    assert item.kind == pb.SCORE_KIND_SAMPLED
    assert item.spans is not None
    assert (item.spans.student_ends[-1], item.spans.teacher_ends[-1]) == (len("the fox") + 1, len(written) + 1)


async def test_a_text_that_cannot_be_read_is_no_guess(
    registry: ModelRegistry, student: ModelEntry, teacher: ModelEntry
) -> None:
    """Another tokenizer than the registered one, a model that is not registered: trouble of this process. Nobody to say
    how to read: trouble of the rollout."""
    reader, right = Reader(registry), task(student, teacher)
    with pytest.raises(ConflictError, match=r"'student' is registered here with tokenizer .*, meant is other"):
        await reader.item(right, rollout(student, "a", tokenizer_sha256="other"))
    stranger = task(student, teacher)
    stranger.retokenize.student = "stranger"
    with pytest.raises(NotFoundError, match="unknown model 'stranger'"):
        await reader.item(stranger, rollout(student, "a"))
    silent = task(student, teacher)
    silent.ClearField("retokenize")
    with pytest.raises(WireError, match="nothing says how to read it"):
        await reader.item(silent, rollout(student, "a"))
    (Path(teacher.path) / "tokenizer.json").write_text("{}")
    with pytest.raises(SpecError, match="changed since the model was registered"):
        await reader.item(right, rollout(student, "a"))
