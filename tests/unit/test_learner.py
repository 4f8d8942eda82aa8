"""The learner against a naive model with full logits, and the laws of an optimizer step."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stillhouse.core.errors import NonFiniteError, WeightsError, WireError
from stillhouse.core.models import inspect_model
from stillhouse.core.spec import OptimizerSpec
from stillhouse.trainer.batch import MIN_LOG_Q, TeacherHead, TrainSample
from stillhouse.trainer.learner import learning_rate
from stillhouse.v1 import rollout_pb2
from tests.tiny import TOKENIZER_SIZE, make_tiny_model
from tests.unit.learner_cases import (
    FORWARD,
    FULL,
    POLICY_GRADIENT,
    Teacher,
    captured_gradients,
    engine_of,
    learner,
    rollouts,
    stage,
    train,
    weights_of,
)

LOSSES = [FULL, FORWARD, POLICY_GRADIENT]
NAMES = ["reverse_kl", "forward_kl", "policy_gradient"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "student": make_tiny_model(root / "student", seed=1),
        "untied": make_tiny_model(root / "untied", seed=2, tie=False, vocab_pad=7),
        "teacher": make_tiny_model(root / "teacher", seed=3, hidden_size=16, tie=False, vocab_pad=20),
        "other": make_tiny_model(root / "other", seed=4),
    }


@pytest.fixture(scope="module")
def teacher(models: dict[str, Path]) -> Teacher:
    return Teacher(models["teacher"])


def naive_gradients(model_dir: Path, samples: list[TrainSample], teacher: Teacher, loss: dict, temperature: float):
    """Gradients of the mean loss per token: sequences one by one, all logits, autograd, no clipping."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, local_files_only=True)
    total, count = torch.zeros(()), 0
    for sample in samples:
        ids = sample.prompt_ids.tolist() + sample.completion_ids.tolist()
        logits = model(input_ids=torch.tensor([ids])).logits[0, :, :TOKENIZER_SIZE] / temperature
        for t, token in enumerate(sample.completion_ids.tolist()):
            if not sample.loss_mask[t]:
                continue
            position = len(sample.prompt_ids) + t - 1
            p = logits[position].softmax(-1)
            q = teacher.log_probs(ids, temperature)[position].exp().float()
            if loss == FULL:
                total = total + sample.weight * (p * (p / q).log()).sum()
            elif loss == FORWARD:
                total = total + sample.weight * (q * (q / p).log()).sum()
            else:
                total = total - sample.weight * (q[token] / p[token]).log().detach() * p[token].log()
            count += 1
    (total / count).backward()
    return (total / count).item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["student", "untied"])
@pytest.mark.parametrize("loss", LOSSES, ids=NAMES)
def test_gradients_match_a_naive_model(models: dict[str, Path], teacher: Teacher, name: str, loss: dict) -> None:
    samples = teacher.score(rollouts(), 0.8)
    masked = samples[2].loss_mask.copy()
    masked[::2] = 0
    samples[2] = dataclasses.replace(samples[2], loss_mask=masked, weight=2.5)
    expected_loss, expected = naive_gradients(models[name], samples, teacher, loss, 0.8)

    student = learner(models[name], stage(loss, temperature=0.8, max_grad_norm=1e6))
    metrics, grads = captured_gradients(student, samples, teacher)

    assert metrics["loss/total"] == pytest.approx(expected_loss, rel=1e-4)
    assert grads.keys() == expected.keys()
    for key, grad in grads.items():
        scale = expected[key].abs().max().item()
        torch.testing.assert_close(
            grad, expected[key], rtol=1e-3, atol=1e-4 * scale, msg=lambda m, key=key: f"{key}: {m}"
        )
    norm = torch.linalg.vector_norm(torch.cat([grad.flatten() for grad in expected.values()])).item()
    assert metrics["grad/norm"] == pytest.approx(norm, rel=1e-3)


