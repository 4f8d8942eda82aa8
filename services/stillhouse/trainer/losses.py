"""The kernel: the head and an objective over packed completion rows, with closed-form gradients in chunks.

One `autograd.Function` applies the student's head, takes an objective's loss and its gradient with respect to the
logits chunk by chunk, and keeps only the gradients of hidden rows and head: [rows, V] of a batch never exists, and
backward is a multiplication. A new objective is one class with one method (objectives/base.py).

Letters: R rows (trained completion tokens of a micro-batch), C rows of a chunk, V vocabulary, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stillhouse.core.spec import CrossEntropyLoss, FullVocabularyLoss, LossSpec, PolicyGradientLoss, TopKLoss
from stillhouse.trainer.objectives.base import Head, Objective, SequenceObjective, Signals, StudentChunk
from stillhouse.trainer.objectives.cross_entropy import CrossEntropy
from stillhouse.trainer.objectives.full_vocabulary import (
    K2,
    EntropyMix,
    ForwardKL,
    GeneralisedJSD,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
)
from stillhouse.trainer.objectives.sampled import PolicyGradient, RatioGate
from stillhouse.trainer.objectives.topk import TopK

CHUNK_ROWS = 512
"""Rows whose logits exist at once: the weight gradient is read and written once per chunk, which below 256 rows costs
more than the products themselves; 512 rows of a vocabulary of 49,152 are 100 MB in float32."""


def make_objective(spec: LossSpec) -> Objective:
    """The objective that a stage asks for."""
    match spec:
        case PolicyGradientLoss():
            return _policy_gradient(spec)
        case TopKLoss():
            return TopK("reverse" if spec.divergence == "reverse_kl" else "forward", spec.correction)
        case FullVocabularyLoss():
            return _divergence(spec)
        case CrossEntropyLoss():
            return CrossEntropy()


def _policy_gradient(spec: PolicyGradientLoss) -> Objective:
    return PolicyGradient(
        advantage_clip=spec.advantage_clip,
        student_term=spec.student_term,
        gate=RatioGate(spec.ratio_gate, *spec.band()),
        discount=spec.discount,
        estimator=spec.estimator,
        baseline=spec.baseline,
        teacher_weight=spec.teacher_weight,
        reward_weight=0.0 if spec.reward is None else spec.reward.weight,
    )


def _divergence(spec: FullVocabularyLoss) -> Objective:
    match spec.divergence:
        case "reverse_kl":
            return ReverseKL()
        case "forward_kl":
            return ForwardKL()
        case "jsd":
            return GeneralisedJSD(spec.beta, spec.beta_rescale)
        case "skew_forward_kl":
            return SkewForwardKL(spec.alpha)
        case "skew_reverse_kl":
            return SkewReverseKL(spec.alpha)
        case "entropy_mix":
            return EntropyMix(spec.entropy_threshold, spec.forward_weight)
        case "k2":
            return K2()


@dataclass(frozen=True, eq=False)
class PackedLoss:
    """Loss of R rows and what was measured on the way; only `loss` carries a gradient."""

    loss: Tensor
    """[] weighted sum over rows."""
    values: Tensor
    """[R] loss of each row, without its weight."""
    reverse_kl: Tensor
    """[R] KL(student || teacher), exact for the full objectives, one-sample estimate for the policy gradient."""
    logprobs: Tensor
    """[R] `student_logprobs` of the sampled tokens."""
    entropy: Tensor
    """[R] entropy of the student."""
    gate: Tensor
    """[R] weight that the objective gave each row: 1 without a ratio gate."""


def packed_loss(
    objective: Objective,
    hidden: Tensor,
    head: Head,
    ids: Tensor,
    weights: Tensor,
    signals: Signals,
    temperature: float = 1.0,
) -> PackedLoss:
    """sum_r weights[r] * loss of row r, for hidden [R, D], ids [R] and weights [R]; gradients reach hidden and head."""
    if isinstance(objective, SequenceObjective) and objective.needs_sequences:
        signals = objective.prepare(sampled_logprobs(hidden, head, ids, temperature), signals)
    call = _Call(objective, head.scale, head.soft_cap, ids, weights, signals, temperature)
    loss, measures = _HeadLoss.apply(hidden, head.weight, head.bias, call)  # type: ignore[misc]
    return PackedLoss(loss, *measures.unbind(0))


@torch.no_grad()
def sampled_logprobs(hidden: Tensor, head: Head, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """[R] log p of the sampled tokens, in float32 at least, without gradients."""
    logprobs = []
    for start in range(0, hidden.shape[0], CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        logprobs.append(head.log_probs(hidden[rows], temperature).gather(1, ids[rows, None]).squeeze(1))
    return torch.cat(logprobs)


@torch.no_grad()
def exact_reverse_kl(hidden: Tensor, head: Head, signals: Signals, temperature: float = 1.0) -> Tensor:
    """[R] KL(student || teacher) over the whole vocabulary, in float32 at least, without gradients."""
    kls = []
    for start in range(0, hidden.shape[0], CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        log_p_CV = head.log_probs(hidden[rows], temperature)
        difference_CV = log_p_CV - signals[rows].log_q(temperature)
        kls.append(torch.linalg.vecdot(log_p_CV.exp_(), difference_CV))
    return torch.cat(kls) if kls else hidden.new_zeros(0, dtype=torch.float32)


@dataclass(frozen=True, eq=False)
class _Call:
    """The arguments of `_HeadLoss` that get no gradient."""

    objective: Objective
    scale: float
    soft_cap: float
    ids: Tensor
    weights: Tensor
    signals: Signals
    temperature: float


class _HeadLoss(torch.autograd.Function):
    """(hidden [R, D], weight [V, D], bias [V] | None) -> (loss [], measures [5, R]); gradients made in forward."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: _Call) -> tuple[Tensor, Tensor]:
        head = Head(weight, bias, call.scale, call.soft_cap)
        precise = torch.promote_types(weight.dtype, torch.float32)
        row_weights = call.weights.to(precise)
        measures = torch.empty(5, hidden.shape[0], dtype=precise, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=precise)
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=precise)
        for start in range(0, hidden.shape[0], CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            grad_CV = _chunk(head, hidden[rows], call, rows, measures[:, rows])
            if not row_weights[rows].any():
                continue
            grad_CV.mul_(row_weights[rows, None])
            grad_hidden[rows] = grad_CV.to(weight.dtype) @ weight
            _add_product(grad_weight, grad_CV, hidden[rows])
            if grad_bias is not None:
                grad_bias += grad_CV.sum(0)
        ctx.grads = (
            grad_hidden,
            grad_weight.to(weight.dtype),
            None if bias is None or grad_bias is None else grad_bias.to(bias.dtype),
        )
        ctx.mark_non_differentiable(measures)
        return torch.dot(measures[0], row_weights), measures

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss: Tensor, _: Tensor):  # type: ignore[override]
        grads = ctx.grads
        if grad_loss != 1:  # the usual case is loss.backward(): spare a copy of the head
            grads = tuple(None if grad is None else grad * grad_loss for grad in grads)
        return *grads, None


