"""Objectives on the sampled token alone: 4 bytes of teacher signal a token, more with a baseline.

With y the sampled token, p the student under the current weights, mu the policy that sampled y (its
`rollout_logprobs`), q the teacher, O the completion's outcome advantage (outcome.py), and sg[x] = x held fixed:

    advantage   L = -w A log p(y),  A = sg[teacher_weight (a - b) + reward_weight O],
                a = clip(log q(y) - log s(y)),  s = p or mu,  w = sg[gate(p(y) / mu(y))]
    k2          L = w teacher_weight (log p(y) - log q(y))^2 / 2

On samples of p itself, without clip and reward, the gradient of both is on average that of KL(p || q), the reverse KL.
The clip, the gate and the student's term s are three separate choices. The outcome is normalised before it is added,
once at every token: neither clip nor discount touches it.

The baseline b is the mean of clip(log q(v) - log p(v)) over v drawn from p, hence -KL(p || q) without clip (vOPD,
arXiv:2605.07865). It is subtracted after the clip, because then it does not depend on y: sum_y p(y) b grad log p(y) is
0, so it changes no mean, with a clip or without, approximate (over k tokens and a tail) or exact; it changes only the
variance. It is the mean of the clipped advantage and not -KL, because the KL of a bad student may lie far above the
clip, and would make every advantage positive. On stale samples it leaves the mean alone only with the gate `is`.

Of a teacher with another tokenizer only the log-probabilities of spans of text are known (`spans`; the spans of a
completion are what `Signals.span` tells apart). Then a token's log-ratios are those of its whole span,

    a = clip(log q(span) - log s(span)),  w = sg[gate(p(span) / mu(span))],  log p(span) = sum of log p of its tokens

and on average the gradient is that of the reverse KL between what student and teacher write next, as text
(docs/cross-tokenizer.md says under which assumptions).

Two that look alike train something else and are not offered (arXiv:2506.09477, arXiv:2512.21852): differentiating
log p - log q itself (k1) has zero gradient on average; differentiating r - 1 - log r with r = q / p (k3) has that of
the forward KL.

Sources: Thinking Machines, "On-Policy Distillation" (2025); MiMo-V2-Flash (arXiv:2601.02780) for gates and the added
outcome; GLM-5 (arXiv:2602.15763) for gates; return-to-go as in MiniLLM (arXiv:2306.08543).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from stillhouse.trainer.batch import MIN_LOG_Q
from stillhouse.trainer.objectives.base import ChunkLoss, Signals, StudentChunk
from stillhouse.trainer.objectives.topk import Buckets

GateKind = Literal["none", "is", "tis", "icepop", "seq_mask"]


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

    def __call__(self, log_ratio_R: Tensor, signals: Signals) -> Tensor:
        """[R] weights, from log rho."""
        ratio_R = log_ratio_R.exp()
        match self.kind:
            case "none":
                return torch.ones_like(ratio_R)
            case "is":
                return ratio_R
            case "tis":
                return ratio_R.clamp(self.low, self.high)
            case "icepop":
                return self._inside(ratio_R, ratio_R)
            case "seq_mask":
                return self._inside(ratio_R, _mean_of_sequence(log_ratio_R, _sequence(signals)).exp())

    def _inside(self, ratio_R: Tensor, judged_R: Tensor) -> Tensor:
        # not a product: the ratio outside may be infinite
        return torch.where((judged_R >= self.low) & (judged_R <= self.high), ratio_R, 0)


class _Teacher(NamedTuple):
    """What the teacher's payload says about C rows."""

    log_q: Tensor
    """[C] of the sampled tokens."""
    baseline: Tensor | float
    """[C] b of the module's text."""
    reverse_kl: Tensor
    """[C]."""


