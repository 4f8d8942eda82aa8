"""What top-k forms train towards: the two that Stillhouse offers, and the naive ones, written out here.

One position, V = 50 tokens, the support S = the teacher's k = 8 likeliest. The student's logits are free, so nothing
but the form of the loss keeps it from its teacher. Gradient descent with step 0.5.

Which way: q is the teacher, p the student; the reverse forms estimate KL(p || q), the forward ones KL(q || p), in nats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from stillhouse.trainer.objectives.base import Head, Objective, Signals, StudentChunk, through_softmax
from stillhouse.trainer.objectives.full_vocabulary import ForwardKL, GeneralisedJSD, ReverseKL
from stillhouse.trainer.objectives.topk import TopK

V: Final = 50
K: Final = 8
STEP: Final = 0.5
STEPS: Final = 20_000
AT_REST: Final = 1e-6
"""Largest component of a gradient that counts as none: 20,000 more steps would move no logit by more than 0.01."""
_SPREAD: Final = 1.5
"""Standard deviation of the logits."""

Gradient = Callable[[Tensor], Tensor]
"""Logits of R students [R, V] to the gradient of each one's loss with respect to them [R, V]."""


class Example:
    """Student and teacher of the study, float64; always the same."""

    def __init__(self, k: int = K) -> None:
        draw = np.random.default_rng(0)
        self.student = torch.from_numpy(_SPREAD * draw.normal(size=V))
        """[V] the student's logits at the start."""
        self.q = torch.from_numpy(_SPREAD * draw.normal(size=V)).softmax(0)
        """[V] the teacher's probabilities."""
        self.support = self.q.topk(k).indices
        """[k] S."""

    def mass(self, p: Tensor) -> float:
        """Probability of S."""
        return float(p[self.support].sum())

    def chunk(self, logits: Tensor) -> tuple[StudentChunk, Signals]:
        """What the trainer shows an objective of R students: their distributions, and their teacher's answers."""
        rows = len(logits)
        ids = self.support.expand(rows, -1)
        log_p, log_q = logits.log_softmax(1), self.q.log().expand(rows, -1)
        signals = Signals(
            hidden=log_q,
            head=Head(torch.eye(V, dtype=torch.float64)),
            topk_ids=ids,
            topk_logprobs=log_q.gather(1, ids),
        )
        return StudentChunk(log_p, log_p.exp(), ids[:, 0], log_p.gather(1, ids[:, :1])[:, 0]), signals

    def offered(self, objective: Objective) -> Gradient:
        """The gradient that the trainer's objective gives."""
        return lambda logits: objective(*self.chunk(logits), 1.0).grad

    def naive(self, slope: Callable[[Tensor, Tensor], Tensor]) -> Gradient:
        """The gradient of a loss of p and q on S, from its derivative with respect to p on S [R, k]."""

        def gradient(logits: Tensor) -> Tensor:
            p = logits.softmax(1)
            slopes = torch.zeros_like(p)
            slopes[:, self.support] = slope(p[:, self.support], self.q[self.support])
            return through_softmax(p, slopes)

        return gradient


# Naive losses, each as its derivative with respect to p on S; the test of the study has the losses themselves.


def truncated_reverse(p_S: Tensor, q_S: Tensor) -> Tensor:
    """Of sum over S of p log(p / q), the rest dropped."""
    return (p_S / q_S).log() + 1


def renormalised_reverse(p_S: Tensor, q_S: Tensor) -> Tensor:
    """Of the same between the two distributions given S."""
    mass = p_S.sum(-1, keepdim=True)
    given, log_ratio = p_S / mass, (p_S / mass / (q_S / q_S.sum())).log()
    return (log_ratio - (given * log_ratio).sum(-1, keepdim=True)) / mass


def truncated_forward(p_S: Tensor, q_S: Tensor) -> Tensor:
    """Of sum over S of q log(q / p), the rest dropped."""
    return -q_S / p_S


def clamped_forward(p_S: Tensor, q_S: Tensor) -> Tensor:
    """Of the same, but no less than 0: where the sum is negative, nothing moves."""
    loss = (q_S * (q_S / p_S).log()).sum(-1, keepdim=True)
    return truncated_forward(p_S, q_S) * (loss >= 0)