@pytest.mark.parametrize("reduction", ["token_mean", "seq_mean_token_mean"])
@pytest.mark.parametrize("loss", LOSSES, ids=NAMES)
def test_split_into_micro_batches_and_padding_change_nothing(
    models: dict[str, Path], teacher: Teacher, loss: dict, reduction: str
) -> None:
    samples = teacher.score(rollouts(count=7))
    spec = stage({**loss, "reduction": reduction}, max_grad_norm=1e6)
    whole, expected = captured_gradients(learner(models["student"], spec), samples, teacher, max_tokens=10_000)
    single, grads = captured_gradients(learner(models["student"], spec), samples, teacher, max_tokens=1)
    for key, grad in grads.items():
        torch.testing.assert_close(grad, expected[key], rtol=1e-3, atol=1e-5)
    for key in whole:
        assert single[key] == pytest.approx(whole[key], rel=1e-4, abs=1e-6), key


def test_student_logprobs_do_not_see_padding_or_neighbours(models: dict[str, Path], teacher: Teacher) -> None:
    """The mismatch with honest rollout log-probabilities is rounding, however the batch is packed."""
    spec = stage(POLICY_GRADIENT, temperature=0.6)
    own = Teacher(models["student"])
    samples = [
        dataclasses.replace(scored, rollout_logprobs=mine.teacher_logprobs)
        for scored, mine in zip(teacher.score(rollouts(), 0.6), own.score(rollouts(), 0.6), strict=True)
    ]
    metrics = train(learner(models["student"], spec), samples, max_tokens=10_000)
    assert metrics["mismatch/logprob_abs_max"] < 1e-4
    assert metrics["mismatch/logprob_abs_mean"] <= metrics["mismatch/logprob_abs_max"]


@pytest.mark.parametrize("loss", LOSSES, ids=NAMES)
def test_a_student_that_equals_its_teacher_has_nothing_to_learn(models: dict[str, Path], loss: dict) -> None:
    teacher = Teacher(models["student"])
    metrics = train(learner(models["student"], stage(loss)), teacher.score(rollouts()), teacher)
    assert abs(metrics["loss/reverse_kl/mean"]) < 1e-5
    assert metrics["grad/norm"] < 1e-3


@pytest.mark.parametrize("loss", [FULL, FORWARD], ids=NAMES[:2])
def test_training_brings_the_student_to_the_teacher(models: dict[str, Path], teacher: Teacher, loss: dict) -> None:
    samples = teacher.score(rollouts())
    student = learner(models["student"], stage(loss, lr=2e-2))
    heads = {"t": teacher.head}
    before = sum(row["reverse_kl_sum"] for row in student.evaluate(samples, heads))
    for _ in range(50):
        train(student, samples, teacher)
    after = sum(row["reverse_kl_sum"] for row in student.evaluate(samples, heads))
    assert student.policy_version == 50
    assert 0 < after < 0.2 * before


def test_evaluation_is_the_definition_per_sample(models: dict[str, Path], teacher: Teacher) -> None:
    own = Teacher(models["student"])
    samples = teacher.score(rollouts())
    student = learner(models["student"], stage(POLICY_GRADIENT, temperature=0.5))
    state = weights_of(student)
    for row, sample in zip(student.evaluate(samples, {"t": teacher.head}), samples, strict=True):
        ids = sample.prompt_ids.tolist() + sample.completion_ids.tolist()
        rows = slice(len(sample.prompt_ids) - 1, len(ids) - 1)
        log_p, log_q = own.log_probs(ids, 0.5)[rows], teacher.log_probs(ids, 0.5)[rows]
        assert row["reverse_kl_sum"] == pytest.approx((log_p.exp() * (log_p - log_q)).sum().item(), rel=1e-4)
        assert (row["sample_id"], row["num_tokens"]) == (sample.sample_id, len(sample.completion_ids))
    assert all((weights_of(student)[name] == state[name]).all() for name in state)