def _chunk(head: Head, hidden_CD: Tensor, call: _Call, rows: slice, measures_5C: Tensor) -> Tensor:
    """[C, V] gradient with respect to hidden @ weight.T + bias; fills in the measures."""
    logits_CV = head.logits(hidden_CD)
    # d(cap * tanh(x / cap)) / dx = 1 - (capped / cap)^2
    slope_CV = 1 - (logits_CV / head.soft_cap).square_() if head.soft_cap else None
    log_p_CV = logits_CV.div_(call.temperature)
    log_p_CV.sub_(torch.logsumexp(log_p_CV, dim=-1, keepdim=True))
    p_CV = log_p_CV.exp()
    ids_C = call.ids[rows]
    logprobs_C = log_p_CV.gather(1, ids_C[:, None]).squeeze(1)
    measures_5C[2] = logprobs_C
    measures_5C[3] = -torch.linalg.vecdot(p_CV, log_p_CV)
    result = call.objective(StudentChunk(log_p_CV, p_CV, ids_C, logprobs_C), call.signals[rows], call.temperature)
    measures_5C[0] = result.value
    measures_5C[1] = result.reverse_kl
    measures_5C[4] = 1.0 if result.gate is None else result.gate
    factor = head.scale / call.temperature
    grad_CV = result.grad if factor == 1 else result.grad.mul_(factor)
    return grad_CV if slope_CV is None else grad_CV.mul_(slope_CV)


def _add_product(total_VD: Tensor, grad_CV: Tensor, hidden_CD: Tensor) -> None:
    """total += grad.T @ hidden; the product in the model's type, the sum over chunks in float32."""
    if hidden_CD.dtype == total_VD.dtype:
        total_VD.addmm_(grad_CV.T, hidden_CD)
    else:
        total_VD.add_(grad_CV.to(hidden_CD.dtype).T @ hidden_CD)
