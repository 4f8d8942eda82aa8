"""A run that was saved and loaded equals the run that was not, bit for bit."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from stillhouse.core.errors import CorruptError, NotFoundError
from stillhouse.trainer import checkpoint
from tests.tiny import make_tiny_model
from tests.unit.learner_cases import FULL, POLICY_GRADIENT, Teacher, learner, rollouts, stage, train, weights_of

WEIGHTS_FILE, OPTIMIZER_FILE = "model.safetensors", "optimizer.safetensors"


@pytest.fixture(scope="module")
def student_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("student"), seed=1)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    return Teacher(make_tiny_model(tmp_path_factory.mktemp("teacher"), seed=2))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_load_then_step_equals_steps_without_a_break(
    student_dir: Path, teacher: Teacher, tmp_path: Path, dtype: str
) -> None:
    spec = stage(FULL, warmup_steps=2, decay="cosine", weight_decay=0.01)
    batches = [teacher.score(rollouts(seed)) for seed in range(5)]
    whole = learner(student_dir, spec, dtype=dtype)
    expected = [train(whole, batch, teacher) for batch in batches]

    first = learner(student_dir, spec, dtype=dtype)
    for batch in batches[:3]:
        train(first, batch, teacher)
    first.save(tmp_path / "checkpoint")
    second = learner(student_dir, spec, dtype=dtype)
    train(second, batches[4], teacher)  # traces of another life must go
    second.load(tmp_path / "checkpoint")
    assert second.policy_version == 3
    assert [train(second, batch, teacher) for batch in batches[3:]] == expected[3:]
    assert all((array == weights_of(second)[name]).all() for name, array in weights_of(whole).items())
    second.save(tmp_path / "second")
    whole.save(tmp_path / "whole")
    for file in (WEIGHTS_FILE, OPTIMIZER_FILE):
        assert (tmp_path / "second" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_saving_changes_nothing(student_dir: Path, teacher: Teacher, tmp_path: Path) -> None:
    student = learner(student_dir, stage(POLICY_GRADIENT))
    train(student, teacher.score(rollouts()))
    before = weights_of(student)
    student.save(tmp_path / "a")
    student.save(tmp_path / "b")
    assert all((array == before[name]).all() for name, array in weights_of(student).items())
    for file in (WEIGHTS_FILE, OPTIMIZER_FILE, checkpoint.STATE_FILE):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_checkpoint_before_the_first_step_loads(student_dir: Path, teacher: Teacher, tmp_path: Path) -> None:
    student = learner(student_dir, stage(POLICY_GRADIENT))
    student.save(tmp_path)
    train(student, teacher.score(rollouts()))
    student.load(tmp_path)
    assert student.policy_version == 0
    fresh = learner(student_dir, stage(POLICY_GRADIENT))
    assert train(student, teacher.score(rollouts())) == train(fresh, teacher.score(rollouts()))
    assert all((array == weights_of(fresh)[name]).all() for name, array in weights_of(student).items())


def test_all_random_generators_go_on_where_they_were() -> None:
    def draw() -> list[float]:
        return [random.gauss(0, 1), random.random(), *np.random.randn(3).tolist(), *torch.randn(3).tolist()]

    draw()  # an odd number of normal draws leaves a cached value behind, which belongs to the state
    states = checkpoint.random_states()
    expected = draw()
    draw()
    checkpoint.restore_random_states(states)
    assert draw() == expected


def test_a_checkpoint_of_another_student_is_refused(student_dir: Path, tmp_path: Path) -> None:
    wide = make_tiny_model(tmp_path / "wide", hidden_size=16)
    learner(wide, stage(POLICY_GRADIENT)).save(tmp_path / "checkpoint")
    student = learner(student_dir, stage(POLICY_GRADIENT))
    before = weights_of(student)
    with pytest.raises(CorruptError, match="does not fit the student"):
        student.load(tmp_path / "checkpoint")
    assert all((array == before[name]).all() for name, array in weights_of(student).items())


@pytest.mark.parametrize("file", [WEIGHTS_FILE, OPTIMIZER_FILE])
def test_torn_and_missing_files_are_corrupt(student_dir: Path, teacher: Teacher, tmp_path: Path, file: str) -> None:
    student = learner(student_dir, stage(POLICY_GRADIENT))
    train(student, teacher.score(rollouts()))
    student.save(tmp_path)
    path = tmp_path / file
    assert load_file(path), "it has contents to lose"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CorruptError, match=file):
        student.load(tmp_path)
    path.unlink()
    with pytest.raises(CorruptError, match="missing"):
        student.load(tmp_path)
    with pytest.raises(NotFoundError):
        student.load(tmp_path / "nowhere")
