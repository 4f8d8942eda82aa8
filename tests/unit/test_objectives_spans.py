"""Policy gradient on spans of text, for teachers with another tokenizer: what its average is, and what its rows say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stillhouse.core.errors import WireError
from stillhouse.core.spec import HorizonSpec, TokensSpec
from stillhouse.core.tensors import ids_tensor, to_tensor
from stillhouse.trainer.batch import MIN_LOG_Q, TrainSample
from stillhouse.trainer.losses import make_objective, packed_loss
from stillhouse.trainer.masks import mask_tokens
from stillhouse.trainer.objectives.base import Head, Signals
from stillhouse.trainer.scored import ScoredSample
from stillhouse.trainer.spans import span_arrays
from stillhouse.trainer.train import to_sample
from stillhouse.v1 import rollout_pb2 as pb
from tests.tiny import make_tiny_model
from tests.unit.learner_cases import POLICY_GRADIENT, Teacher, learner, rollouts, stage, train, weights_of
from tests.unit.loss_cases import loss
from tests.unit.loss_oracles import kl

V = 3
SPANS = [(0,), *((first, second) for first in (1, 2) for second in range(V))]
"""What can be written next: token 0, which is a piece of text to both models, or another with a second one."""


class Writer:
    """A student with a distribution over the first token, and over the second after each first."""

    def __init__(self, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.logits = torch.randn(1 + V, V, generator=draw, dtype=torch.float64).requires_grad_()
        """[1 + V, V]: row 0 of the first token, row 1 + y of the one after y."""

    def probabilities(self) -> Tensor:
        """[S] of the spans; they sum to 1."""
        p = self.logits.softmax(-1)
        return torch.stack([p[0, s[0]] if len(s) == 1 else p[0, s[0]] * p[1 + s[0], s[1]] for s in SPANS])

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """([R] row of `logits`, [R] token, [R] span) of all spans, one after the other."""
        rows = [
            (0 if t == 0 else 1 + s[0], token, number) for number, s in enumerate(SPANS) for t, token in enumerate(s)
        ]
        return tuple(torch.tensor(column) for column in zip(*rows, strict=True))  # type: ignore[return-value]


def mean_gradient(spec: Any, student: Writer, log_q: Tensor, mu: Tensor | None = None) -> Tensor:
    """[1 + V, V] the loss's gradient, averaged exactly over spans drawn from the student, or from `mu` [S]."""
    row, ids, span = student.rows()
    drawn = student.probabilities().detach() if mu is None else mu
    log_mu = torch.zeros(len(ids)).double()
    first = torch.cat([torch.tensor([True]), span[1:] != span[:-1]])
    log_mu[first] = drawn.log()  # only sums over spans count: the others may as well be 0
    if mu is None:
        log_mu = student.logits.detach().log_softmax(-1)[row, ids]
    signals = Signals(logprobs=log_q[span], span=span, rollout_logprobs=log_mu, sample=span)
    hidden = student.logits[row]
    result = packed_loss(make_objective(spec), hidden, Head(torch.eye(V).double()), ids, drawn[span], signals)
    return torch.autograd.grad(result.loss, student.logits)[0]


def of_kl(student: Writer, q: Tensor) -> Tensor:
    return torch.autograd.grad(kl(student.probabilities(), q), student.logits)[0]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("known", [1.0, 0.3], ids=["all of q", "a part of q"])
def test_the_average_is_the_gradient_of_the_reverse_kl_between_spans(seed: int, known: float) -> None:
    """Also where the teacher's probabilities are too small by a factor, as those of one tokenization of several are."""
    student, draw = Writer(seed), torch.Generator().manual_seed(100 + seed)
    q = torch.rand(len(SPANS), generator=draw, dtype=torch.float64).softmax(-1)
    expected = of_kl(student, q)
    found = mean_gradient(loss("policy_gradient", cross_tokenizer=True), student, (known * q).log())
    torch.testing.assert_close(found, expected)
    forward = torch.autograd.grad(kl(q, student.probabilities()), student.logits)[0]
    assert not torch.allclose(found, forward, rtol=0.1), "the test tells the directions apart"


def test_of_spans_that_older_weights_wrote_the_ratio_of_the_whole_span_makes_it_right() -> None:
    student, older = Writer(0), Writer(1).probabilities().detach()
    q = torch.rand(len(SPANS), generator=torch.Generator().manual_seed(5), dtype=torch.float64).softmax(-1)
    fields: dict[str, Any] = {"cross_tokenizer": True}
    right = mean_gradient(loss("policy_gradient", ratio_gate="is", **fields), student, q.log(), older)
    torch.testing.assert_close(right, of_kl(student, q))
    wrong = mean_gradient(loss("policy_gradient", **fields), student, q.log(), older)
    assert not torch.allclose(wrong, right, rtol=0.1)


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[TrainSample]]:
    """(a student, samples of its with scores of a teacher with the same tokenizer)."""
    folder = tmp_path_factory.mktemp("models")
    teacher = Teacher(make_tiny_model(folder / "teacher", seed=2))
    return make_tiny_model(folder / "student", seed=1), teacher.score(rollouts(), hidden=None)


