"""The moving average of the weights: what it is, that training does not see it, and when it is what people get."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from stillhouse.core.errors import CorruptError
from stillhouse.trainer.learner import Learner
from tests.tiny import make_tiny_model
from tests.unit.learner_cases import FULL, Teacher, engine_of, learner, rollouts, stage, train, weights_of

DECAY = 0.75
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


def averaging(models: dict[str, Path], total_steps: int = 4, decay: float | None = DECAY, **student: Any) -> Learner:
    return learner(models["student"], stage(FULL, lr=1e-2, ema_decay=decay), total_steps=total_steps, **student)


def masters_of(student: Learner) -> dict[str, torch.Tensor]:
    return {name: m.detach().clone() for name, m in engine_of(student).parameters._masters.items()}


@pytest.mark.parametrize("kind", KINDS, ids=KIND_NAMES)
def test_it_is_the_definition_and_training_does_not_see_it(models: dict[str, Path], teacher: Teacher, kind) -> None:
    samples = teacher.score(rollouts())
    student, plain = averaging(models, **kind), averaging(models, decay=None, **kind)
    expected = {name: value.double() for name, value in masters_of(student).items()}
    for _ in range(4):
        for one in (student, plain):
            train(one, samples, teacher)
        for name, value in masters_of(student).items():
            assert torch.equal(value, masters_of(plain)[name]), name
            expected[name] = DECAY * expected[name] + (1 - DECAY) * value.double()
    parameters = engine_of(student).parameters
    for name, value in parameters._averages["average"].items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS, ids=KIND_NAMES)
def test_after_the_last_step_people_get_the_average(
    models: dict[str, Path], teacher: Teacher, tmp_path: Path, kind
) -> None:
    samples, heads = teacher.score(rollouts()), {"t": teacher.head}
    student, plain = averaging(models, **kind), averaging(models, decay=None, **kind)
    for step in range(4):
        assert all((array == weights_of(plain)[name]).all() for name, array in weights_of(student).items()), step
        assert student.evaluate(samples, heads) == plain.evaluate(samples, heads)
        for one in (student, plain):
            train(one, samples, teacher)
    published = weights_of(student)
    assert any((array != weights_of(plain)[name]).any() for name, array in published.items())
    assert student.evaluate(samples, heads) != plain.evaluate(samples, heads)
    student.export(models["student"], tmp_path / "export", {})
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export", local_files_only=True)
    for name, param in exported.named_parameters():
        ours = torch.from_numpy(published[name].view(np.int16)).view(torch.bfloat16) if kind.get("dtype") else None
        assert torch.equal(param.detach(), torch.from_numpy(published[name]) if ours is None else ours), name
    student.save(tmp_path / "ckpt")
    plain.save(tmp_path / "plain")
    for name, array in load_file(tmp_path / "plain" / "model.safetensors").items():
        np.testing.assert_array_equal(load_file(tmp_path / "ckpt" / "model.safetensors")[name], array, err_msg=name)
    assert not (tmp_path / "plain" / "average.safetensors").exists()
    assert all((array == published[name]).all() for name, array in weights_of(student).items()), "saving shows nothing"


@pytest.mark.parametrize("kind", KINDS, ids=KIND_NAMES)
def test_it_goes_on_bit_for_bit_from_a_checkpoint(
    models: dict[str, Path], teacher: Teacher, tmp_path: Path, kind
) -> None:
    samples = teacher.score(rollouts())
    whole = averaging(models, **kind)
    for _ in range(2):
        train(whole, samples, teacher)
    whole.save(tmp_path / "two")
    for _ in range(2):
        train(whole, samples, teacher)
    whole.state_arrays()  # it shows the average when it is saved
    whole.save(tmp_path / "four")
    for folder, steps in (("two", 2), ("four", 0)):
        restored = averaging(models, **kind)
        restored.load(tmp_path / folder)
        for _ in range(steps):
            train(restored, samples, teacher)
        restored.save(tmp_path / f"again-{folder}")
        for file in ("model", "average", "optimizer"):
            name = f"{file}.safetensors"
            assert (tmp_path / f"again-{folder}" / name).read_bytes() == (tmp_path / "four" / name).read_bytes(), file
        assert all((array == weights_of(whole)[name]).all() for name, array in weights_of(restored).items())


def test_a_checkpoint_without_it_is_refused(models: dict[str, Path], teacher: Teacher, tmp_path: Path) -> None:
    plain = averaging(models, decay=None)
    train(plain, teacher.score(rollouts()), teacher)
    plain.save(tmp_path / "ckpt")
    student = averaging(models)
    with pytest.raises(CorruptError, match=r"average\.safetensors is missing"):
        student.load(tmp_path / "ckpt")


@pytest.mark.parametrize("kind", KINDS, ids=KIND_NAMES)
def test_weights_that_are_held_are_measured_later_and_training_does_not_see_it(
    models: dict[str, Path], teacher: Teacher, kind
) -> None:
    samples, heads = teacher.score(rollouts()), {"t": teacher.head}
    student, plain = averaging(models, **kind), averaging(models, **kind)
    for one in (student, plain):
        train(one, samples, teacher)
    before = student.evaluate(samples, heads)
    student.hold(True)
    for _ in range(2):
        for one in (student, plain):
            train(one, samples, teacher)
        assert student.evaluate(samples, heads) == before, "bit for bit"
    assert plain.evaluate(samples, heads) != before
    student.hold(False)
    for one in (student, plain):
        train(one, samples, teacher)
    assert student.evaluate(samples, heads) == plain.evaluate(samples, heads)
    for name, array in weights_of(student).items():
        assert (array == weights_of(plain)[name]).all(), name
