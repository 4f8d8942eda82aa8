"""Steps without a finite loss or gradient: they change nothing and name their samples. A finite one cannot do harm."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stillhouse.core.errors import NonFiniteError
from stillhouse.core.spec import OptimizerSpec
from stillhouse.trainer.batch import TrainSample
from stillhouse.trainer.learner import MAX_NAMED, Learner
from stillhouse.trainer.parameters import Parameters
from tests.tiny import make_tiny_model
from tests.unit.learner_cases import POLICY_GRADIENT, Teacher, engine_of, learner, rollouts, stage, train, weights_of

POISON = 250
"""A token id that only bad samples hold."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "student", seed=1)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[TrainSample]:
    teacher = Teacher(make_tiny_model(tmp_path_factory.mktemp("models") / "teacher", seed=2))
    clean = [([min(t, POISON - 1) for t in p], [min(t, POISON - 1) for t in c]) for p, c in rollouts(count=12)]
    return teacher.score(clean)


def poisoned(samples: list[TrainSample], bad: set[int]) -> list[TrainSample]:
    """The samples, of which `bad` begin with the token whose gradient is not finite."""
    return [
        dataclasses.replace(s, prompt_ids=np.asarray([POISON, *s.prompt_ids], dtype=np.int32)) if i in bad else s
        for i, s in enumerate(samples)
    ]


def breakable(model: Path, packing: str = "auto", value: float = float("inf")) -> Learner:
    """A learner whose gradient at the token POISON is `value`."""
    made = learner(model, stage(POLICY_GRADIENT, packing=packing))
    embedding = engine_of(made).model.get_input_embeddings()

    def spoil(_module: Any, inputs: Any, output: Tensor) -> None:
        if output.requires_grad:
            where = (inputs[0] == POISON)[..., None]
            output.register_hook(lambda grad: torch.where(where, torch.full_like(grad, value), grad))

    embedding.register_forward_hook(spoil)
    return made


def state_of(student: Learner) -> dict[str, Tensor]:
    """Masters and moments."""
    parameters = engine_of(student).parameters
    slots = {
        f"{name}/{slot}": value.clone()
        for name, master in parameters._masters.items()
        for slot, value in parameters.optimizer.state.get(master, {}).items()
    }
    return slots | {name: master.detach().clone() for name, master in parameters._masters.items()}


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("packing", ["on", "off"])
@pytest.mark.parametrize("bad", [{4}, {0, 11}, set(range(10))], ids=["one", "two", "ten"])
def test_a_gradient_that_is_not_finite_names_its_samples(
    model: Path, samples: list[TrainSample], bad: set[int], packing: str, value: float
) -> None:
    student = breakable(model, packing, value)
    train(student, samples)
    before = state_of(student)
    with pytest.raises(NonFiniteError, match=r"the gradient norm is (inf|nan); not finite in .* tensors") as caught:
        train(student, poisoned(samples, bad))
    expected = {f"{index}/0" for index in bad}
    named = caught.value.sample_ids
    assert len(named) == min(len(bad), MAX_NAMED)
    assert set(named) <= expected
    assert all(sample_id in caught.value.message for sample_id in named)
    assert student.policy_version == 1
    assert all(torch.equal(value, before[name]) for name, value in state_of(student).items())
    train(student, samples)  # no gradient of the failed step is left
    clean = breakable(model, packing)
    for _ in range(2):
        train(clean, samples)
    assert all((array == weights_of(student)[name]).all() for name, array in weights_of(clean).items())


def test_gradients_that_overflow_only_together_say_so(model: Path, samples: list[TrainSample]) -> None:
    # 32 squares of it are 2e38; two samples share the row, and 32 squares of their sum are more than a float32 holds
    student = breakable(model, value=2.5e18)
    with pytest.raises(NonFiniteError, match="its sum of squares overflows; no sample's alone is") as caught:
        train(student, poisoned(samples, {1, 2}))
    assert caught.value.sample_ids == ()


def test_losses_that_are_not_finite_name_their_samples(model: Path, samples: list[TrainSample]) -> None:
    student = learner(model, stage({"objective": "policy_gradient"}))
    spoiled = [
        dataclasses.replace(s, teacher_logprobs=np.full_like(s.teacher_logprobs, np.inf)) if i in (2, 7) else s
        for i, s in enumerate(samples)
    ]
    with pytest.raises(NonFiniteError, match=r"not finite in 2 samples: (2/0, 7/0|7/0, 2/0)") as caught:
        train(student, spoiled)
    assert set(caught.value.sample_ids) == {"2/0", "7/0"}


@pytest.mark.parametrize("betas", [(0.0, 0.0), (0.9, 0.95), (0.999, 0.0), (0.0, 0.999), (0.999999, 0.5)])
def test_finite_gradients_never_make_weights_that_are_not(model: Path, betas: tuple[float, float]) -> None:
    """The worst that a job's format allows: after the clip every update is bounded, so weights stay numbers."""
    spec = OptimizerSpec(lr=1.0, betas=betas, eps=1e-20, weight_decay=1.0, max_grad_norm=1e6, warmup_steps=0)
    parameters = Parameters(engine_of(learner(model, stage(POLICY_GRADIENT))).model, spec)
    for scale in (1e17, 0.0, 1e-30, 1e17, -1e17, 0.0, 0.0):
        for master in parameters._masters.values():
            master.grad = torch.full_like(master, scale)
        update = parameters.update(1.0)
        assert np.isfinite(update.norm)
        assert update.bad_weights == []
