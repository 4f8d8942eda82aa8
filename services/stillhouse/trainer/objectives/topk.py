"""Divergences on some tokens of each prefix (the support), in the two forms that are right.

S is the support, the K ids of a row: the teacher's likeliest tokens, the student's as it sampled, or both. Whoever
chose them, p and q on S are full-vocabulary probabilities of the current student and of the teacher; t_p = 1 - p(S),
t_q = 1 - q(S).

    correction     forward, teacher to student             reverse, student to teacher
    generalised    sum_S q log(q / p) - q + p              sum_S p log(p / q) - p + q
    tail           the same over K + 1 buckets, the last of which holds all tokens outside S:
                   sum_S q log(q / p) + t_q log(t_q / t_p) sum_S p log(p / q) + t_p log(t_p / t_q)

Both are 0 with gradient 0 where p = q on S, and bring the mass p(S) to q(S). Simply dropping the terms outside S is not
offered: sum_S q log(q / p) drives all mass into S, sum_S p log(p / q) drives mass out of it, also at p = q, and
renormalising over S leaves p(S) free (docs/objectives.md has the numbers).

Source: closed forms derived here, checked against autograd of the definitions in tests/unit/test_objectives.py; the
generalised form is that of MOPD (arXiv:2606.30406).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stillhouse.trainer.batch import MIN_LOG_Q
from stillhouse.trainer.objectives.base import ChunkLoss, Signals, StudentChunk


@dataclass(frozen=True)
class TopK:
    """A corrected top-k divergence; see the module's text. `reverse_kl` is the tail form's value, a lower bound."""

    direction: Literal["forward", "reverse"]
    correction: Literal["generalised", "tail"]

    def __call__(self, student: StudentChunk, signals: Signals, temperature: float) -> ChunkLoss:
        buckets = Buckets(student, signals)
        value_C, pull_CK, outside_C = self._slopes(buckets)
        # grad_j = p_j (slope_j - mean slope), where every token outside S has the same slope
        mean_C = pull_CK.sum(-1) + buckets.tail_p_C * outside_C
        grad_CV = student.p.mul_((outside_C - mean_C)[:, None])
        buckets.put(grad_CV, pull_CK - buckets.p_CK * mean_C[:, None])
        return ChunkLoss(value_C, grad_CV, buckets.reverse_kl())

    def _slopes(self, s: Buckets) -> tuple[Tensor, Tensor, Tensor]:
        """([C] value, [C, K] p times its derivative with respect to p on S, [C] derivative to each p outside).

        Derivatives are up to a constant, which falls out in the softmax. On S the factor p comes first: q / p alone
        may overflow where p is next to nothing.
        """
        mass_C = (s.p_CK - s.q_CK).sum(-1)
        nothing_C = torch.zeros_like(mass_C)
        if self.direction == "forward":
            value_C = -torch.linalg.vecdot(s.q_CK, s.difference_CK)
            if self.correction == "tail":
                return value_C - s.tail_q_C * s.tail_difference_C, -s.q_CK, -(-s.tail_difference_C).exp()
            return value_C + mass_C, s.p_CK - s.q_CK, nothing_C
        pull_CK = s.p_CK * s.difference_CK
        value_C = pull_CK.sum(-1)
        if self.correction == "tail":
            return value_C + s.tail_p_C * s.tail_difference_C, pull_CK, s.tail_difference_C
        # the derivative of - p cancels the 1 in that of p log p
        return value_C - mass_C, pull_CK, nothing_C


class Buckets:
    """Both models on K + 1 buckets of each row: the support's tokens, and all others together (the tail).

    `difference` is log p - log q. In an empty place of the support everything is 0, so it counts for nothing.
    """

    def __init__(self, student: StudentChunk, signals: Signals) -> None:
        assert signals.topk_ids is not None, "this objective needs the teacher's log-probabilities of a support"
        assert signals.topk_logprobs is not None, "this objective needs the teacher's log-probabilities of a support"
        self._ids_CK, self._mask_CK = signals.topk_ids, signals.topk_mask
        log_q_CK = signals.topk_logprobs.to(student.p.dtype).clamp(min=MIN_LOG_Q)
        log_p_CK = student.log_p.gather(1, self._ids_CK)
        if self._mask_CK is not None:
            log_p_CK = log_p_CK.masked_fill(~self._mask_CK, -torch.inf)
            log_q_CK = log_q_CK.masked_fill(~self._mask_CK, -torch.inf)
        self.p_CK, self.q_CK = log_p_CK.exp(), log_q_CK.exp()
        self.difference_CK = self._without_empty(log_p_CK - log_q_CK)
        log_tail_p_C, log_tail_q_C = _log_tail(log_p_CK), _log_tail(log_q_CK)
        self.tail_p_C, self.tail_q_C = log_tail_p_C.exp(), log_tail_q_C.exp()
        self.tail_difference_C = log_tail_p_C - log_tail_q_C

    def reverse_kl(self) -> Tensor:
        """[C] KL(student || teacher) over the buckets: at most that over the vocabulary."""
        return torch.linalg.vecdot(self.p_CK, self.difference_CK) + self.tail_p_C * self.tail_difference_C

    def mean_advantage(self, clip: float | None) -> Tensor:
        """[C] mean of log q - log p, clipped to +-`clip`, over the student's next token; the tail counts as one."""
        if clip is None:
            return -self.reverse_kl()
        inside_C = torch.linalg.vecdot(self.p_CK, self.difference_CK.clamp(-clip, clip))
        return -inside_C - self.tail_p_C * self.tail_difference_C.clamp(-clip, clip)

    def put(self, grad_CV: Tensor, inside_CK: Tensor) -> None:
        """Write values for the support's tokens into `grad`; what the ids of empty places say is left alone."""
        if self._mask_CK is None:
            grad_CV.scatter_(1, self._ids_CK, inside_CK)
            return
        # an empty place may hold the id of a taken one: first clear the taken ones, then add, where empty places add 0
        grad_CV.scatter_reduce_(1, self._ids_CK, (~self._mask_CK).to(grad_CV.dtype), "prod")
        grad_CV.scatter_add_(1, self._ids_CK, self._without_empty(inside_CK))

    def _without_empty(self, values_CK: Tensor) -> Tensor:
        return values_CK if self._mask_CK is None else values_CK.masked_fill(~self._mask_CK, 0)


def _log_tail(logs_CK: Tensor) -> Tensor:
    """[C] log(1 - sum exp(logs)), without the cancellation of the plain difference.

    A support that holds everything has an empty tail, up to rounding (1e-7 in float32): that is the floor, or what a
    forbidden token counts, if that is more.
    """
    floor = max(torch.finfo(logs_CK.dtype).eps, math.exp(MIN_LOG_Q))
    inside_C = torch.logsumexp(logs_CK, dim=-1)
    return torch.log(-torch.expm1(inside_C.clamp(max=-floor)))
