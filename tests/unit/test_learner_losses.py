"""Every family of losses through the learner: packing, padding, micro-batches, order of teachers change nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stillhouse.core.spec import StageSpec
from stillhouse.trainer.batch import TeacherHead, TrainSample
from stillhouse.trainer.packing import plan_micro_batches
from tests.tiny import make_tiny_model
from tests.unit.learner_cases import Teacher, engine_of, learner, rollouts

REWARD = {"weight": 0.6}
LOSSES: list[dict[str, Any]] = [
    {"objective": "cross_entropy"},
    {"objective": "full_vocabulary", "divergence": "jsd", "beta": 0.3, "hidden_dtype": "float32"},
    {"objective": "full_vocabulary", "divergence": "k2", "hidden_dtype": "float32"},
    {"objective": "top_k", "k": 3},
    {"objective": "top_k", "k": 3, "support": "student", "divergence": "forward_kl"},
    {"objective": "top_k", "k": 3, "support": "union", "correction": "generalised"},
    {"objective": "policy_gradient", "baseline": "full_vocabulary", "hidden_dtype": "float32", "reward": REWARD},
    {"objective": "policy_gradient", "baseline": "top_k", "k": 3, "ratio_gate": "tis", "advantage_clip": 1},
    {"objective": "policy_gradient", "discount": 0.9, "ratio_gate": "seq_mask", "gate_low": 0.01, "gate_high": 50},
    {"objective": "policy_gradient", "teacher_weight": 0, "reward": REWARD},
]


def name(loss: dict[str, Any]) -> str:
    return "-".join(str(value) for value in loss.values())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "student": make_tiny_model(root / "student", seed=1),
        "one": make_tiny_model(root / "one", seed=3, hidden_size=16, tie=False, vocab_pad=20),
        "other": make_tiny_model(root / "other", seed=4),
    }


def with_lists(sample: TrainSample, teacher: Teacher, loss: dict[str, Any], seed: int) -> TrainSample:
    """What sampler, teacher and verifier add to a sample for this loss."""
    ids = sample.prompt_ids.tolist() + sample.completion_ids.tolist()
    log_q = teacher.log_probs(ids, 1.0)[len(sample.prompt_ids) - 1 : -1].float()
    draw = np.random.default_rng(seed)
    fields: dict[str, Any] = {"outcome": draw.normal(), "rollout_logprobs": sample.rollout_logprobs - 3}
    support = loss.get("support", "teacher" if loss.get("k") else "")
    if support in ("teacher", "union"):
        likeliest = log_q.topk(loss["k"])
        fields |= {"topk_ids": likeliest.indices.int().numpy(), "topk_logprobs": likeliest.values.numpy()}
    if support in ("student", "union"):
        targets = torch.from_numpy(draw.random(log_q.shape)).topk(loss["k"]).indices
        fields |= {"target_ids": targets.int().numpy(), "target_logprobs": log_q.gather(1, targets).numpy()}
    return dataclasses.replace(sample, **fields)


def stage(loss: dict[str, Any], packing: str) -> StageSpec:
    return StageSpec.model_validate(
        {
            "data": {"rows": [{"prompt": "hi"}]},
            "on_policy_fraction": 0 if loss["objective"] == "cross_entropy" else 1,
            "loss": loss,
            "optimizer": {"max_grad_norm": 1e6},
            "schedule": {"steps": 1, "group_size": 2 if "reward" in loss else 1, "packing": packing},
        }
    )


def step(
    spec: StageSpec, model: Path, samples: list[TrainSample], heads: dict[str, TeacherHead], budget: int
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """(metrics, gradients) of one step of a fresh student."""
    student = learner(model, spec, teachers=tuple(heads))
    engine, seen = engine_of(student), {}

    def keep(*_: Any) -> None:
        seen.update({key: p.grad.clone() for key, p in engine.model.named_parameters() if p.grad is not None})

    hook = engine.parameters.optimizer.register_step_pre_hook(keep)
    metrics = student.step(samples, heads, plan_micro_batches(samples, budget))
    hook.remove()
    return metrics, seen


def same_gradients(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for key, grad in one.items():
        torch.testing.assert_close(grad, other[key], rtol=1e-3, atol=1e-5 * max(1.0, float(other[key].abs().max())))


@pytest.mark.parametrize("loss", LOSSES, ids=name)
def test_micro_batches_padding_and_the_order_of_teachers_change_nothing(
    models: dict[str, Path], loss: dict[str, Any]
) -> None:
    one, other = Teacher(models["one"], "one"), Teacher(models["other"], "other")
    scored = [(teacher, sample) for teacher in (one, other) for sample in teacher.score(rollouts(count=4))]
    samples = [
        dataclasses.replace(with_lists(sample, teacher, loss, index), sample_id=f"{index}/0")
        for index, (teacher, sample) in enumerate(scored)
    ]
    heads = {"one": one.head, "other": other.head}
    padded, packed = stage(loss, "off"), stage(loss, "on")
    metrics, whole = step(padded, models["student"], samples, heads, 10_000)
    assert sum(float(grad.abs().sum()) for grad in whole.values()) > 1e-3

    alone, split = step(padded, models["student"], samples, heads, 1)
    same_gradients(split, whole)
    for key in metrics.keys() - {"tokens/padding_fraction"}:
        assert alone[key] == pytest.approx(metrics[key], rel=1e-4, abs=1e-6), key

    # names decide the order of teachers: now the other one comes first; samples arrive in another order, too
    renamed = {"one": "z", "other": "a"}
    shuffled = [dataclasses.replace(samples[i], teacher=renamed[samples[i].teacher]) for i in (5, 0, 7, 2, 1, 6, 3, 4)]
    heads = {renamed[key]: head for key, head in heads.items()}
    _, reordered = step(packed, models["student"], shuffled, heads, 40)
    same_gradients(reordered, whole)