@pytest.mark.parametrize(
    "fields", [{}, {"advantage_clip": 0.5}, {"ratio_gate": "tis", "student_term": "sampler"}], ids=str
)
def test_spans_of_one_token_are_the_policy_gradient_to_the_last_bit(
    scored: tuple[Path, list[TrainSample]], fields: dict[str, Any]
) -> None:
    student, samples = scored
    spec = {**POLICY_GRADIENT, **fields}
    plain, by_span = learner(student, stage(spec)), learner(student, stage({**spec, "cross_tokenizer": True}))
    spanned = [replace(s, spans=np.arange(len(s.completion_ids), dtype=np.int32)) for s in samples]
    expected, found = train(plain, samples), train(by_span, spanned)
    for name, value in expected.items():
        assert found[name] == value or name == "teacher/forbidden_fraction", name
    for (name, theirs), (_, mine) in zip(weights_of(plain).items(), weights_of(by_span).items(), strict=True):
        assert np.array_equal(mine, theirs), name


def test_a_sample_whose_teacher_scored_tokens_is_refused(scored: tuple[Path, list[TrainSample]]) -> None:
    student, samples = scored
    with pytest.raises(WireError, match="scored tokens"):
        train(learner(student, stage({**POLICY_GRADIENT, "cross_tokenizer": True})), samples)


def test_spans_train_as_a_whole(scored: tuple[Path, list[TrainSample]]) -> None:
    sample = next(s for s in scored[1] if len(s.completion_ids) >= 5)
    length = len(sample.completion_ids)
    spans = np.array([0, 0, 1, 1, 1] + [2] * (length - 5), dtype=np.int32)
    tokens = TokensSpec(horizon=HorizonSpec(start=4, end=4, steps=1))
    (masked,) = mask_tokens([replace(sample, spans=spans)], tokens, 0)
    assert masked.loss_mask.tolist() == [1, 1] + [0] * (length - 2)


def score(student_ends: list[int], teacher_ends: list[int], logprobs: list[float], num_tokens: int = 4) -> pb.Score:
    made = pb.Score(
        rollout=pb.Rollout(
            sample_id="7/0",
            prompt_ids=ids_tensor([1]),
            completion_ids=ids_tensor(range(num_tokens)),
            rollout_logprobs=to_tensor(np.full(num_tokens, -1.0, np.float32)),
            spans=[pb.Span()],
        )
    )
    made.spans.teacher_ids.CopyFrom(ids_tensor(range(len(logprobs))))
    made.spans.teacher_logprobs.CopyFrom(to_tensor(np.array(logprobs, np.float32)))
    made.spans.student_ends.CopyFrom(ids_tensor(student_ends))
    made.spans.teacher_ends.CopyFrom(ids_tensor(teacher_ends))
    return made


def test_a_score_of_spans_becomes_a_sample() -> None:
    """The teacher's forbidden tokens count as next to impossible, each by itself; what has no score does not train."""
    sample = to_sample(ScoredSample(score([1, 3], [2, 3], [-1.0, -np.inf, -0.25, -9.0])), 1.0)
    assert sample.spans is not None
    assert sample.spans.tolist() == [0, 1, 1, -1]
    assert sample.teacher_logprobs[:3].tolist() == [MIN_LOG_Q - 1.0, -0.25, -0.25]
    assert sample.loss_mask.tolist() == [1, 1, 1, 0]


def test_what_the_students_tokenizer_writes_otherwise_is_next_to_impossible() -> None:
    """No text of the teacher becomes these tokens."""
    made = score([1, 3], [2, 3], [-1.0, -2.0, -0.25])
    made.spans.is_canonical.CopyFrom(to_tensor(np.array([1, 0], np.uint8)))
    assert span_arrays(made, 4)["teacher_logprobs"][:3].tolist() == [-3.0, MIN_LOG_Q - 0.25, MIN_LOG_Q - 0.25]


def test_a_score_without_spans_trains_nothing() -> None:
    sample = to_sample(ScoredSample(score([], [], [-1.0])), 1.0)
    assert not sample.loss_mask.any()


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ([1, 5], [1, 2], "of 4 tokens of the student"),
        ([2, 2], [1, 2], "of 4 tokens of the student"),
        ([0, 2], [1, 2], "of 4 tokens of the student"),
        ([1, 2], [1, 3], "of 2 tokens of the teacher"),
        ([1, 2], [2], "teacher_ends of shape"),
    ],
)
def test_spans_that_are_none_are_refused(student: list[int], teacher: list[int], message: str) -> None:
    with pytest.raises(WireError, match=message):
        span_arrays(score(student, teacher, [-1.0, -1.0]), 4)


def test_a_text_is_written_in_one_way_and_not_in_all() -> None:
    """Spans 0 and 1 spell one text, 0 as the tokenizer does. The control, which credits both, spreads over both."""
    q = torch.tensor([0.4, 0.4, 0.1, 0.1, 0.1, 0.1, 0.2]).double()
    marked = q.log() + MIN_LOG_Q * (torch.arange(len(SPANS)) == 1)
    shares = []
    for log_q in (marked, q.log()):
        student = Writer(0)
        for _ in range(100):
            gradient = mean_gradient(loss("policy_gradient", cross_tokenizer=True), student, log_q)
            student.logits.data -= 3 * gradient
        p = student.probabilities().detach()
        shares.append(float(p[1] / (p[0] + p[1])))
    assert shares[0] < 1e-3
    assert shares[1] == pytest.approx(0.5, abs=0.05)
