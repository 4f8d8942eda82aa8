"""Two chat templates on one tokenizer: who reads what, down to the tokens; and templates that cannot be read by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stillhouse.core.blobs import Artifacts
from stillhouse.core.errors import PreflightError
from stillhouse.core.models import ModelEntry, inspect_model
from stillhouse.core.spec import JobSpec, Row, TeacherSpec
from stillhouse.trainer.preflight import Readers, check_all_ends, load_held_out, load_prompts, open_readers
from stillhouse.trainer.prompts import Prompt, prepare
from tests.cluster import job_spec
from tests.gateway_kit import make_model
from tests.reading import OTHER, THINKING
from tests.tiny import CHAT_TEMPLATE, EOS_ID, PAD_ID, make_tokenizer

NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% endfor %}[a]"
)
QUESTION = [{"role": "user", "content": "why"}]


def add(home: Path, name: str, template: str | None, *, ends: int = EOS_ID, bos: bool = False) -> ModelEntry:
    """A registered model of the tiny tokenizer; its weights are never loaded."""
    folder = make_model(home / name, has_template=False)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    if bos:
        tokenizer.bos_token = "<|endoftext|>"
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": {ends}}}')
    return inspect_model(name, folder)


def spec_of(rows: list[dict[str, Any]], teacher: dict[str, Any] | None = None, **changes: Any) -> JobSpec:
    data = {"rows": rows, **changes.pop("data", {})}
    teachers = {"main": {"model": "teacher", **(teacher or {})}}
    return JobSpec.model_validate(job_spec(teachers=teachers, stages__0__data=data, **changes))


def read(spec: JobSpec, student: ModelEntry, teacher: ModelEntry) -> tuple[Readers, list[Prompt]]:
    readers = open_readers(spec, student, {"main": teacher})
    check_all_ends(spec, readers)
    return readers, load_prompts(spec.stages[0], spec, readers, Artifacts(Path("/nowhere")))


def as_text(ids: Any) -> str:
    return str(make_tokenizer().decode(list(ids), skip_special_tokens=False))


def test_a_teacher_reads_with_its_own_template(tmp_path: Path) -> None:
    student, teacher = add(tmp_path, "student", CHAT_TEMPLATE), add(tmp_path, "teacher", OTHER)
    _, (prompt,) = read(spec_of([{"prompt": "why"}]), student, teacher)
    assert as_text(prompt.prompt_ids) == "<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.teacher_prompt_ids is not None
    assert as_text(prompt.teacher_prompt_ids) == "<|endoftext|>[user]why[assistant]"


@pytest.mark.parametrize("template", [None, CHAT_TEMPLATE], ids=["none", "equal"])
def test_a_teacher_without_a_template_of_its_own_reads_what_the_student_reads(
    tmp_path: Path, template: str | None
) -> None:
    student, teacher = add(tmp_path, "student", CHAT_TEMPLATE), add(tmp_path, "teacher", template)
    _, (prompt,) = read(spec_of([{"prompt": "why"}]), student, teacher)
    assert prompt.teacher_prompt_ids is None


def test_the_completion_continues_both_prompts(tmp_path: Path) -> None:
    """Prompt + completion is, for both, what their template makes of the answered conversation."""
    student, teacher = add(tmp_path, "student", CHAT_TEMPLATE), add(tmp_path, "teacher", OTHER)
    readers, (prompt,) = read(spec_of([{"prompt": "why"}]), student, teacher)
    completion = readers.renderer.completion("so", [EOS_ID])
    answered = [*QUESTION, {"role": "assistant", "content": "so"}]
    theirs = (readers.for_teachers["main"], prompt.teacher_prompt_ids)
    for renderer, ids in ((readers.renderer, prompt.prompt_ids), theirs):
        assert ids is not None
        assert renderer.ids(answered)[: len(ids) + len(completion)] == (*ids, *completion)


def test_template_arguments_of_teacher_win_over_row_and_row_over_data(tmp_path: Path) -> None:
    student, teacher = add(tmp_path, "student", THINKING), add(tmp_path, "teacher", THINKING)
    rows = [{"prompt": "why"}, {"prompt": "why", "chat_template_kwargs": {"enable_thinking": False}}]
    thinks: dict[str, Any] = {"chat_template_kwargs": {"enable_thinking": True}}
    _, prompts = read(spec_of(rows, data=thinks), student, teacher)
    assert ["<think></think>" in as_text(prompt.prompt_ids) for prompt in prompts] == [False, True]
    assert [prompt.teacher_prompt_ids for prompt in prompts] == [None, None]

    _, prompts = read(spec_of(rows, thinks, data=thinks), student, teacher)
    assert prompts[0].teacher_prompt_ids is None
    assert prompts[1].teacher_prompt_ids == prompts[0].prompt_ids


def test_system_and_privileged_prompts_are_rendered_by_the_teachers_template(tmp_path: Path) -> None:
    student, teacher = add(tmp_path, "student", CHAT_TEMPLATE), add(tmp_path, "teacher", OTHER)
    privileged = [{"role": "user", "content": "why? (because)"}]
    messages = [{"role": "system", "content": "old"}, *QUESTION]
    rows = [{"messages": messages}, {"prompt": "x", "teacher_prompt": privileged}]
    _, prompts = read(spec_of(rows, {"system_prompt": "know"}), student, teacher)
    assert [as_text(prompt.teacher_prompt_ids) for prompt in prompts] == [
        "<|endoftext|>[system]know[user]why[assistant]",
        "<|endoftext|>[user]why? (because)[assistant]",
    ]


@pytest.mark.parametrize(
    ("template", "row", "words"),
    [
        (
            NO_SYSTEM,
            {"messages": [{"role": "system", "content": "s"}, *QUESTION]},
            "row 1, as teacher 'main' reads it: its chat template refuses it: no system role",
        ),
        (
            "{{ messages[0].content + 1 }}",
            {"prompt": "x"},
            "teacher 'main' (teacher): its chat template refuses it: can only concatenate",
        ),
        (
            CHAT_TEMPLATE.partition("{% if add_generation_prompt %}")[0],
            {"prompt": "x"},
            r"it ignores add_generation_prompt, but writes '<|im_start|>assistant\n' before an answer",
        ),
        (
            OTHER.replace("[{{ m.role }}]", ""),
            {"prompt": "<|endoftext|>why"},
            "row 1, as teacher 'main' reads it: its prompt begins with two BOS tokens ('<|endoftext|>', id 0)",
        ),
    ],
    ids=["no system role", "broken", "no head", "two BOS"],
)
def test_what_cannot_be_read_names_row_and_reader(
    tmp_path: Path, template: str, row: dict[str, Any], words: str
) -> None:
    student, teacher = add(tmp_path, "student", CHAT_TEMPLATE), add(tmp_path, "teacher", template, bos=True)
    with pytest.raises(PreflightError) as caught:
        read(spec_of([{"prompt": "fine"}, row]), student, teacher)
    assert words in caught.value.message


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, OTHER, THINKING], ids=["plain", "other", "thinking"])
def test_prompts_that_end_where_the_assistant_speaks_pass(tmp_path: Path, template: str) -> None:
    readers = open_readers(spec_of([{"prompt": "x"}]), add(tmp_path, "student", template), {})
    assert prepare([Row(prompt="x")], {}, readers.renderer)


def test_answers_may_follow_at_once(tmp_path: Path) -> None:
    """As with Mistral's template: there is no head that could be missing."""
    turn = "{% if m.role == 'user' %}[I] {{ m.content }} [/I]{% else %} {{ m.content }}{% endif %}"
    student = add(tmp_path, "student", f"{{% for m in messages %}}{turn}{{% endfor %}}")
    readers = open_readers(spec_of([{"prompt": "x"}]), student, {})
    assert as_text(prepare([Row(prompt="x")], {}, readers.renderer)[0].prompt_ids) == "[I] x [/I]"


