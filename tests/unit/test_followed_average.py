"""The average that teachers follow: what it is, when it moves, what a checkpoint keeps, what a job cannot have."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import structlog
from pydantic import ValidationError

from stillhouse.core.errors import UnavailableError
from stillhouse.core.queue.streams import Scope
from stillhouse.core.spec import EmaSpec, JobSpec
from stillhouse.trainer.followed import Followed
from stillhouse.trainer.learner import Learner
from stillhouse.v1 import trainer_pb2
from tests.cluster import job_spec
from tests.tiny import make_tiny_model
from tests.unit.learner_cases import FULL, Teacher, learner, rollouts, stage, train, weights_of

KINDS: list[dict[str, Any]] = [{}, {"dtype": "bfloat16"}, {"lora": {"rank": 2, "alpha": 4}}]
KIND_NAMES = ["float32", "bfloat16", "lora"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "student": make_tiny_model(root / "student", seed=1),
        "teacher": make_tiny_model(root / "teacher", seed=3, hidden_size=16),
    }


@pytest.fixture(scope="module")
def teacher(models: dict[str, Path]) -> Teacher:
    return Teacher(models["teacher"])


def following(models: dict[str, Path], *, decay: float = 0.75, every: int = 1, **student: Any) -> Learner:
    ema = EmaSpec(decay=decay, every=every)
    return learner(models["student"], stage(FULL, lr=1e-2), total_steps=4, ema=ema, **student)


def followed_by(student: Learner) -> dict[str, np.ndarray]:
    return {name: array for name, array, _ in student.followed_arrays()}


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all((array == other[name]).all() for name, array in one.items())


@pytest.mark.parametrize("kind", KINDS, ids=KIND_NAMES)
def test_without_decay_it_is_the_student_bit_for_bit(models: dict[str, Path], teacher: Teacher, kind: Any) -> None:
    student, samples = following(models, decay=0, **kind), teacher.score(rollouts())
    before = weights_of(student)
    for _ in range(2):
        assert same(followed_by(student), weights_of(student))
        train(student, samples, teacher)
    assert not same(before, weights_of(student))


def test_it_is_the_definition_and_moves_every_so_many_steps(models: dict[str, Path], teacher: Teacher) -> None:
    """A skipped step counts, too; training sees nothing of it."""
    student, samples = following(models, every=2), teacher.score(rollouts())
    plain = learner(models["student"], stage(FULL, lr=1e-2), total_steps=4)
    expected = {name: array.astype(np.float64) for name, array in weights_of(student).items()}
    for step in range(1, 5):
        if step == 2:
            student.skip()
            plain.skip()
        else:
            train(student, samples, teacher)
            train(plain, samples, teacher)
        assert same(weights_of(student), weights_of(plain)), step
        if step % 2 == 0:
            for name, array in weights_of(student).items():
                expected[name] = 0.75 * expected[name] + 0.25 * array
        for name, array in followed_by(student).items():
            np.testing.assert_allclose(array, expected[name], rtol=1e-5, atol=1e-7, err_msg=f"{name} at step {step}")


@pytest.mark.parametrize("kind", KINDS, ids=KIND_NAMES)
def test_a_checkpoint_keeps_it(models: dict[str, Path], teacher: Teacher, tmp_path: Path, kind: Any) -> None:
    samples, student = teacher.score(rollouts()), following(models, **kind)
    train(student, samples, teacher)
    followed = followed_by(student)
    student.save(tmp_path / "one")
    restored = following(models, **kind)
    restored.load(tmp_path / "one")
    assert same(followed_by(restored), followed)
    for one in (student, restored):
        train(one, samples, teacher)
    assert same(followed_by(restored), followed_by(student))
    assert not same(followed_by(student), followed)


class NoTeachers:
    """A registry where there is nobody to hint."""

    async def services(self, role: str) -> list[Any]:
        return []


async def test_a_version_is_published_with_every_step_and_copied_when_it_moves() -> None:
    scope = Scope("job_a", 3)
    followed = Followed(scope, EmaSpec(decay=0.5, every=2), registry=NoTeachers(), peers=None, log=None)  # type: ignore[arg-type]
    copies = 0

    async def copy() -> list[tuple[str, np.ndarray, str]]:
        nonlocal copies
        copies += 1
        return [("weight", np.full(4, copies, np.float32), "float32")]

    shas = []
    for version in (5, 6, 7, 8):  # a claim that opens at step 5
        await followed.publish(version, copy)
        held = followed.find(trainer_pb2.FetchWeightsRequest(job_id="job_a", epoch=3, average=True))
        assert (held.index.ref.epoch, held.index.ref.policy_version) == (3, version)
        shas.append(held.index.ref.sha256)
    assert copies == 3
    assert shas[0] != shas[1] == shas[2] != shas[3]
    assert len(followed.refs) == 1, "only the newest is held"


async def test_a_teacher_that_does_not_answer_hides_the_hint_from_nobody() -> None:
    hinted: asyncio.Queue[str] = asyncio.Queue()

    class Teacher:
        def __init__(self, address: str) -> None:
            self.address = address

        async def unary(self, method: str, request: Any, *, timeout_s: float) -> None:
            if self.address == "gone":
                raise UnavailableError("gone")
            hinted.put_nowait(f"{method} {self.address} {request.weights.policy_version}")

    async def services(role: str) -> list[Any]:
        return [SimpleNamespace(address=address, instance=address) for address in ("gone", "a", "b")]

    async def copy() -> list[tuple[str, np.ndarray, str]]:
        return [("weight", np.ones(4, np.float32), "float32")]

    registry: Any = SimpleNamespace(services=services)
    peers: Any = SimpleNamespace(get=lambda address, *_: Teacher(address))
    followed = Followed(
        Scope("job_a", 3), EmaSpec(decay=0.5), registry=registry, peers=peers, log=structlog.get_logger()
    )
    await followed.publish(5, copy)
    for name in "ab":
        assert await asyncio.wait_for(hinted.get(), 5) == f"SyncWeights {name} 5"


FOLLOWER = {"model": "student", "ema_of_student": {"decay": 0.9}}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "head"),
    ({"stages__0__loss": {"objective": "policy_gradient", "baseline": "full_vocabulary"}}, "head"),
    ({"stages__0__loss": {"objective": "top_k"}, "deterministic": True}, "deterministic"),
    ({"stages__0__loss": {"objective": "top_k"}, "evaluation": {"data": {"rows": [{"prompt": "x"}]}}}, "evaluation"),
    (
        {
            "stages__0__loss": {"objective": "top_k"},
            "stages__0__on_policy_fraction": 0.5,
            "stages__0__off_policy_source": "teacher",
        },
        "off_policy_source",
    ),
    ({"stages__0__loss": {"objective": "top_k"}, "teachers__main__model": "teacher"}, "student.model is student"),
    ({"stages__0__loss": {"objective": "top_k"}, "student__dtype": "bfloat16"}, "student.dtype is bfloat16"),
    (
        {
            "stages__0__loss": {"objective": "top_k"},
            "teachers__other": {**FOLLOWER, "ema_of_student": {"decay": 0.5}},
            "stages__0__data__rows": [{"prompt": "a", "teacher": "main"}, {"prompt": "b", "teacher": "other"}],
        },
        "one average",
    ),
]


@pytest.mark.parametrize(("changes", "word"), REFUSED, ids=[word for _, word in REFUSED])
def test_what_such_a_job_cannot_have_is_refused(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(ValidationError, match=word):
        JobSpec.model_validate(job_spec(**{"teachers__main": dict(FOLLOWER), **changes}))


def test_what_it_can_have() -> None:
    for loss in ({"objective": "top_k", "support": "union"}, {"objective": "policy_gradient", "baseline": "top_k"}):
        spec = JobSpec.model_validate(job_spec(teachers__main=dict(FOLLOWER), stages__0__loss=loss))
        assert spec.ema_of_student() == EmaSpec(decay=0.9, every=1)
    assert JobSpec.model_validate(job_spec()).ema_of_student() is None
