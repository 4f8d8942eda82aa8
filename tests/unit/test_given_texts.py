"""Texts that the student does not write: tokens, length, teachers that stay loaded beside the student."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from stillhouse.core.errors import PreflightError
from stillhouse.core.pulse import Pulse
from stillhouse.core.spec import JobSpec, Row, TeacherSpec
from stillhouse.core.spec_base import NO_TEACHER
from stillhouse.core.worker import ComputeThread
from stillhouse.sampler.student import Student
from stillhouse.trainer.progress import _bottleneck
from stillhouse.trainer.prompts import check_lengths, prepare, with_completions
from stillhouse.trainer.templates import Renderer
from stillhouse.trainer.texts import cut
from stillhouse.v1 import rollout_pb2 as pb
from tests.chaos.sim.toys import ToySampler
from tests.cluster import job_spec
from tests.tiny import EOS_ID, PAD_ID, SPECIAL_TOKENS, make_tiny_model


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    return Renderer(make_tiny_model(tmp_path_factory.mktemp("student")))


def test_a_completion_continues_where_the_prompt_ends(renderer: Renderer) -> None:
    """Together they are what the chat template makes of the conversation, up to the end of the turn."""
    conversation = [{"role": "user", "content": "say one"}]
    prompt, completion = renderer.ids(conversation), renderer.completion("one", [PAD_ID, EOS_ID])
    whole = renderer.ids([*conversation, {"role": "assistant", "content": "one"}])
    assert whole[: len(prompt) + len(completion)] == prompt + completion
    assert completion[-1] == EOS_ID, "of the model's end tokens the one that closes a turn"


def test_what_looks_like_a_special_token_in_a_completion_is_text(renderer: Renderer) -> None:
    text = f"a{SPECIAL_TOKENS[EOS_ID]}b"
    ids = renderer.completion(text, [EOS_ID])
    assert len(ids) == len(text) + 1
    assert ids.index(EOS_ID) == len(ids) - 1
    assert renderer.text(ids) == text


def test_a_text_is_cut_at_the_length_of_the_stage() -> None:
    ids = [5, 6, EOS_ID]
    assert cut(ids, 3) == (ids, pb.FINISH_REASON_STOP)
    assert cut(ids, 2) == ([5, 6], pb.FINISH_REASON_LENGTH)


def test_rows_of_a_job_without_teachers_have_none(renderer: Renderer) -> None:
    prompts = prepare([Row(prompt="one", completion="1"), Row(prompt="two")], {}, renderer)
    assert [prompt.teacher for prompt in prompts] == [NO_TEACHER] * 2
    check_lengths(prompts, 8, {"student": 256})
    with pytest.raises(PreflightError, match="row 1 has no 'completion'"):
        with_completions(prompts, renderer, [EOS_ID])
    with pytest.raises(PreflightError, match="row 0: teacher 'x'"):
        prepare([Row(prompt="one", teacher="x")], {}, renderer)
    with pytest.raises(PreflightError, match="row 0: teacher 'None'"):
        prepare([Row(prompt="one")], {"a": TeacherSpec(model="m"), "b": TeacherSpec(model="m")}, renderer)


@pytest.mark.parametrize(
    ("stage", "asks"),
    [
        ({"loss": {"objective": "cross_entropy"}, "on_policy_fraction": 0}, False),
        ({"loss": {"objective": "policy_gradient", "teacher_weight": 0, "reward": {}}}, False),
        ({"loss": {"objective": "policy_gradient", "reward": {}}}, True),
        ({"loss": {"objective": "full_vocabulary"}, "on_policy_fraction": 0}, True),
    ],
    ids=["cross-entropy", "reward alone", "reward and teacher", "given texts"],
)
def test_teacher_services_are_needed_for_scores_and_measurements_only(stage: dict[str, Any], asks: bool) -> None:
    spec = job_spec()
    spec["stages"][0] |= stage
    spec["stages"][0]["schedule"]["group_size"] = 2 if "on_policy_fraction" not in stage else 1
    assert JobSpec.model_validate(spec).asks_teachers() == asks
    spec["evaluation"] = {"data": {"rows": [{"prompt": "held out"}]}}
    assert JobSpec.model_validate(spec).asks_teachers()


@pytest.mark.parametrize(
    ("sample", "score", "train_s", "expected"),
    [
        (10.0, 20.0, 1.0, "sampler"),
        (20.0, 10.0, 1.0, "teacher"),
        (10.0, 0.0, 1.0, "sampler"),
        (0.0, 10.0, 1.0, "teacher"),
        (10.0, 20.0, 9.0, "trainer"),
    ],
    ids=["slow sampler", "slow teacher", "no teacher", "given texts", "slow trainer"],
)
def test_what_does_not_run_is_no_bottleneck(sample: float, score: float, train_s: float, expected: str) -> None:
    assert _bottleneck(2.0, train_s, {"sample": sample, "score": score}) == expected


@pytest.mark.parametrize(("budget_models", "num_loads"), [(2, 3), (1, 4)], ids=["two fit", "one fits"])
async def test_guests_stay_loaded_within_the_budget(budget_models: int, num_loads: int) -> None:
    """Asked for are a, b, a in bfloat16, then b in float32, twice as large: what was used last stays."""
    loads: list[tuple[str, str]] = []

    async def load(entry: Any, dtype: str) -> Any:
        loads.append((entry.sha256, dtype))
        return ToySampler()

    gib = 2**30
    models = {name: SimpleNamespace(sha256=name, num_parameters=gib // 2) for name in ("a", "b")}
    settings = SimpleNamespace(teacher_memory_gib=float(budget_models))
    ctx: Any = SimpleNamespace(models=SimpleNamespace(get=models.__getitem__), settings=settings)
    compute = ComputeThread("sampler", Pulse())
    student = Student(ctx, compute, load)
    student._verified = {"a", "b"}
    engines = []
    for name in ("a", "b", "a"):
        async with student.guest(name, "bfloat16") as engine:
            engines.append(engine)
    assert (engines[0] is engines[2]) == (budget_models == 2)
    async with student.guest("b", "float32"):
        pass
    assert len(loads) == num_loads
    assert not student.is_loading_guest
    compute.close()
