"""What the learner asks of its samples follows from the loss, and only the tokens that train reach the kernel."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stillhouse.core.errors import WireError
from stillhouse.core.spec import StageSpec, TokensSpec
from stillhouse.trainer import engine as engine_module
from stillhouse.trainer.batch import TrainSample
from stillhouse.trainer.masks import mask_tokens
from stillhouse.trainer.packing import collate
from tests.tiny import TOKENIZER_SIZE, make_tiny_model
from tests.unit.learner_cases import FULL, POLICY_GRADIENT, Teacher, learner, rollouts, stage, train, weights_of

TOP_K = {"objective": "top_k", "k": 6}


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "student", seed=1)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    return Teacher(make_tiny_model(tmp_path_factory.mktemp("models") / "teacher", seed=2))


def named(teacher: Teacher, samples: list[TrainSample], prefix: str, ids_TK: Any) -> list[TrainSample]:
    """The samples with tokens named by `ids_TK(log q [T, V])` and the teacher's log-probabilities of them."""
    found = []
    for s in samples:
        log_q = teacher.log_probs([*s.prompt_ids, *s.completion_ids], 1.0)[len(s.prompt_ids) - 1 : -1]
        ids = ids_TK(log_q)
        fields = {f"{prefix}_ids": ids.int().numpy(), f"{prefix}_logprobs": log_q.gather(1, ids).float().numpy()}
        found.append(replace(s, **fields))
    return found


def everything(log_q: torch.Tensor) -> torch.Tensor:
    return torch.arange(TOKENIZER_SIZE).expand(len(log_q), -1)


def likeliest(log_q: torch.Tensor) -> torch.Tensor:
    return log_q.topk(TOKENIZER_SIZE).indices


@pytest.mark.parametrize("support", ["student", "union"])
def test_a_support_of_all_tokens_is_the_full_vocabulary(student: Path, teacher: Teacher, support: str) -> None:
    """Whoever names them: in a union of two such lists every token stands twice and counts once."""
    samples = listed = teacher.score(rollouts())
    listed = named(teacher, listed, "target", everything)
    if support == "union":
        listed = named(teacher, listed, "topk", likeliest)
    expected = train(learner(student, stage(FULL)), samples, teacher)
    found = train(learner(student, stage({**TOP_K, "support": support, "k": TOKENIZER_SIZE})), listed)
    assert found["loss/total"] == pytest.approx(expected["loss/total"], abs=1e-5)
    assert found["grad/norm"] == pytest.approx(expected["grad/norm"], rel=1e-4)


def test_a_baseline_over_all_tokens_is_that_over_the_vocabulary(student: Path, teacher: Teacher) -> None:
    samples = teacher.score(rollouts())
    spec: dict[str, Any] = {**POLICY_GRADIENT, "baseline": "top_k", "k": TOKENIZER_SIZE}
    listed = train(learner(student, stage(spec)), named(teacher, samples, "topk", likeliest))
    exact = train(learner(student, stage({**POLICY_GRADIENT, "baseline": "full_vocabulary"})), samples, teacher)
    plain = train(learner(student, stage(POLICY_GRADIENT)), samples)
    assert listed["grad/norm"] == pytest.approx(exact["grad/norm"], rel=1e-4)
    assert not np.isclose(plain["grad/norm"], exact["grad/norm"], rtol=0.1), "the baseline must have done something"


def test_rewards_reach_the_tokens_of_their_completion(student: Path, teacher: Teacher) -> None:
    """A reward's advantage of 1 everywhere, and no teacher: -log p, which is cross-entropy."""
    samples = [replace(s, outcome=1.0) for s in teacher.score(rollouts(), hidden=None)]
    schedule = {"steps": 100, "group_size": 2}
    parts: dict[str, Any] = {"data": {"rows": [{"prompt": "hi"}]}, "schedule": schedule, "optimizer": {"lr": 1e-3}}
    grpo = StageSpec.model_validate({**parts, "loss": {**POLICY_GRADIENT, "teacher_weight": 0, "reward": {}}})
    given_texts = {"loss": {"objective": "cross_entropy"}, "on_policy_fraction": 0, "schedule": {"steps": 100}}
    sft = StageSpec.model_validate({**parts, **given_texts})
    rewarded = train(learner(student, grpo), samples)
    given = train(learner(student, sft), samples)
    assert rewarded["loss/total"] == pytest.approx(given["loss/total"], rel=1e-5)
    assert rewarded["grad/norm"] == pytest.approx(given["grad/norm"], rel=1e-4)
    one = [replace(s, outcome=float(i == 0)) for i, s in enumerate(samples)]
    assert 0 < train(learner(student, grpo), one)["loss/total"] < rewarded["loss/total"]


@pytest.mark.parametrize(
    ("support", "sent", "message"),
    [
        ("student", ["topk"], "6 likeliest tokens of teacher 't' and 0 of the student per position; .* 0 and 6"),
        ("union", ["topk"], "6 likeliest tokens of teacher 't' and 0 of the student .* 6 and 6"),
        ("teacher", ["target"], "0 likeliest tokens of teacher 't' and 6 of the student .* 6 and 0"),
        ("teacher", ["topk", "target"], "6 likeliest tokens of teacher 't' and 6 of the student .* 6 and 0"),
    ],
)
def test_lists_that_the_objective_did_not_ask_for_are_refused(
    student: Path, teacher: Teacher, support: str, sent: list[str], message: str
) -> None:
    samples = teacher.score(rollouts(count=2))
    for prefix in sent:
        samples = named(teacher, samples, prefix, lambda log_q: log_q.topk(6).indices)
    with pytest.raises(WireError, match=f"sample 0/0: {message}"):
        train(learner(student, stage({**TOP_K, "support": support})), samples)


