"""Divergences on the K tokens that the teacher names at each prefix, in the two forms that are right.

S is the support (K ids of a row), p and q are full-vocabulary probabilities, t_p = 1 - p(S) and t_q = 1 - q(S).

    correction     forward, teacher to student             reverse, student to teacher
    generalised    sum_S q log(q / p) - q + p              sum_S p log(p / q) - p + q
    tail           the same over K + 1 buckets, the last of which holds all tokens outside S:
                   sum_S q log(q / p) + t_q log(t_q / t_p) sum_S p log(p / q) + t_p log(t_p / t_q)

Both are 0 with gradient 0 where p = q on S, and bring the mass p(S) to q(S). Simply dropping the terms outside S is not
offered: sum_S q log(q / p) drives all mass into S, sum_S p log(p / q) drives mass out of it, also at p = q, and
renormalising over S leaves p(S) free (docs/objectives.md has the numbers).

Source: closed forms derived here, checked against autograd in tests/unit/test_objectives_topk.py; the generalised form
is that of MOPD (arXiv:2606.30406).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stillhouse.trainer.objectives.base import ChunkLoss, Signals, StudentChunk

MIN_LOG_Q = -30.0
"""Teacher log-probabilities below it count as this much (1e-13): a token that the teacher forbids outright (-inf) would
make every reverse divergence infinite."""


@dataclass(frozen=True)
class TopK:
    """A corrected top-k divergence; see the module's text. `reverse_kl` is the tail form's value, a lower bound."""

    direction: Literal["forward", "reverse"]
    correction: Literal["generalised", "tail"]

    def __call__(self, student: StudentChunk, signals: Signals, temperature: float) -> ChunkLoss:
        assert signals.topk_ids is not None, "this objective needs the teacher's top-k"
        assert signals.topk_logprobs is not None, "this objective needs the teacher's top-k"
        ids_CK = signals.topk_ids
        log_q_CK = signals.topk_logprobs.to(student.p.dtype).clamp(min=MIN_LOG_Q)
        log_p_CK = student.log_p.gather(1, ids_CK)
        support = _Support(ids_CK, log_p_CK, log_q_CK)
        value_C, inside_CK, outside_C = self._slopes(support)
        # grad_j = p_j (slope_j - mean slope), where every token outside S has the same slope
        mean_C = torch.linalg.vecdot(support.p_CK, inside_CK) + support.tail_p_C * outside_C
        grad_CV = student.p.mul_((outside_C - mean_C)[:, None])
        inside = support.p_CK * (inside_CK - mean_C[:, None])
        return ChunkLoss(value_C, grad_CV.scatter_(1, ids_CK, inside), support.reverse_kl())

    def _slopes(self, s: _Support) -> tuple[Tensor, Tensor, Tensor]:
        """([C] value, [C, K] its derivative with respect to each p on S, [C] to each p outside; up to a constant)."""
        difference_CK = s.log_p_CK - s.log_q_CK
        tail_difference_C = s.log_tail_p_C - s.log_tail_q_C
        mass_C = (s.p_CK - s.q_CK).sum(-1)
        nothing_C = torch.zeros_like(mass_C)
        if self.direction == "forward":
            value_C, slope_CK = -torch.linalg.vecdot(s.q_CK, difference_CK), -(-difference_CK).exp()
            if self.correction == "tail":
                return value_C - s.tail_q_C * tail_difference_C, slope_CK, -(-tail_difference_C).exp()
            return value_C + mass_C, slope_CK + 1, nothing_C
        value_C = torch.linalg.vecdot(s.p_CK, difference_CK)
        if self.correction == "tail":
            return value_C + s.tail_p_C * tail_difference_C, difference_CK, tail_difference_C
        # the derivative of - p cancels the 1 in that of p log p
        return value_C - mass_C, difference_CK, nothing_C


class _Support:
    """Both models on the K ids of each row and the mass outside them."""

    def __init__(self, ids_CK: Tensor, log_p_CK: Tensor, log_q_CK: Tensor) -> None:
        self.log_p_CK, self.log_q_CK = log_p_CK, log_q_CK
        self.p_CK, self.q_CK = log_p_CK.exp(), log_q_CK.exp()
        self.log_tail_p_C, self.log_tail_q_C = _log_tail(log_p_CK), _log_tail(log_q_CK)
        self.tail_p_C, self.tail_q_C = self.log_tail_p_C.exp(), self.log_tail_q_C.exp()

    def reverse_kl(self) -> Tensor:
        """[C] KL(student || teacher) over K + 1 buckets: at most that over the vocabulary."""
        inside_C = torch.linalg.vecdot(self.p_CK, self.log_p_CK - self.log_q_CK)
        return inside_C + self.tail_p_C * (self.log_tail_p_C - self.log_tail_q_C)


def _log_tail(logs_CK: Tensor) -> Tensor:
    """[C] log(1 - sum exp(logs)), without the cancellation of the plain difference.

    What is left of rounding (1e-7 in float32) is the floor: a support that holds everything has an empty tail.
    """
    floor = torch.finfo(logs_CK.dtype).eps
    inside_C = torch.logsumexp(logs_CK, dim=-1)
    return torch.log(-torch.expm1(inside_C.clamp(max=-floor)))