def test_a_teacher_that_ends_its_turns_otherwise_is_refused_with_the_token(tmp_path: Path) -> None:
    ends_otherwise = CHAT_TEMPLATE.replace("<|im_end|>", "<|pad|>")
    student, teacher = add(tmp_path, "student", CHAT_TEMPLATE), add(tmp_path, "teacher", ends_otherwise, ends=PAD_ID)
    rows = [{"prompt": "why"}]
    with pytest.raises(PreflightError, match=rf"ends its turns with token {PAD_ID}.* Add {PAD_ID} to sampling"):
        read(spec_of(rows), student, teacher)
    read(spec_of(rows, stages__0__sampling={"stop_token_ids": [PAD_ID], "max_tokens": 8}), student, teacher)


def test_the_longest_prompt_that_a_teacher_reads_is_checked(tmp_path: Path) -> None:
    student, teacher = add(tmp_path, "student", CHAT_TEMPLATE), add(tmp_path, "teacher", OTHER)
    rows = [{"prompt": "x"}, {"prompt": "x", "teacher_prompt": [{"role": "user", "content": "x" * 240}]}]
    with pytest.raises(PreflightError, match=r"row 1: 258 prompt tokens .* exceed the 256 that main can read"):
        read(spec_of(rows), student, teacher)


def test_held_out_rows_are_told_apart(tmp_path: Path) -> None:
    student, teacher = add(tmp_path, "student", CHAT_TEMPLATE), add(tmp_path, "teacher", CHAT_TEMPLATE)
    spec = spec_of([{"prompt": "x"}], evaluation={"data": {"rows": [{"prompt": "y" * 300}]}})
    readers, _ = read(spec, student, teacher)
    with pytest.raises(PreflightError, match=r"evaluation.data: row 0"):
        load_held_out(spec, readers, Artifacts(Path("/nowhere")))


def test_a_row_of_one_of_several_stages_is_named_with_its_stage(tmp_path: Path) -> None:
    student, teacher = add(tmp_path, "student", CHAT_TEMPLATE), add(tmp_path, "teacher", CHAT_TEMPLATE)
    one = spec_of([{"prompt": "x"}]).stages[0].model_dump()
    two = {**one, "name": "second", "data": {"rows": [{"prompt": "y" * 300}]}}
    spec = JobSpec.model_validate(job_spec(stages=[one, two]))
    readers, _ = read(spec, student, teacher)
    with pytest.raises(PreflightError, match=r"stage 'second': row 0"):
        load_prompts(spec.stages[1], spec, readers, Artifacts(Path("/nowhere")))


def test_other_tokenizers_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    student = add(tmp_path, "student", CHAT_TEMPLATE)
    stranger = inspect_model("stranger", make_model(tmp_path / "stranger"))
    with pytest.raises(PreflightError, match=r"have different tokenizers.*token 0 is '<\|endoftext\|>' for 'student'"):
        open_readers(spec_of([{"prompt": "x"}]), student, {"main": stranger})


def test_arguments_that_are_not_the_templates_are_refused() -> None:
    with pytest.raises(ValueError, match="'tokenize' is not the template's"):
        TeacherSpec.model_validate({"model": "m", "chat_template_kwargs": {"tokenize": False}})