def test_a_baseline_asks_for_what_its_payload_is(student: Path, teacher: Teacher) -> None:
    samples = teacher.score(rollouts(count=2), hidden=None)
    listed, exact = ({**POLICY_GRADIENT, "baseline": name} for name in ("top_k", "full_vocabulary"))
    with pytest.raises(WireError, match=r"0 likeliest tokens .* objective needs 64 and 0"):
        train(learner(student, stage(listed)), samples)
    with pytest.raises(WireError, match="no hidden states"):
        train(learner(student, stage(exact)), samples, teacher)
    with pytest.raises(WireError, match="no output head"):
        train(learner(student, stage(exact)), teacher.score(rollouts(count=2)))


@pytest.mark.parametrize(
    ("tokens", "share"),
    [
        ({}, 1.0),
        ({"select": {"by": "kl", "fraction": 0.25}}, 0.25),
        ({"horizon": {"start": 2, "end": 2, "steps": 1}}, 0.0),
    ],
    ids=["all", "selected", "horizon"],
)
def test_tokens_that_do_not_train_are_not_computed(
    student: Path, teacher: Teacher, monkeypatch: pytest.MonkeyPatch, tokens: dict[str, Any], share: float
) -> None:
    rows: list[int] = []
    original = engine_module.packed_loss

    def counted(objective: Any, hidden: torch.Tensor, *args: Any) -> Any:
        rows.append(hidden.shape[0])
        return original(objective, hidden, *args)

    monkeypatch.setattr(engine_module, "packed_loss", counted)
    given = teacher.score(rollouts(count=8))
    samples = mask_tokens(given, TokensSpec.model_validate(tokens), 0)
    metrics = train(learner(student, stage(FULL)), samples, teacher)
    lengths = [len(s.completion_ids) for s in given]
    expected = round(share * sum(lengths)) if share else sum(min(2, length) for length in lengths)
    assert sum(rows) == metrics["tokens/trained"] == expected
    assert metrics["tokens/selected_fraction"] == pytest.approx(expected / sum(lengths))


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_what_comes_after_the_last_trained_token_is_not_read(student: Path, teacher: Teacher, packing: bool) -> None:
    """A horizon costs what completions of its length cost, in the whole model, and trains the same."""
    spec = TokensSpec.model_validate({"horizon": {"start": 3, "end": 3, "steps": 1}})
    given = rollouts(count=6)
    masked = mask_tokens(teacher.score(given), spec, 0)
    cut = teacher.score([(prompt, completion[:3]) for prompt, completion in given])
    batches = [collate(samples, range(6), [1.0] * 6, is_packed=packing) for samples in (masked, cut)]
    np.testing.assert_array_equal(batches[0].input_ids, batches[1].input_ids)
    metrics = [train(learner(student, stage(FULL)), samples, teacher) for samples in (masked, cut)]
    assert metrics[0]["grad/norm"] == pytest.approx(metrics[1]["grad/norm"], rel=1e-4)
    nothing = replace(masked[0], loss_mask=np.zeros_like(masked[0].loss_mask))
    assert collate([nothing], [0], [1.0], is_packed=packing).input_ids.shape == (1, len(nothing.prompt_ids))


def test_a_step_in_which_nothing_trains_moves_nothing(student: Path, teacher: Teacher) -> None:
    spec = TokensSpec(drop_truncated=True)
    samples = mask_tokens(teacher.score(rollouts(count=2), finish_reason=2), spec, 0)
    moving = learner(student, stage(FULL))
    before = weights_of(moving)
    metrics = train(moving, samples, teacher)
    assert (metrics["tokens/trained"], metrics["completion/dropped_truncated"]) == (0.0, 2.0)
    assert all((array == before[name]).all() for name, array in weights_of(moving).items())
    assert moving.policy_version == 1


def test_per_teacher_reaches_the_loss(student: Path, teacher: Teacher) -> None:
    """Two teachers of the same mind, one with ten times the samples: each counts half."""
    own, other = teacher.score(rollouts(1, 10)), teacher.score(rollouts(2, 1), first=10, teacher="u")
    heads = {"t": teacher.head, "u": teacher.head}
    loss: dict[str, float] = {}
    for name, samples, per_teacher in (("t", own, False), ("u", other, False), ("both", own + other, True)):
        student_ = learner(student, stage({**FULL, "per_teacher": per_teacher}), teachers=("t", "u"))
        plan = [[i] for i in range(len(samples))]
        loss[name] = student_.step(samples, heads, plan)["loss/total"]
    assert loss["both"] == pytest.approx((loss["t"] + loss["u"]) / 2, rel=1e-5)
    assert not np.isclose(loss["t"], loss["u"], rtol=1e-2), "else the shares could not be told apart"