def test_teachers_have_weights_and_metrics_of_their_own(models: dict[str, Path], teacher: Teacher) -> None:
    other = Teacher(models["other"], "u")
    samples = teacher.score(rollouts(0)) + other.score(rollouts(1), first=5)
    spec = stage(FULL, max_grad_norm=1e6)
    student = learner(models["student"], spec, teachers=("t", "u"), weights={"u": 3.0})
    metrics, grads = captured_gradients(student, samples, teacher, other)

    weighted = samples[:5] + [dataclasses.replace(sample, weight=3.0) for sample in samples[5:]]
    _, expected = captured_gradients(learner(models["student"], spec, teachers=("t", "u")), weighted, teacher, other)
    for key, grad in grads.items():
        torch.testing.assert_close(grad, expected[key])
    tokens = [sum(sample.num_loss_tokens for sample in part) for part in (samples[:5], samples[5:])]
    mean = np.average([metrics["loss/reverse_kl/t"], metrics["loss/reverse_kl/u"]], weights=tokens)
    assert metrics["loss/reverse_kl/mean"] == pytest.approx(mean, rel=1e-5)


def test_step_reports_staleness_lengths_and_truncation(models: dict[str, Path], teacher: Teacher) -> None:
    samples = teacher.score([([5, 6], [7, 8, 9, 10]), ([5], [6, 7])])
    student = learner(models["student"], stage(POLICY_GRADIENT))
    train(student, samples)
    train(student, samples)
    samples[0] = dataclasses.replace(
        samples[0], oldest_policy_version=1, finish_reason=rollout_pb2.FINISH_REASON_LENGTH
    )
    metrics = train(student, samples)
    assert (metrics["staleness/max"], metrics["staleness/mean"]) == (2, 1.5)
    assert metrics["completion/length_mean"] == 3
    assert metrics["completion/truncated_fraction"] == 0.5
    assert metrics["tokens/trained"] == 6
    assert metrics["lr"] == pytest.approx(1e-3)
    assert not any(key.startswith("loss/reverse_kl/t") for key in metrics), "one teacher needs no metric of its own"


def test_texts_of_others_count_in_no_measure_of_the_policy_that_sampled(
    models: dict[str, Path], teacher: Teacher
) -> None:
    own, other = teacher.score([([5, 6], [7, 8, 9, 10]), ([5], [6, 7])])
    unknown = np.full(2, np.nan, dtype=np.float32)
    other = dataclasses.replace(other, origin=rollout_pb2.ORIGIN_DATA, rollout_logprobs=unknown)
    student = learner(models["student"], stage(FULL))
    student.policy_version = 3
    alone = train(learner(models["student"], stage(FULL)), [own], teacher)
    both = train(student, [own, dataclasses.replace(other, oldest_policy_version=0)], teacher)
    assert both["mismatch/logprob_abs_mean"] == pytest.approx(alone["mismatch/logprob_abs_mean"], rel=1e-5)
    assert both["staleness/max"] == both["staleness/mean"] == 3
    assert (alone["tokens/on_policy_fraction"], both["tokens/on_policy_fraction"]) == (1, pytest.approx(4 / 6))
    none = train(student, [other], teacher)
    assert not any(name.startswith(("mismatch/", "staleness/")) for name in none), "a metric of nothing is left out"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_non_finite_score_is_named_and_leaves_the_weights_alone(
    models: dict[str, Path], teacher: Teacher, value: float
) -> None:
    samples = teacher.score(rollouts())
    student = learner(models["student"], stage(POLICY_GRADIENT))
    train(student, samples)
    before, version = weights_of(student), student.policy_version
    poisoned = samples[3].teacher_logprobs.copy()
    poisoned[0] = value
    with pytest.raises(NonFiniteError, match="token 0 of sample 3/0 \\(teacher 't'\\)"):
        train(student, [*samples[:3], dataclasses.replace(samples[3], teacher_logprobs=poisoned), samples[4]])
    assert student.policy_version == version
    assert all((array == before[name]).all() for name, array in weights_of(student).items())

    untouched = learner(models["student"], stage(POLICY_GRADIENT))
    for _ in range(2):
        train(untouched, samples)
    train(student, samples)  # no gradient and no moment of the failed step is left
    assert all((array == weights_of(student)[name]).all() for name, array in weights_of(untouched).items())


