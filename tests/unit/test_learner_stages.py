"""A stage of the learner begins as a new job from the same weights would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillhouse.core.spec import EmaSpec, StageSpan
from stillhouse.trainer.learner import Learner
from tests.tiny import make_tiny_model
from tests.unit.learner_cases import FULL, POLICY_GRADIENT, Teacher, learner, rollouts, stage, train, weights_of

FIRST, SECOND = 3, 4
"""Steps of the stages."""
STAGE_1 = stage(POLICY_GRADIENT, lr=1e-2, ema_decay=0.5)
STAGE_2 = stage(FULL, lr=5e-3, warmup_steps=2, decay="linear", ema_decay=0.8, max_grad_norm=0.5)
SPANS = StageSpan(0, STAGE_1, 0, FIRST, 0), StageSpan(1, STAGE_2, FIRST, FIRST + SECOND, 0)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stages")
    make_tiny_model(root / "student", seed=1)
    make_tiny_model(root / "teacher", seed=2)
    return root


def steps(student: Learner, teacher: Teacher, numbers: range) -> list[dict[str, float]]:
    return [train(student, teacher.score(rollouts(number)), teacher) for number in numbers]


def after_the_first_stage(root: Path, **options: Any) -> Learner:
    student = learner(root / "student", STAGE_1, total_steps=FIRST + SECOND, **options)
    student.span = SPANS[0]
    steps(student, Teacher(root / "teacher"), range(FIRST))
    return student


def test_it_begins_as_a_student_that_starts_from_these_weights(root: Path, tmp_path: Path) -> None:
    """Moments, rate and average: all are those of a learner that never was in another stage."""
    teacher = Teacher(root / "teacher")
    staged = after_the_first_stage(root)
    staged.export(root / "student", tmp_path / "boundary", {})
    staged.begin_stage(SPANS[1])
    fresh = learner(tmp_path / "boundary", STAGE_2, total_steps=SECOND)
    mine, theirs = (steps(student, teacher, range(FIRST, FIRST + SECOND)) for student in (staged, fresh))
    rates = [metrics["lr"] for metrics in mine]
    assert rates == [metrics["lr"] for metrics in theirs]
    assert rates[0] < rates[1] > rates[-1]
    assert [metrics["grad/norm"] for metrics in mine] == [metrics["grad/norm"] for metrics in theirs]
    assert staged.is_done
    assert fresh.is_done, "what both show now is the average"
    assert_same(staged, fresh)
    for student in (staged, fresh):
        student.engine.show_average(False)
    assert {name: array.tobytes() for name, array, _ in staged.engine.state_arrays()} == {
        name: array.tobytes() for name, array, _ in fresh.engine.state_arrays()
    }


def test_moments_are_not_carried_over(root: Path, tmp_path: Path) -> None:
    """Negative control: with those of the first stage the weights would differ."""
    teacher = Teacher(root / "teacher")
    staged, carried = after_the_first_stage(root), after_the_first_stage(root)
    staged.begin_stage(SPANS[1])
    carried.save(tmp_path / "boundary")
    carried.begin_stage(SPANS[1])
    carried.load(tmp_path / "boundary")
    for student in (staged, carried):
        steps(student, teacher, range(FIRST, FIRST + 1))
    assert any(not np.array_equal(weights_of(carried)[name], array) for name, array in weights_of(staged).items())


def test_a_boundary_shows_the_weights_that_learn_and_not_their_average(root: Path) -> None:
    student = after_the_first_stage(root)
    shown = weights_of(student)
    student.engine.show_average(True)
    averaged = {name: array for name, array, _ in student.engine.state_arrays()}
    assert any(not np.array_equal(shown[name], averaged[name]) for name in shown)
    student.begin_stage(SPANS[1])
    assert all(np.array_equal(array, shown[name]) for name, array in weights_of(student).items())


def test_the_average_that_teachers_follow_goes_on(root: Path) -> None:
    student = after_the_first_stage(root, ema=EmaSpec(decay=0.5))
    before = {name: array for name, array, _ in student.followed_arrays()}
    student.begin_stage(SPANS[1])
    assert all(np.array_equal(array, before[name]) for name, array, _ in student.followed_arrays())
    assert any(not np.array_equal(array, before[name]) for name, array in weights_of(student).items())


def assert_same(one: Learner, other: Learner) -> None:
    mine, theirs = weights_of(one), weights_of(other)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not np.array_equal(mine[name], theirs[name])] == []
