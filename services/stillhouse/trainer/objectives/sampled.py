"""Objectives on the sampled token alone: 4 bytes of teacher signal a token.

With y the sampled token, p the student under the current weights, mu the policy that sampled y (its
`rollout_logprobs`), q the teacher, and sg[x] = x held fixed:

    advantage   L = -w A log p(y),  A = sg[clip(log q(y) - log s(y))],  s = p or mu,  w = sg[gate(p(y) / mu(y))]
    k2          L = w (log p(y) - log q(y))^2 / 2

On samples of p itself and without clip, the gradient of both is on average that of KL(p || q), the reverse KL. The
clip, the gate and the student's term s are three separate choices.

Two that look alike train something else and are not offered (arXiv:2506.09477, arXiv:2512.21852): differentiating
log p - log q itself (k1) has zero gradient on average; differentiating r - 1 - log r with r = q / p (k3) has that of
the forward KL.

Sources: Thinking Machines, "On-Policy Distillation" (2025); MiMo-V2-Flash (arXiv:2601.02780) and GLM-5
(arXiv:2602.15763) for gates; return-to-go as in MiniLLM (arXiv:2306.08543).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from stillhouse.trainer.objectives.base import ChunkLoss, Signals, StudentChunk

GateKind = Literal["none", "is", "tis", "icepop", "seq_mask"]
SEQUENCE_BAND = (0.999, 1.002)
"""Usual band of `seq_mask`: geometric means of whole sequences lie close to 1."""


@dataclass(frozen=True)
class RatioGate:
    """Weight of a token whose weights have moved on since it was sampled, by rho = p(y) / mu(y).

    none      1
    is        rho                                            unbiased, any variance
    tis       rho, clamped to [low, high]
    icepop    rho inside [low, high], else 0
    seq_mask  rho; 0 for all tokens of a sequence whose geometric mean of rho is outside [low, high]
    """

    kind: GateKind = "none"
    low: float = 0.5
    high: float = 2.0

    def __call__(self, log_ratio_R: Tensor, sample_R: Tensor) -> Tensor:
        """[R] weights; `sample_R` says which rows belong to the same sequence."""
        ratio_R = log_ratio_R.exp()
        match self.kind:
            case "none":
                return torch.ones_like(ratio_R)
            case "is":
                return ratio_R
            case "tis":
                return ratio_R.clamp(self.low, self.high)
            case "icepop":
                return ratio_R * ((ratio_R >= self.low) & (ratio_R <= self.high))
            case "seq_mask":
                mean_R = _mean_of_sequence(log_ratio_R, sample_R).exp()
                return ratio_R * ((mean_R >= self.low) & (mean_R <= self.high))


@dataclass(frozen=True)
class PolicyGradient:
    """Reverse KL at the sampled token; see the module's text. `reverse_kl` is the one-sample estimate log p - log q."""

    advantage_clip: float | None = None
    """Bound of |A| of each token, nats."""
    student_term: Literal["trainer", "sampler"] = "trainer"
    """s: the current weights, or those that sampled."""
    gate: RatioGate = RatioGate()
    discount: float = 0.0
    """0: each token answers for itself. Else A_t = sum_{i >= t} discount^(i - t) a_i, a_i the clipped advantages."""
    estimator: Literal["advantage", "k2"] = "advantage"

    @property
    def needs_sequences(self) -> bool:
        """The weight of a token depends on the others of its sequence."""
        return self.gate.kind == "seq_mask" or self.discount > 0

    def prepare(self, logprobs_R: Tensor, signals: Signals) -> Signals:
        """The signals with gate and advantage of every row, given the student's log p of all of them."""
        gate_R, advantage_R = self._terms(logprobs_R, signals)
        if self.discount > 0:
            advantage_R = _return_to_go(advantage_R, _sequence(signals), self.discount)
        return replace(signals, gate=gate_R, advantage=advantage_R)

    def __call__(self, student: StudentChunk, signals: Signals, temperature: float) -> ChunkLoss:
        assert signals.logprobs is not None, "the policy gradient needs the teacher's log-probabilities"
        log_p_C = student.logprobs
        log_ratio_C = signals.logprobs.to(log_p_C.dtype) - log_p_C
        if signals.gate is not None and signals.advantage is not None:
            gate_C, advantage_C = signals.gate, signals.advantage
        else:
            gate_C, advantage_C = self._terms(log_p_C, signals)
        if self.estimator == "k2":
            push_C, value_C = gate_C * log_ratio_C, gate_C * log_ratio_C.square() / 2
        else:
            push_C, value_C = gate_C * advantage_C, -gate_C * advantage_C * log_p_C
        grad_CV = student.p.mul_(push_C[:, None])
        grad_CV.scatter_add_(1, student.ids[:, None], -push_C[:, None])
        return ChunkLoss(value_C, grad_CV, -log_ratio_C, gate_C)

    def _terms(self, log_p_R: Tensor, signals: Signals) -> tuple[Tensor, Tensor]:
        """([R] gate, [R] clipped advantage of each token for itself)."""
        assert signals.logprobs is not None, "the policy gradient needs the teacher's log-probabilities"
        log_q_R = signals.logprobs.to(log_p_R.dtype)
        if self.gate.kind == "none" and self.student_term == "trainer":
            gate_R, log_s_R = torch.ones_like(log_p_R), log_p_R
        else:
            assert signals.rollout_logprobs is not None, "ratio gates need the sampler's log-probabilities"
            log_mu_R = signals.rollout_logprobs.to(log_p_R.dtype)
            gate_R = self.gate(log_p_R - log_mu_R, _sequence(signals))
            log_s_R = log_p_R if self.student_term == "trainer" else log_mu_R
        advantage_R = log_q_R - log_s_R
        if self.advantage_clip is not None:
            advantage_R = advantage_R.clamp(-self.advantage_clip, self.advantage_clip)
        return gate_R, advantage_R


def _sequence(signals: Signals) -> Tensor:
    assert signals.sample is not None, "this needs to know which rows belong to the same sequence"
    return signals.sample


def _mean_of_sequence(values_R: Tensor, sample_R: Tensor) -> Tensor:
    """[R] mean of `values` over the rows of the same sequence."""
    names, place_R = sample_R.unique(return_inverse=True)
    sums = values_R.new_zeros(len(names)).index_add_(0, place_R, values_R)
    counts = values_R.new_zeros(len(names)).index_add_(0, place_R, torch.ones_like(values_R))
    return (sums / counts)[place_R]


def _return_to_go(values_R: Tensor, sample_R: Tensor, discount: float) -> Tensor:
    """[R] sum_{i >= t} discount^(i - t) values_i within each sequence; its rows are neighbours, in order."""
    returns_R = values_R.clone()
    is_next_same = sample_R[:-1] == sample_R[1:]
    for row in range(len(returns_R) - 2, -1, -1):
        if is_next_same[row]:
            returns_R[row] += discount * returns_R[row + 1]
    return returns_R