def test_a_token_that_the_teacher_forbids_is_bounded_and_counted(models: dict[str, Path], teacher: Teacher) -> None:
    samples = teacher.score(rollouts())
    refused = [samples[3].teacher_logprobs.copy() for _ in range(2)]
    refused[0][0], refused[1][0] = -np.inf, MIN_LOG_Q
    steps = []
    for logprobs in refused:
        student = learner(models["student"], stage(POLICY_GRADIENT))
        scored = [*samples[:3], dataclasses.replace(samples[3], teacher_logprobs=logprobs), samples[4]]
        steps.append((train(student, scored), weights_of(student)))
    (metrics, weights), (bounded, expected) = steps
    assert all((array == expected[name]).all() for name, array in weights.items())
    assert metrics["teacher/forbidden_fraction"] == pytest.approx(1 / metrics["tokens/trained"])
    assert "teacher/forbidden_fraction" not in bounded


def test_a_skipped_step_counts_and_changes_nothing(models: dict[str, Path], teacher: Teacher) -> None:
    """The schedule goes on, weights and moments stay."""
    samples = teacher.score(rollouts())
    student = learner(models["student"], stage(POLICY_GRADIENT))
    train(student, samples)
    before = weights_of(student)
    assert student.skip() == {"step/skipped": 1.0}
    assert student.policy_version == 2
    assert all((array == before[key]).all() for key, array in weights_of(student).items())
    assert train(student, samples)["step/skipped"] == 0.0


