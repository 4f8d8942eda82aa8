"""What every loss is, written from its definition: slow, obvious, in probability space, float64, on whole [R, V].

Autograd of these is the oracle of every closed-form gradient. They know nothing of chunks, log-softmax or in-place
buffers, and read a job's loss (`LossSpec`) themselves, so they also check how a spec becomes an objective.

Letters: R rows, V vocabulary, K places of the support.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from stillhouse.core.spec import CrossEntropyLoss, FullVocabularyLoss, PolicyGradientLoss, TopKLoss
from stillhouse.trainer.objectives.base import Head

FORBIDDEN = math.exp(-30)
"""A token's probability that the teacher sent counts as this much at least, and so does the mass outside a support."""


def probabilities(hidden: Tensor, head: Head, temperature: float) -> Tensor:
    """[R, V] softmax of the head's logits."""
    logits = hidden @ head.weight.T
    if head.bias is not None:
        logits = logits + head.bias
    logits = logits * head.scale
    if head.soft_cap:
        logits = head.soft_cap * torch.tanh(logits / head.soft_cap)
    unnormalised = (logits / temperature).exp()
    return unnormalised / unnormalised.sum(-1, keepdim=True)


def kl(a: Tensor, b: Tensor) -> Tensor:
    """[...] KL(a || b) over the last axis, with 0 log 0 = 0."""
    return torch.where(a > 0, a * (a / b).log(), torch.zeros_like(a)).sum(-1)


def jsd(p: Tensor, q: Tensor, beta: float) -> Tensor:
    mixture = beta * q + (1 - beta) * p
    return beta * kl(q, mixture) + (1 - beta) * kl(p, mixture)


def entropy(p: Tensor) -> Tensor:
    return -(p * p.log()).sum(-1)


def at(values: Tensor, ids: Tensor) -> Tensor:
    """[R] values[r, ids[r]]."""
    return values[torch.arange(len(ids)), ids]


def full_vocabulary(spec: FullVocabularyLoss, p: Tensor, q: Tensor, ids: Tensor) -> Tensor:
    """[R]."""
    match spec.divergence:
        case "reverse_kl":
            return kl(p, q)
        case "forward_kl":
            return kl(q, p)
        case "jsd":
            return jsd(p, q, spec.beta) / (spec.beta * (1 - spec.beta) if spec.beta_rescale else 1)
        case "skew_forward_kl":
            return kl(q, spec.alpha * q + (1 - spec.alpha) * p)
        case "skew_reverse_kl":
            return kl(p, (1 - spec.alpha) * q + spec.alpha * p)
        case "entropy_mix":
            return kl(p, q) + spec.forward_weight * (entropy(q) > spec.entropy_threshold) * kl(q, p)
        case "k2":
            return (at(p, ids) / at(q, ids)).log().square() / 2


def allowed(values: Tensor) -> Tensor:
    """What is forbidden (0) counts as next to impossible."""
    return torch.where(values > 0, values, torch.full_like(values, FORBIDDEN))


def buckets(values: Tensor, support: Tensor) -> Tensor:
    """[R, V + 1] probabilities of each token of the support (0 at the others), and of all others together."""
    nothing = torch.zeros_like(values)
    outside = torch.where(support, nothing, values).sum(-1, keepdim=True)
    return torch.cat([torch.where(support, allowed(values), nothing), outside.clamp(min=FORBIDDEN)], dim=-1)


def top_k(spec: TopKLoss, p: Tensor, q: Tensor, support: Tensor) -> Tensor:
    """[R]; `support` [R, V] says which tokens are in it."""
    a, b = (q, p) if spec.divergence == "forward_kl" else (p, q)
    if spec.correction == "tail":
        return kl(buckets(a, support), buckets(b, support))
    a, b = allowed(a), allowed(b)
    return torch.where(support, a * (a / b).log() - a + b, torch.zeros_like(a)).sum(-1)


def gates(spec: PolicyGradientLoss, rho: list[float]) -> list[float]:
    """Weights of the tokens of one sequence, from their ratios p / mu."""
    low, high = spec.band()
    mean = math.prod(rho) ** (1 / len(rho))
    match spec.ratio_gate:
        case "none":
            return [1.0 for _ in rho]
        case "is":
            return rho
        case "tis":
            return [min(max(r, low), high) for r in rho]
        case "icepop":
            return [r if low <= r <= high else 0.0 for r in rho]
        case "seq_mask":
            return [r if low <= mean <= high else 0.0 for r in rho]