@dataclass(frozen=True)
class PolicyGradient:
    """Reverse KL at the sampled token, and outcome rewards; see the module's text.

    `reverse_kl` is as good as the payload: exact with `baseline` full_vocabulary, over k + 1 buckets (a lower bound)
    with top_k, else the one-sample estimate log p - log q; NaN without a teacher.
    """

    advantage_clip: float | None = None
    """Bound of |log q - log s| of each token, nats."""
    student_term: Literal["trainer", "sampler"] = "trainer"
    """s: the current weights, or those that sampled."""
    gate: RatioGate = RatioGate()
    discount: float = 0.0
    """0: each token answers for itself. Else a_t becomes sum_{i >= t} discount^(i - t) a_i."""
    estimator: Literal["advantage", "k2"] = "advantage"
    baseline: Literal["none", "top_k", "full_vocabulary"] = "none"
    """Over which part of the vocabulary it is known."""
    teacher_weight: float = 1.0
    """0: the outcome alone; no teacher is needed."""
    reward_weight: float = 0.0
    """0: the teacher alone."""
    spans: bool = False
    """Log q is that of spans of text."""

    @property
    def needs_sequences(self) -> bool:
        """The weight of a token depends on the others of its sequence."""
        return self.gate.kind == "seq_mask" or self.discount > 0 or self.spans

    def prepare(self, logprobs_R: Tensor, signals: Signals) -> Signals:
        """The signals with every row's gate, and its return-to-go where asked for; `logprobs` is the student's."""
        gate_R, advantage_R = self._gate(logprobs_R, signals), None
        if self.spans:
            return replace(signals, gate=gate_R, **self._of_spans(logprobs_R, signals))
        if self.discount > 0 and self.teacher_weight > 0:
            own_R = self._own_advantage(logprobs_R, _wire_log_q(signals, logprobs_R), signals)
            advantage_R = _return_to_go(own_R, _sequence(signals), self.discount)
        return replace(signals, gate=gate_R, advantage=advantage_R)

    def _of_spans(self, log_p_R: Tensor, signals: Signals) -> dict[str, Tensor]:
        """[R] advantage of each row's span, and [R] its log p - log q shared among its rows: means are per token."""
        assert signals.logprobs is not None, "this needs the teacher's log-probabilities of spans"
        log_q_R, span_R = signals.logprobs.to(log_p_R.dtype), _span(signals)
        log_s_R = log_p_R if self.student_term == "trainer" else _log_mu(log_p_R, signals)[0]
        size_R = _sum_within(torch.ones_like(log_p_R), span_R)
        return {
            "advantage": self._clip(log_q_R - _sum_within(log_s_R, span_R)),
            "reverse_kl": (_sum_within(log_p_R, span_R) - log_q_R) / size_R,
        }

    def __call__(self, student: StudentChunk, signals: Signals, temperature: float) -> ChunkLoss:
        log_p_C = student.logprobs
        gate_C = self._gate(log_p_C, signals) if signals.gate is None else signals.gate
        teacher = self._teacher(student, signals, temperature)
        if self.estimator == "k2":
            push_C = self.teacher_weight * gate_C * (teacher.log_q - log_p_C)
            value_C = push_C * (teacher.log_q - log_p_C) / 2
        else:
            push_C = gate_C * self._advantage(log_p_C, teacher, signals)
            value_C = -push_C * log_p_C
        grad_CV = student.p.mul_(push_C[:, None])
        grad_CV.scatter_add_(1, student.ids[:, None], -push_C[:, None])
        return ChunkLoss(value_C, grad_CV, teacher.reverse_kl, gate_C)

    def _advantage(self, log_p_C: Tensor, teacher: _Teacher, signals: Signals) -> Tensor:
        """[C] A of the module's text. What has weight 0 is not read: it may be absent."""
        advantage_C = torch.zeros_like(log_p_C)
        if self.teacher_weight > 0:
            own_C = signals.advantage
            if own_C is None:
                own_C = self._own_advantage(log_p_C, teacher.log_q, signals)
            advantage_C += self.teacher_weight * (own_C - teacher.baseline)
        if self.reward_weight > 0:
            assert signals.outcome is not None, "this needs the completions' outcome advantages"
            advantage_C += self.reward_weight * signals.outcome.to(log_p_C.dtype)
        return advantage_C

    def _own_advantage(self, log_p_R: Tensor, log_q_R: Tensor, signals: Signals) -> Tensor:
        """[R] clipped advantage of each token for itself."""
        log_s_R = log_p_R if self.student_term == "trainer" else _log_mu(log_p_R, signals)[0]
        return self._clip(log_q_R - log_s_R)

    def _clip(self, advantage: Tensor) -> Tensor:
        bound = self.advantage_clip
        return advantage if bound is None else advantage.clamp_(-bound, bound)

    def _gate(self, log_p_R: Tensor, signals: Signals) -> Tensor:
        """[R] gates; 0 at tokens that the student did not sample: the average is over its own samples only."""
        if signals.rollout_logprobs is None:
            assert self.gate.kind == "none", "ratio gates need the sampler's log-probabilities"
            return torch.ones_like(log_p_R)
        log_mu_R, is_own_R = _log_mu(log_p_R, signals)
        log_ratio_R = log_p_R - log_mu_R
        if self.spans:
            log_ratio_R = _sum_within(log_ratio_R, _span(signals))
        return self.gate(log_ratio_R, signals) * is_own_R

    def _teacher(self, student: StudentChunk, signals: Signals, temperature: float) -> _Teacher:
        log_p_C = student.logprobs
        if self.baseline == "full_vocabulary":
            log_q_CV = signals.log_q(temperature).clamp_(min=MIN_LOG_Q)
            log_q_C = log_q_CV.gather(1, student.ids[:, None]).squeeze(1)
            advantage_CV = log_q_CV.sub_(student.log_p)
            reverse_kl_C = -torch.linalg.vecdot(student.p, advantage_CV)
            return _Teacher(log_q_C, torch.linalg.vecdot(student.p, self._clip(advantage_CV)), reverse_kl_C)
        if self.teacher_weight == 0 and signals.logprobs is None:
            nothing_C = torch.full_like(log_p_C, torch.nan)
            return _Teacher(nothing_C, 0.0, nothing_C)
        log_q_C = _wire_log_q(signals, log_p_C)
        if self.spans:
            assert signals.reverse_kl is not None, "prepare() came first"
            return _Teacher(log_q_C, 0.0, signals.reverse_kl)
        if self.baseline == "top_k":
            buckets = Buckets(student, signals)
            return _Teacher(log_q_C, buckets.mean_advantage(self.advantage_clip), buckets.reverse_kl())
        return _Teacher(log_q_C, 0.0, log_p_C - log_q_C)