def test_an_update_that_ruins_the_weights_ends_the_training(
    models: dict[str, Path], teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = learner(models["student"], stage(POLICY_GRADIENT))
    name, param = next(iter(engine_of(student).model.named_parameters()))
    monkeypatch.setattr(engine_of(student).parameters.optimizer, "step", lambda: param.data.fill_(float("inf")))
    with pytest.raises(WeightsError, match=f"1 tensors non-finite, the first is {name}"):
        train(student, teacher.score(rollouts()))


def test_missing_signal_and_foreign_tokens_are_refused(models: dict[str, Path], teacher: Teacher) -> None:
    samples = teacher.score(rollouts(), hidden=None)
    student = learner(models["student"], stage(FULL))
    with pytest.raises(WireError, match="sample 0/0: no hidden states of teacher 't'"):
        train(student, samples, teacher)
    with pytest.raises(WireError, match="no output head of teacher 't'"):
        train(student, teacher.score(rollouts()))
    foreign = np.asarray([TOKENIZER_SIZE + 3], dtype=np.int32)
    samples = [dataclasses.replace(teacher.score([([4], [5])])[0], completion_ids=foreign)]
    with pytest.raises(WireError, match=f"token id {TOKENIZER_SIZE + 3} is outside the vocabulary of {TOKENIZER_SIZE}"):
        train(student, samples, teacher)


def test_a_bfloat16_head_teaches_as_its_float32_values(models: dict[str, Path], teacher: Teacher) -> None:
    rounded = torch.from_numpy(teacher.head.weight).bfloat16()
    bits = rounded.view(torch.int16).numpy().view(np.uint16)
    heads = [
        TeacherHead("aa", bits, "bfloat16", None, TOKENIZER_SIZE, 1.0, 0.0),
        TeacherHead("bb", rounded.float().numpy(), "float32", None, TOKENIZER_SIZE, 1.0, 0.0),
    ]
    student = learner(models["student"], stage(FULL))
    samples = teacher.score(rollouts())
    assert student.evaluate(samples, {"t": heads[0]}) == student.evaluate(samples, {"t": heads[1]})


def test_state_arrays_are_copies_with_tied_tensors_once(models: dict[str, Path], teacher: Teacher) -> None:
    student = learner(models["student"], stage(POLICY_GRADIENT))
    arrays = student.state_arrays()
    names = [name for name, _, _ in arrays]
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    assert sum(array.size for _, array, _ in arrays) == inspect_model("m", models["student"]).num_parameters
    assert all(array.flags.c_contiguous and dtype == "float32" for _, array, dtype in arrays)
    before = {name: array.copy() for name, array, _ in arrays}
    train(student, teacher.score(rollouts()))
    assert all((array == before[name]).all() for name, array, _ in arrays), "a step must not reach published weights"
    assert any((array != before[name]).any() for name, array in weights_of(student).items())
    assert "lm_head.weight" in weights_of(learner(models["untied"], stage(POLICY_GRADIENT)))


def test_a_bfloat16_student_moves_by_steps_below_its_precision(models: dict[str, Path], teacher: Teacher) -> None:
    """The optimizer holds float32 masters: many steps of 1e-5 add up, which in bfloat16 they would not."""
    student = learner(models["student"], stage(FULL, lr=1e-5), dtype="bfloat16")
    samples = teacher.score(rollouts())
    before = weights_of(student)
    assert all(dtype == "bfloat16" and array.dtype == np.uint16 for _, array, dtype in student.state_arrays())
    for _ in range(40):
        train(student, samples, teacher)
    moved = np.mean([(array != before[name]).mean() for name, array in weights_of(student).items()])
    assert moved > 0.15
    exact = learner(models["student"], stage(FULL, lr=1e-5))
    for _ in range(40):
        train(exact, samples, teacher)
    for name, array in weights_of(exact).items():
        theirs = torch.from_numpy(weights_of(student)[name].view(np.int16)).view(torch.bfloat16).float().numpy()
        np.testing.assert_allclose(theirs, array, rtol=0.01, atol=1e-3)


def test_gradients_of_a_bfloat16_student_add_up_in_float32(models: dict[str, Path]) -> None:
    """1 + 2^-10, a hundred times over, is 1 in bfloat16."""
    parameters = engine_of(learner(models["student"], stage(POLICY_GRADIENT), dtype="bfloat16")).parameters
    for value in (1.0, *[2.0**-10] * 100):
        for param in parameters._params.values():
            param.grad = torch.full_like(param, value)
        parameters.collect_gradients()
    for name, master in parameters._masters.items():
        assert master.grad is not None
        assert master.grad.dtype == torch.float32
        assert (master.grad == 1 + 100 * 2.0**-10).all(), name
    size = sum(master.numel() for master in parameters._masters.values())
    assert parameters.gradient_norm() == pytest.approx((1 + 100 * 2.0**-10) * size**0.5, rel=1e-5)


def test_learning_rate_warms_up_and_decays_to_its_end() -> None:
    spec = OptimizerSpec(lr=1.0, warmup_steps=4, decay="cosine", min_lr_ratio=0.1)
    rates = [learning_rate(spec, step, 20) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[19] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(rates[4:]))
    linear = OptimizerSpec(lr=1.0, decay="linear")
    assert [learning_rate(linear, step, 5) for step in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert learning_rate(OptimizerSpec(lr=0.3), 999, 5) == 0.3
    assert learning_rate(OptimizerSpec(lr=0.3, decay="linear"), 0, 1) == 0.3


def test_an_exported_student_loads_and_passes_the_intake(
    models: dict[str, Path], teacher: Teacher, tmp_path: Path
) -> None:
    student = learner(models["student"], stage(FULL))
    samples = teacher.score(rollouts())
    train(student, samples, teacher)
    card = {"student": "tiny", "teachers": {"t": "big"}, "steps": 1, "heldout_reverse_kl_before": 5.25, "extra": "a|b"}
    folder = tmp_path / "export"
    student.export(models["student"], folder, card)

    exported, original = inspect_model("x", folder), inspect_model("s", models["student"])
    assert exported.tokenizer_sha256 == original.tokenizer_sha256
    assert exported.has_chat_template
    assert exported.files["generation_config.json"] == original.files["generation_config.json"]
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    for name, param in model.named_parameters():
        np.testing.assert_array_equal(param.detach().numpy(), weights_of(student)[name])
    assert AutoTokenizer.from_pretrained(folder, local_files_only=True).eos_token_id == 2
    text = (folder / "README.md").read_text()
    for expected in ("tiny", "t: big", "5.25", "| extra | a\\|b |", "Stillhouse", "licence"):
        assert expected in text
    again = learner(folder, stage(FULL))
    assert again.evaluate(samples, {"t": teacher.head}) == student.evaluate(samples, {"t": teacher.head})