def clipped(spec: PolicyGradientLoss, advantage: Tensor) -> Tensor:
    return advantage if spec.advantage_clip is None else advantage.clamp(-spec.advantage_clip, spec.advantage_clip)


def of_spans(case: Any, values: Tensor) -> list[float]:
    """[R] sum over the row's span of text, in plain loops."""
    spans = case.span.tolist()
    return [sum(v for v, other in zip(values.tolist(), spans, strict=True) if other == own) for own in spans]


def gate_of_rows(spec: PolicyGradientLoss, case: Any) -> Tensor:
    """[R] in plain loops over the sequences."""
    rho = (at(case.p(), case.ids) / case.log_mu.exp()).tolist()
    if spec.cross_tokenizer:
        rho = [math.exp(total) for total in of_spans(case, torch.tensor(rho, dtype=torch.float64).log())]
    weights: list[float] = []
    for length in case.lengths:
        weights += gates(spec, rho[len(weights) : len(weights) + length])
    return torch.tensor(weights, dtype=torch.float64)


def returns(spec: PolicyGradientLoss, own: list[float], lengths: list[int]) -> Tensor:
    """[R] discounted sums of what comes, in plain loops over the sequences."""
    totals: list[float] = []
    for length in lengths:
        start = len(totals)
        for t in range(length):
            totals.append(sum(spec.discount ** (i - t) * own[start + i] for i in range(t, length)))
    return torch.tensor(totals, dtype=torch.float64)


def mean_advantage(spec: PolicyGradientLoss, case: Any) -> Tensor:
    """[R] the baseline: mean of the clipped advantage over the next token."""
    p = case.p().detach()
    match spec.baseline:
        case "none":
            return torch.zeros(len(case.ids), dtype=torch.float64)
        case "full_vocabulary":
            a, b = p, case.q()
        case "top_k":
            a, b = buckets(p, case.support(spec)), buckets(case.sent_q(), case.support(spec))
    ratio = torch.where(a > 0, (b / a).log(), torch.zeros_like(a))
    return (a * clipped(spec, ratio)).sum(-1)


def policy_gradient(spec: PolicyGradientLoss, case: Any) -> Tensor:
    """[R]."""
    log_p, gate = at(case.p(), case.ids).log(), gate_of_rows(spec, case)
    advantage = torch.zeros_like(gate)
    if spec.teacher_weight > 0:
        log_q = at(case.q() if spec.payload() == "hidden" else allowed(case.sent_q()), case.ids).log()
        if spec.estimator == "k2":
            return spec.teacher_weight * gate * (log_p - log_q).square() / 2
        log_s = log_p.detach() if spec.student_term == "trainer" else case.log_mu
        log_ratio = log_q - log_s
        if spec.cross_tokenizer:
            log_ratio = torch.tensor(of_spans(case, log_ratio), dtype=torch.float64)
        own = returns(spec, clipped(spec, log_ratio).tolist(), case.lengths)
        advantage = advantage + spec.teacher_weight * (own - mean_advantage(spec, case))
    if spec.reward is not None:
        advantage = advantage + spec.reward.weight * case.outcome
    return -gate * advantage * log_p


def loss_of_rows(spec: Any, case: Any) -> Tensor:
    """[R] loss of each row of a case, differentiable in the student's leaves."""
    match spec:
        case FullVocabularyLoss():
            return full_vocabulary(spec, case.p(), case.q(), case.ids)
        case TopKLoss():
            return top_k(spec, case.p(), case.sent_q(), case.support(spec))
        case PolicyGradientLoss():
            return policy_gradient(spec, case)
        case CrossEntropyLoss():
            return -at(case.p(), case.ids).log()
    raise AssertionError(f"no definition of {spec}")


def reverse_kl_of_rows(spec: Any, case: Any) -> Tensor:
    """[R] KL(student || teacher), as well as the payload allows; NaN without a teacher."""
    p = case.p().detach()
    match spec.payload():
        case "none":
            return torch.full((len(p),), torch.nan, dtype=torch.float64)
        case "spans":
            ratios = (at(p, case.ids) / at(allowed(case.sent_q()), case.ids)).log()
            sizes = of_spans(case, torch.ones_like(ratios))
            return torch.tensor(of_spans(case, ratios), dtype=torch.float64) / torch.tensor(sizes)
        case "sampled":
            return (at(p, case.ids) / at(allowed(case.sent_q()), case.ids)).log()
        case "top_k" | "targets":
            support = case.support(spec)
            return kl(buckets(p, support), buckets(case.sent_q(), support))
        case _:
            return kl(p, case.q())