def _wire_log_q(signals: Signals, like: Tensor) -> Tensor:
    """[R] log q of the sampled tokens as the teacher sent it, never below MIN_LOG_Q."""
    assert signals.logprobs is not None, "the policy gradient needs the teacher's log-probabilities"
    return signals.logprobs.to(like.dtype).clamp(min=MIN_LOG_Q)


def _log_mu(log_p_R: Tensor, signals: Signals) -> tuple[Tensor, Tensor]:
    """([R] log mu, log p where the student did not sample the token, [R] bool where it did)."""
    assert signals.rollout_logprobs is not None, "student_term 'sampler' needs the sampler's log-probabilities"
    log_mu_R = signals.rollout_logprobs.to(log_p_R.dtype)
    is_own_R = ~torch.isnan(log_mu_R)
    return torch.where(is_own_R, log_mu_R, log_p_R), is_own_R


def _sequence(signals: Signals) -> Tensor:
    assert signals.sample is not None, "this needs to know which rows belong to the same sequence"
    return signals.sample


def _span(signals: Signals) -> Tensor:
    assert signals.span is not None, "this needs to know which rows belong to the same span of text"
    return signals.span


def _mean_of_sequence(values_R: Tensor, sample_R: Tensor) -> Tensor:
    """[R] mean of `values` over the rows of the same sequence."""
    return _sum_within(values_R, sample_R) / _sum_within(torch.ones_like(values_R), sample_R)


def _sum_within(values_R: Tensor, name_R: Tensor) -> Tensor:
    """[R] sum of `values` over the rows of the same name."""
    names, place_R = name_R.unique(return_inverse=True)
    return values_R.new_zeros(len(names)).index_add_(0, place_R, values_R)[place_R]


def _return_to_go(values_R: Tensor, sample_R: Tensor, discount: float) -> Tensor:
    """[R] sum_{i >= t} discount^(i - t) values_i within each sequence; its rows are neighbours, in order."""
    returns_R, reach = values_R.clone(), 1
    # returns hold the first `reach` terms: adding those `reach` rows ahead doubles them
    while reach < len(returns_R) and bool((is_same := sample_R[:-reach] == sample_R[reach:]).any()):
        returns_R[:-reach] += torch.where(is_same, discount**reach * returns_R[reach:], 0)
        reach *= 2
    return returns_R