@dataclass(frozen=True)
class Form:
    """One loss of the study."""

    name: str
    is_reverse: bool
    is_offered: bool
    """By the trainer; otherwise it is one of the naive ones above."""
    gradient: Gradient


def forms(example: Example) -> list[Form]:
    """All forms, the full divergences first."""
    ours, naive = example.offered, example.naive
    return [
        Form("full vocabulary", True, True, ours(ReverseKL())),
        Form("tail", True, True, ours(TopK("reverse", "tail"))),
        Form("generalised", True, True, ours(TopK("reverse", "generalised"))),
        Form("naive: truncated", True, False, naive(truncated_reverse)),
        Form("naive: renormalised", True, False, naive(renormalised_reverse)),
        Form("full vocabulary", False, True, ours(ForwardKL())),
        Form("tail", False, True, ours(TopK("forward", "tail"))),
        Form("generalised", False, True, ours(TopK("forward", "generalised"))),
        Form("naive: truncated", False, False, naive(truncated_forward)),
        Form("naive: clamped at 0", False, False, naive(clamped_forward)),
    ]


@dataclass(frozen=True)
class Curve:
    """What becomes of one student under one form."""

    steps: list[int]
    masses: list[float]
    """p(S) after so many steps."""
    kls: list[float]
    """KL to the teacher over the whole vocabulary in the form's direction, nats."""


@dataclass(frozen=True)
class Course:
    """A form's gradients and where they lead."""

    form: Form
    norm_at_teacher: float
    """Of the gradient at p = q; a loss that knows its goal has 0."""
    cosine: float
    """Between its first gradient and that of the full divergence of its direction."""
    norm_ratio: float
    """Norm of its first gradient / norm of the full one."""
    from_student: Curve
    """Started at the example's student."""
    from_teacher: Curve
    """Started at p = q: there is nothing to learn, so nothing should move."""


def descend(gradient: Gradient, start: Tensor, steps: int) -> Iterator[tuple[int, Tensor]]:
    """(step, p [R, V]) at 0, about 20 times per power of ten, and at the end."""
    marks = {0, *np.geomspace(1, steps, int(20 * np.log10(steps)) + 1).round().astype(int).tolist()}
    logits, is_at_rest = start.clone(), False
    for step in range(steps + 1):
        if step in marks:
            yield step, logits.softmax(1)
        if not is_at_rest:
            slope = gradient(logits)
            is_at_rest = float(slope.abs().max()) < AT_REST
            logits = logits - STEP * slope


def course(form: Form, example: Example, steps: int = STEPS) -> Course:
    """Follow a form from the student and from the teacher, and measure its gradient at both."""
    q = example.q
    starts = torch.stack([example.student, q.log()])
    first, at_teacher = form.gradient(starts)
    full = example.offered(ReverseKL() if form.is_reverse else ForwardKL())(starts)[0]
    records = list(descend(form.gradient, starts, steps))
    curves = [
        Curve(
            steps=[step for step, _ in records],
            masses=[example.mass(p[row]) for _, p in records],
            kls=[kl(p[row], q) if form.is_reverse else kl(q, p[row]) for _, p in records],
        )
        for row in range(2)
    ]
    cosine = torch.nn.functional.cosine_similarity(first, full, dim=0)
    return Course(form, float(at_teacher.norm()), float(cosine), float(first.norm() / full.norm()), *curves)


def kl(a: Tensor, b: Tensor) -> float:
    """KL(a || b), nats."""
    return float((a * (a / b).log()).sum())


def signal_of_one() -> float:
    """Norm of the first gradient of the renormalised form with k = 1."""
    example = Example(k=1)
    return float(example.naive(renormalised_reverse)(example.student[None]).norm())


def jsd(beta: float, rescale: bool) -> float:
    """The trainer's generalised JSD between the example's student and teacher, nats."""
    example = Example()
    return float(GeneralisedJSD(beta, rescale)(*example.chunk(example.student[None]), 1.0).value)
