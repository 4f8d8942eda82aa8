"""The laws of a mixture, in the learner: the loss of a sample is the sum of w_i loss_i over its teachers."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from stillhouse.core.errors import PreflightError
from stillhouse.core.explain import explain
from stillhouse.core.spec import Row, SelectSpec, TeacherSpec, TokensSpec
from stillhouse.trainer.batch import TrainSample
from stillhouse.trainer.losses import packed_loss
from stillhouse.trainer.masks import mask_tokens, token_metrics
from stillhouse.trainer.measures import Kl, measures
from stillhouse.trainer.objectives.base import Head, Signals
from stillhouse.trainer.objectives.full_vocabulary import ForwardKL, ReverseKL
from stillhouse.trainer.packing import loss_weights
from stillhouse.trainer.prompts import Reading, check_lengths, prepare
from tests.chaos.sim.toys import ToyRenderer
from tests.tiny import make_tiny_model
from tests.unit.learner_cases import (
    FORWARD,
    FULL,
    POLICY_GRADIENT,
    Teacher,
    captured_gradients,
    learner,
    rollouts,
    stage,
)
from tests.unit.test_packing import sample

LOSSES = [FULL, FORWARD, {**POLICY_GRADIENT, "advantage_clip": 1.0}, {**FULL, "reduction": "seq_mean_token_mean"}]
NAMES = ["reverse_kl", "forward_kl", "policy_gradient", "seq_mean"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "student": make_tiny_model(root / "student", seed=1),
        "t": make_tiny_model(root / "t", seed=3, hidden_size=16, tie=False),
        "u": make_tiny_model(root / "u", seed=4),
    }


def mixed(weights: dict[Teacher, float], count: int = 5) -> list[TrainSample]:
    """Every rollout as each teacher scored it."""
    return [each for teacher, weight in weights.items() for each in teacher.score(rollouts(count=count), weight=weight)]


def gradients(student: Path, loss: Any, samples: list[TrainSample], *teachers: Teacher, max_tokens: int = 64):
    spec = stage(loss, max_grad_norm=1e6)
    names = tuple(teacher.name for teacher in teachers)
    return captured_gradients(learner(student, spec, teachers=names), samples, *teachers, max_tokens=max_tokens)


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("per_teacher", [False, True])
@pytest.mark.parametrize("loss", LOSSES, ids=NAMES)
def test_a_teacher_twice_is_that_teacher(folders: dict[str, Path], loss: dict[str, Any], per_teacher: bool) -> None:
    loss = {**loss, "per_teacher": per_teacher}
    first, again = Teacher(folders["t"]), Teacher(folders["t"], name="again")
    alone, expected = gradients(folders["student"], loss, mixed({first: 1.0}), first)
    both, found = gradients(folders["student"], loss, mixed({first: 0.3, again: 0.7}), first, again)
    assert_equal(found, expected)
    assert any(grad.abs().max() > 1e-4 for grad in expected.values())
    for name in alone.keys() - {"heads/loaded"}:
        assert both[name] == pytest.approx(alone[name], rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("loss", LOSSES, ids=NAMES)
def test_the_gradient_is_the_weighted_sum(folders: dict[str, Path], loss: dict[str, Any]) -> None:
    """Also where the weights do not add up to one."""
    t, u = Teacher(folders["t"]), Teacher(folders["u"], name="u")
    singles = {one: gradients(folders["student"], loss, mixed({one: 1.0}), one) for one in (t, u)}
    metrics, found = gradients(folders["student"], loss, mixed({t: 0.5, u: 2.0}), t, u)
    expected = {name: 0.5 * singles[t][1][name] + 2.0 * singles[u][1][name] for name in found}
    assert_equal(found, expected)
    for name in ("t", "u"):
        (single,) = (m["loss/reverse_kl/mean"] for one, (m, _) in singles.items() if one.name == name)
        assert metrics[f"loss/reverse_kl/{name}"] == pytest.approx(single, rel=1e-5)
    mean = (0.5 * metrics["loss/reverse_kl/t"] + 2.0 * metrics["loss/reverse_kl/u"]) / 2.5
    assert metrics["loss/reverse_kl/mean"] == pytest.approx(mean, rel=1e-5)
    assert metrics["tokens/trained"] == singles[t][0]["tokens/trained"], "a token counts once"


def test_a_student_that_equals_all_its_teachers_has_nothing_to_learn(folders: dict[str, Path]) -> None:
    both = [Teacher(folders["student"], name=name) for name in ("t", "u")]
    metrics, _ = gradients(folders["student"], FULL, mixed(dict.fromkeys(both, 0.5)), *both)
    assert abs(metrics["loss/reverse_kl/mean"]) < 1e-5
    assert metrics["grad/norm"] < 1e-3


@pytest.mark.parametrize("loss", LOSSES[:3], ids=NAMES[:3])
def test_order_of_arrival_and_split_change_nothing(folders: dict[str, Path], loss: dict[str, Any]) -> None:
    """With samples of one teacher beside those of a mixture."""
    t, u = Teacher(folders["t"]), Teacher(folders["u"], name="u")
    samples = mixed({t: 0.7, u: 0.3})[:8]  # the last two rollouts are the first teacher's alone
    whole, expected = gradients(folders["student"], loss, samples, t, u, max_tokens=10_000)
    random.Random(0).shuffle(samples)
    single, found = gradients(folders["student"], loss, samples, t, u, max_tokens=1)
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-5)
    for name in whole:
        assert single[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-6), name


# -- weights, masks, metrics -----------------------------------------------------------------------------------------


def test_weights_of_a_mixture_beside_samples_of_one_teacher() -> None:
    """By hand: three samples of 2, 3 and 5 tokens, the first judged by two teachers."""
    samples = [
        replace(sample(0, 1, 2, teacher="a"), weight=0.6),
        replace(sample(0, 1, 2, teacher="b"), weight=0.4),
        sample(1, 1, 3, teacher="a"),
        sample(2, 1, 5, teacher="b"),
    ]
    ones = [1.0] * 4
    assert loss_weights(samples, ones, "token_mean") == pytest.approx([0.6 / 10, 0.4 / 10, 1 / 10, 1 / 10])
    by_sequence = loss_weights(samples, ones, "seq_mean_token_mean")
    assert by_sequence == pytest.approx([0.6 / 6, 0.4 / 6, 1 / 9, 1 / 15])
    per_teacher = loss_weights(samples, ones, "token_mean", True)
    assert per_teacher == pytest.approx([0.6 / 6, 0.4 / 6, 1 / 9, 1 / 15]), "a mixture is balanced as one"
    metrics = token_metrics(samples, ("a", "b"))
    assert metrics["tokens/share/a"] == pytest.approx((0.6 * 2 + 3) / 10)
    assert metrics["tokens/share/b"] == pytest.approx((0.4 * 2 + 5) / 10)
    assert metrics["tokens/selected_fraction"] == 1


def test_one_mask_for_all_teachers_by_the_mean_of_what_they_say() -> None:
    gaps = {"a": [0.0, 1.0, 0.0, 2.0], "b": [3.0, 0.0, 0.0, 0.0]}
    log_p = np.full(4, -5.0, dtype=np.float32)
    samples = [
        replace(
            sample(0, 1, 4, teacher=name),
            weight=weight,
            rollout_logprobs=log_p,
            teacher_logprobs=log_p + np.asarray(gaps[name], dtype=np.float32),
        )
        for name, weight in (("a", 3.0), ("b", 1.0))
    ]
    tokens = TokensSpec(select=SelectSpec(by="kl", fraction=0.5))
    means = [(3 * (np.expm1(a) - a) + (np.expm1(b) - b)) / 4 for a, b in zip(gaps["a"], gaps["b"], strict=True)]
    expected = [int(value in sorted(means)[-2:]) for value in means]
    assert sum(expected) == 2
    for masked in mask_tokens(samples, tokens, 0):
        assert masked.loss_mask.tolist() == expected


# -- which pool a mixture fits ---------------------------------------------------------------------------------------

V = 12
POOL_WEIGHTS = torch.tensor([0.5, 0.5], dtype=torch.float64)


def weighted_sum(objective: Any, logits_V: torch.Tensor, log_q_TV: torch.Tensor) -> torch.Tensor:
    """sum of w_i loss_i by the kernel: the heads are identities, so hidden states are logits."""
    identity = Head(torch.eye(V, dtype=torch.float64))
    total = torch.zeros((), dtype=torch.float64)
    for weight, log_q_V in zip(POOL_WEIGHTS, log_q_TV, strict=True):
        signals = Signals(hidden=log_q_V[None], head=identity)
        ids, weights = torch.zeros(1, dtype=torch.int64), weight[None]
        total = total + packed_loss(objective, logits_V[None], identity, ids, weights, signals, 1.0).loss
    return total


def test_a_mixture_of_reverse_kls_fits_the_geometric_pool_and_of_forward_kls_the_arithmetic() -> None:
    draw = torch.Generator().manual_seed(0)
    log_q_TV = torch.randn(2, V, generator=draw, dtype=torch.float64).mul(1.5).log_softmax(-1)
    geometric = (POOL_WEIGHTS @ log_q_TV).log_softmax(-1)
    arithmetic = (POOL_WEIGHTS @ log_q_TV.exp()).log()
    values: dict[str, dict[str, float]] = {}
    for name, objective, minimum in (("reverse", ReverseKL(), geometric), ("forward", ForwardKL(), arithmetic)):
        for pool, logits in (("geometric", geometric), ("arithmetic", arithmetic)):
            at = logits.clone().requires_grad_()
            loss = weighted_sum(objective, at, log_q_TV)
            (grad,) = torch.autograd.grad(loss, at)
            values.setdefault(name, {})[pool] = loss.item()
            assert (grad.abs().max() < 1e-6) == (logits is minimum), (name, pool)
    print({name: {pool: round(value, 4) for pool, value in found.items()} for name, found in values.items()})
    assert values["reverse"]["geometric"] < values["reverse"]["arithmetic"]
    assert values["forward"]["arithmetic"] < values["forward"]["geometric"]
    normaliser = (POOL_WEIGHTS @ log_q_TV).exp().sum().log().item()
    assert values["reverse"]["geometric"] == pytest.approx(-normaliser, abs=1e-9)


# -- rows and prompts ------------------------------------------------------------------------------------------------


def test_a_row_names_one_teacher_or_several_the_heaviest_first() -> None:
    assert Row(prompt="x", teacher={"a": 1, "c": 2, "b": 2}).mixture("abc") == {"b": 2, "c": 2, "a": 1}
    assert list(Row(prompt="x", teacher={"a": 1, "c": 2, "b": 2}).mixture("abc")) == ["b", "c", "a"]
    assert Row(prompt="x", teacher="a").mixture("abc") == {"a": 1}
    assert Row(prompt="x").mixture(["a"]) == {"a": 1}
    assert Row(prompt="x").mixture("ab") == Row(prompt="x").mixture(()) == {}
    row = Row(prompt="x", teacher={"a": 1, "b": 2})
    assert Row.model_validate(row.model_dump(mode="json")) == row
    assert Row.model_validate_json(row.model_dump_json()) == row


@pytest.mark.parametrize(
    ("teacher", "words"),
    [({"a": 1}, "at least 2"), ({"a": 1, "b": 0}, "greater than 0"), ({"a": 1, "b c": 1}, "pattern"), (3, "string")],
)
def test_what_is_no_mixture_is_refused(teacher: Any, words: str) -> None:
    with pytest.raises(ValidationError, match=words) as caught:
        Row(prompt="x", teacher=teacher)
    errors = [{**error, "loc": ("body", *error["loc"])} for error in caught.value.errors()]
    (finding,) = explain(errors, {"teacher": teacher}, Row)
    assert finding.param is not None
    assert finding.param.startswith("teacher")
    assert "[" not in finding.param
    assert "name" not in finding.param.split(".")


def test_every_teacher_of_a_mixture_reads_its_own_prompt() -> None:
    teachers = {
        "plain": TeacherSpec(model="m"),
        "told": TeacherSpec(model="m", system_prompt="Be brief."),
    }
    row = Row(prompt="hello", teacher={"plain": 1.0, "told": 3.0}, weight=2.0)
    renderer: Any = ToyRenderer(Path())
    (prompt,) = prepare([row], teachers, renderer)
    assert prompt.teacher == "told"
    assert prompt.teacher_prompt_ids == renderer.ids([{"content": "Be brief."}, {"content": "hello"}], {})
    assert prompt.further == (Reading("plain", None),)
    assert (prompt.weight_of("told"), prompt.weight_of("plain")) == (6.0, 2.0)
    assert (prompt.share_of("told"), prompt.share_of("plain")) == (0.75, 0.25)
    with pytest.raises(PreflightError, match="that plain can read"):
        check_lengths([prompt], 4, {"student": 99, "told": 99, "plain": 8})
    with pytest.raises(PreflightError, match="'b' is not one of"):
        prepare([Row(prompt="x", teacher={"plain": 1, "b": 1})], teachers, renderer)
    (alone,) = prepare([Row(prompt="hello", teacher="plain", weight=2.0)], teachers, renderer)
    assert (alone.weight_of("plain"), alone.share_of("plain")) == (2.0, 1.0)


def test_a_held_out_prompt_counts_once_and_for_each_of_its_teachers() -> None:
    """By hand: the first of two completions, of 4 tokens, is judged by two teachers."""
    kls = [Kl("a", 8.0, 4, 0.75), Kl("b", 2.0, 4, 0.25), Kl("a", 1.0, 6)]
    found = measures(kls, [(["a", "b"], 1.0), (["a"], 0.0)])
    assert (found["num_prompts"], found["num_tokens"], found["num_judged"]) == (2, 10, 2)
    assert found["reverse_kl"] == pytest.approx((0.75 * 8 + 0.25 * 2 + 1) / 10)
    assert found["accuracy"] == 0.5
    by_teacher = found["by_teacher"]
    assert (by_teacher["a"]["reverse_kl"], by_teacher["b"]["reverse_kl"]) == (9 / 10, 2 / 4)
    assert (by_teacher["a"]["accuracy"], by_teacher["b"]["accuracy"]) == (0.5, 1.0)
