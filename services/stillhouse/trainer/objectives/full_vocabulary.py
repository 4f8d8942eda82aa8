"""Divergences between student and teacher over the whole vocabulary, exact at each visited prefix.

    name            loss of a row                                              minimised where
    reverse_kl      KL(p || q) = sum p (log p - log q)                         p = q; seeks modes
    forward_kl      KL(q || p) = sum q (log q - log p)                         p = q; covers
    jsd             b KL(q || m) + (1 - b) KL(p || m), m = b q + (1 - b) p     p = q; between the two
    skew_forward    KL(q || a q + (1 - a) p)                                   p = q; bounded gradients
    skew_reverse    KL(p || (1 - a) q + a p)                                   p = q; bounded gradients
    entropy_mix     KL(p || q) + c [H(q) > t] KL(q || p)                       p = q; covers where the teacher is unsure
    k2              (log p(y) - log q(y))^2 / 2 at the sampled token y         p = q; on average over y the reverse KL's

Which way each runs is said with student p and teacher q. Every gradient is 0 at p = q. Each class overwrites what it
is given, tile by tile: passes over [C, V] and fresh memory for it are what an objective costs.

Sources: generalised JSD as in GKD (arXiv:2306.13649); skew KL as in DistiLLM (arXiv:2402.03898); the entropy-aware mix
after arXiv:2603.07079. The gradients are checked against autograd of the definitions in tests/unit/test_objectives.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stillhouse.trainer.objectives.base import ChunkLoss, Signals, StudentChunk, through_softmax


@dataclass(frozen=True)
class ReverseKL:
    """KL(student || teacher) = sum_v p (log p - log q); gradient p (log p - log q - KL)."""

    def __call__(self, student: StudentChunk, signals: Signals, temperature: float) -> ChunkLoss:
        difference_CV = student.log_p.sub_(signals.log_q(temperature))
        kl_C = torch.linalg.vecdot(student.p, difference_CV)
        return ChunkLoss(kl_C, difference_CV.sub_(kl_C[:, None]).mul_(student.p), kl_C)


@dataclass(frozen=True)
class ForwardKL:
    """KL(teacher || student) = sum_v q (log q - log p); gradient p - q. Also measures the reverse KL."""

    def __call__(self, student: StudentChunk, signals: Signals, temperature: float) -> ChunkLoss:
        log_q_CV, q_CV = signals.teacher(temperature)
        difference_CV = student.log_p.sub_(log_q_CV)
        reverse_kl_C = torch.linalg.vecdot(student.p, difference_CV)
        value_C = -torch.linalg.vecdot(q_CV, difference_CV)
        return ChunkLoss(value_C, student.p.sub_(q_CV), reverse_kl_C)


@dataclass(frozen=True)
class GeneralisedJSD:
    """b KL(q || m) + (1 - b) KL(p || m), m = b q + (1 - b) p; gradient (1 - b) p (log(p / m) - KL(p || m)).

    It tends to b KL(q || p) for small b and to (1 - b) KL(p || q) for b near 1, so its size says nothing about how far
    apart the models are; with `rescale` it is divided by b (1 - b), and joins the two KLs without a jump.
    """

    beta: float
    """0 < b < 1."""
    rescale: bool = False

    @property
    def size(self) -> float:
        """Factor of loss and gradient."""
        return 1 / (self.beta * (1 - self.beta)) if self.rescale else 1.0

    def __call__(self, student: StudentChunk, signals: Signals, temperature: float) -> ChunkLoss:
        log_q_CV, q_CV = signals.teacher(temperature)
        difference_CV = torch.sub(log_q_CV, student.log_p, out=student.log_p)
        reverse_kl_C = -torch.linalg.vecdot(student.p, difference_CV)
        p_to_m_CV = log_over_mixture(difference_CV, self.beta, log_q_CV)
        student_C = torch.linalg.vecdot(student.p, p_to_m_CV)
        q_to_m_CV = difference_CV.add_(p_to_m_CV)
        teacher_C = torch.linalg.vecdot(q_CV, q_to_m_CV)
        value_C = self.size * (self.beta * teacher_C + (1 - self.beta) * student_C)
        grad_CV = p_to_m_CV.sub_(student_C[:, None]).mul_(student.p).mul_(self.size * (1 - self.beta))
        return ChunkLoss(value_C, grad_CV, reverse_kl_C)


@dataclass(frozen=True)
class SkewForwardKL:
    """KL(q || m), m = a q + (1 - a) p: forward KL whose gradient stays bounded where p is small."""

    alpha: float
    """0 < a < 1; 0 would be the forward KL."""

    def __call__(self, student: StudentChunk, signals: Signals, temperature: float) -> ChunkLoss:
        log_q_CV, q_CV = signals.teacher(temperature)
        difference_CV = torch.sub(log_q_CV, student.log_p, out=student.log_p)
        reverse_kl_C = -torch.linalg.vecdot(student.p, difference_CV)
        q_to_m_CV = difference_CV.add_(log_over_mixture(difference_CV, self.alpha, log_q_CV))
        value_C = torch.linalg.vecdot(q_CV, q_to_m_CV)
        slope_CV = q_to_m_CV.exp_().mul_(self.alpha - 1)  # d/dp of -q log m = -(1 - a) q / m
        return ChunkLoss(value_C, through_softmax(student.p, slope_CV), reverse_kl_C)


@dataclass(frozen=True)
class SkewReverseKL:
    """KL(p || n), n = (1 - a) q + a p: reverse KL that stays finite where q is 0."""

    alpha: float
    """0 < a < 1; 0 would be the reverse KL."""

    def __call__(self, student: StudentChunk, signals: Signals, temperature: float) -> ChunkLoss:
        log_q_CV = signals.log_q(temperature)
        difference_CV = torch.sub(log_q_CV, student.log_p, out=student.log_p)
        reverse_kl_C = -torch.linalg.vecdot(student.p, difference_CV)
        p_to_n_CV = log_over_mixture(difference_CV, 1 - self.alpha, log_q_CV)
        value_C = torch.linalg.vecdot(student.p, p_to_n_CV)
        # d/dp of p log(p / n) = log(p / n) + 1 - a p / n; the 1 falls out in the softmax
        slope_CV = p_to_n_CV.sub_(p_to_n_CV.exp().mul_(self.alpha))
        return ChunkLoss(value_C, through_softmax(student.p, slope_CV), reverse_kl_C)


@dataclass(frozen=True)
class EntropyMix:
    """Reverse KL, plus `weight` times the forward KL where the teacher's entropy is above `threshold` (nats).

    Reverse KL alone makes the student sure where the teacher leaves a choice; there the forward KL keeps the variety.
    """

    threshold: float
    weight: float

    def __call__(self, student: StudentChunk, signals: Signals, temperature: float) -> ChunkLoss:
        log_q_CV, q_CV = signals.teacher(temperature)
        difference_CV = student.log_p.sub_(log_q_CV)
        reverse_C = torch.linalg.vecdot(student.p, difference_CV)
        entropy_C = -torch.linalg.vecdot(q_CV, log_q_CV)
        extra_C = (entropy_C > self.threshold).to(reverse_C.dtype) * self.weight
        forward_C = -torch.linalg.vecdot(q_CV, difference_CV)
        grad_CV = difference_CV.sub_(reverse_C[:, None]).mul_(student.p)
        grad_CV.add_(student.p.sub_(q_CV).mul_(extra_C[:, None]))
        return ChunkLoss(reverse_C + extra_C * forward_C, grad_CV, reverse_C)


@dataclass(frozen=True)
class K2:
    """Half the squared log-ratio at the sampled token y; gradient (log p(y) - log q(y)) (1[j = y] - p_j).

    One sample's view of the reverse KL: averaged over y drawn from p, the gradient is that of KL(student || teacher).
    The teacher's log q(y) comes from its hidden states, so `reverse_kl` is exact.
    """

    def __call__(self, student: StudentChunk, signals: Signals, temperature: float) -> ChunkLoss:
        log_q_CV = signals.log_q(temperature)
        ratio_C = student.logprobs - log_q_CV.gather(1, student.ids[:, None]).squeeze(1)
        reverse_kl_C = torch.linalg.vecdot(student.p, student.log_p.sub_(log_q_CV))
        grad_CV = student.p.mul_(-ratio_C[:, None])
        grad_CV.scatter_add_(1, student.ids[:, None], ratio_C[:, None])
        return ChunkLoss(ratio_C.square() / 2, grad_CV, reverse_kl_C)


def log_over_mixture(difference_CV: Tensor, share: float, out_CV: Tensor) -> Tensor:
    """[C, V] log(p / m), m = share q + (1 - share) p, from log q - log p; in the memory `out`.

    = -log(1 - share) - log(1 + exp(x)), x = log q - log p + log(share / (1 - share)): exact where one of the two has
    underflowed, and cheaper than the logarithm of a sum of exponentials.
    """
    shifted_CV = torch.add(difference_CV, math.log(share) - math.log1p(-share), out=out_CV)
    # beyond 40, log(1 + exp(x)) is x, to double precision
    torch.ops.aten.softplus.out(shifted_CV, 1, 40, out=shifted_CV)
    return shifted_CV.neg_().sub_(math.log1p(-share))
