"""Objectives over packed completion rows, with closed-form gradients in chunks.

One `autograd.Function` applies the student's head, takes an objective's loss and its gradient with respect to the
logits chunk by chunk, and keeps only the gradients of hidden rows and head: [rows, V] of a batch never exists, and
backward is a multiplication. A new objective is one class with one method.

Letters: R rows (trained completion tokens of a micro-batch), C rows of a chunk, V vocabulary, D width.
p is the student's distribution, q the teacher's, both of softmax(logits / temperature). Losses are in nats.

Source: gradients of the divergences as in GKD (arXiv:2306.13649) and MiniLLM (arXiv:2306.08543); they are checked
against autograd and finite differences in tests/unit/test_losses.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from stillhouse.core.spec import FullVocabularyLoss, LossSpec, PolicyGradientLoss

CHUNK_ROWS = 512
"""Rows whose logits exist at once: the weight gradient is read and written once per chunk, which below 256 rows costs
more than the products themselves; 512 rows of a vocabulary of 49,152 are 100 MB in float32."""


@dataclass(frozen=True, eq=False)
class Head:
    """Output head: logits = soft_cap(scale * (hidden @ weight.T + bias))."""

    weight: Tensor
    """[V, D], without the rows that only pad the vocabulary."""
    bias: Tensor | None = None
    """[V]."""
    scale: float = 1.0
    """1 = none."""
    soft_cap: float = 0.0
    """0 = none; otherwise logits = cap * tanh(logits / cap)."""

    def logits(self, hidden_CD: Tensor) -> Tensor:
        """[C, V] in float32 at least; the product itself runs in the weight's type, as in the model."""
        weight = self.weight
        logits_CV = (hidden_CD.to(weight.dtype) @ weight.T).to(torch.promote_types(weight.dtype, torch.float32))
        if self.bias is not None:
            logits_CV = logits_CV + self.bias
        if self.scale != 1.0:
            logits_CV = logits_CV * self.scale
        if self.soft_cap:
            logits_CV = self.soft_cap * torch.tanh(logits_CV / self.soft_cap)
        return logits_CV

    def first(self, vocab_size: int) -> Head:
        """The head without tokens from `vocab_size` on."""
        if vocab_size >= self.weight.shape[0]:
            return self
        bias = None if self.bias is None else self.bias[:vocab_size]
        return replace(self, weight=self.weight[:vocab_size], bias=bias)

    def log_probs(self, hidden_CD: Tensor, temperature: float) -> Tensor:
        """[C, V] log-softmax(logits / temperature)."""
        logits_CV = self.logits(hidden_CD) / temperature
        return logits_CV - torch.logsumexp(logits_CV, dim=-1, keepdim=True)


@dataclass(frozen=True, eq=False)
class TeacherRows:
    """The teacher's signal for R rows: sampled log-probabilities, or hidden states with the head to apply."""

    logprobs: Tensor | None = None
    """[R] log q of the sampled tokens."""
    hidden: Tensor | None = None
    """[R, D_teacher]."""
    head: Head | None = None

    def __getitem__(self, rows: slice) -> TeacherRows:
        return TeacherRows(
            None if self.logprobs is None else self.logprobs[rows],
            None if self.hidden is None else self.hidden[rows],
            self.head,
        )

    def log_q(self, temperature: float) -> Tensor:
        """[R, V] log-probabilities of the whole vocabulary."""
        assert self.hidden is not None, "this objective needs the teacher's hidden states"
        assert self.head is not None, "this objective needs the teacher's head"
        return self.head.log_probs(self.hidden, temperature)


class StudentChunk(NamedTuple):
    """The student's distribution at C rows. An objective may overwrite `log_p` and `p`: they are large."""

    log_p: Tensor
    """[C, V]."""
    p: Tensor
    """[C, V]."""
    ids: Tensor
    """[C] sampled tokens."""
    logprobs: Tensor
    """[C] log p of the sampled tokens."""


class ChunkLoss(NamedTuple):
    """An objective's answer for C rows."""

    value: Tensor
    """[C] loss."""
    grad: Tensor
    """[C, V] derivative of each row's loss with respect to logits / temperature."""
    reverse_kl: Tensor
    """[C] KL(student || teacher), or its estimate."""


class Objective(Protocol):
    """A loss of each row that depends on the student's distribution there."""

    def __call__(self, student: StudentChunk, teacher: TeacherRows, temperature: float) -> ChunkLoss:
        """Loss and gradient of each row, not weighted, not reduced."""
        ...


@dataclass(frozen=True)
class PolicyGradient:
    """Reverse KL at the sampled token as a policy gradient: -A log p(y), A = clip(log q(y) - log p(y)) held fixed.

    Its gradient averaged over y ~ p is that of the full reverse KL (without clip). `reverse_kl` is the one-sample
    estimate log p - log q. Source: Thinking Machines, "On-Policy Distillation" (2025).
    """

    advantage_clip: float | None = None

    def __call__(self, student: StudentChunk, teacher: TeacherRows, temperature: float) -> ChunkLoss:
        assert teacher.logprobs is not None, "the policy gradient needs the teacher's log-probabilities"
        advantage_C = teacher.logprobs.to(student.logprobs.dtype) - student.logprobs
        reverse_kl_C = -advantage_C
        if self.advantage_clip is not None:
            advantage_C = advantage_C.clamp(-self.advantage_clip, self.advantage_clip)
        grad_CV = student.p.mul_(advantage_C[:, None])
        grad_CV.scatter_add_(1, student.ids[:, None], -advantage_C[:, None])
        return ChunkLoss(-advantage_C * student.logprobs, grad_CV, reverse_kl_C)


@dataclass(frozen=True)
class ReverseKL:
    """KL(student || teacher) = sum_v p (log p - log q); gradient p (log p - log q - KL)."""

    def __call__(self, student: StudentChunk, teacher: TeacherRows, temperature: float) -> ChunkLoss:
        difference_CV = student.log_p.sub_(teacher.log_q(temperature))
        kl_C = torch.linalg.vecdot(student.p, difference_CV)
        return ChunkLoss(kl_C, difference_CV.sub_(kl_C[:, None]).mul_(student.p), kl_C)


@dataclass(frozen=True)
class ForwardKL:
    """KL(teacher || student) = sum_v q (log q - log p); gradient p - q. Also measures the reverse KL."""

    def __call__(self, student: StudentChunk, teacher: TeacherRows, temperature: float) -> ChunkLoss:
        log_q_CV = teacher.log_q(temperature)
        difference_CV = student.log_p.sub_(log_q_CV)
        reverse_kl_C = torch.linalg.vecdot(student.p, difference_CV)
        q_CV = log_q_CV.exp_()
        value_C = -torch.linalg.vecdot(q_CV, difference_CV)
        return ChunkLoss(value_C, student.p.sub_(q_CV), reverse_kl_C)


def make_objective(spec: LossSpec) -> Objective:
    """The objective that a stage asks for."""
    match spec:
        case PolicyGradientLoss():
            return PolicyGradient(spec.advantage_clip)
        case FullVocabularyLoss():
            return ReverseKL() if spec.divergence == "reverse_kl" else ForwardKL()


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


def packed_loss(
    objective: Objective,
    hidden: Tensor,
    head: Head,
    ids: Tensor,
    weights: Tensor,
    teacher: TeacherRows,
    temperature: float = 1.0,
) -> PackedLoss:
    """sum_r weights[r] * loss of row r, for hidden [R, D], ids [R] and weights [R]; gradients reach hidden and head."""
    call = _Call(objective, head.scale, head.soft_cap, ids, weights, teacher, temperature)
    loss, measures = _HeadLoss.apply(hidden, head.weight, head.bias, call)  # type: ignore[misc]
    return PackedLoss(loss, *measures.unbind(0))


@torch.no_grad()
def exact_reverse_kl(hidden: Tensor, head: Head, teacher: TeacherRows, temperature: float = 1.0) -> Tensor:
    """[R] KL(student || teacher) over the whole vocabulary, in float32 at least, without gradients."""
    kls = []
    for start in range(0, hidden.shape[0], CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        log_p_CV = head.log_probs(hidden[rows], temperature)
        difference_CV = log_p_CV - teacher[rows].log_q(temperature)
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
    teacher: TeacherRows
    temperature: float


class _HeadLoss(torch.autograd.Function):
    """(hidden [R, D], weight [V, D], bias [V] | None) -> (loss [], measures [4, R]); gradients made in forward."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: _Call) -> tuple[Tensor, Tensor]:
        head = Head(weight, bias, call.scale, call.soft_cap)
        precise = torch.promote_types(weight.dtype, torch.float32)
        row_weights = call.weights.to(precise)
        measures = torch.empty(4, hidden.shape[0], dtype=precise, device=hidden.device)
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


def _chunk(head: Head, hidden_CD: Tensor, call: _Call, rows: slice, measures_4C: Tensor) -> Tensor:
    """[C, V] gradient with respect to hidden @ weight.T + bias; fills in the measures."""
    logits_CV = head.logits(hidden_CD)
    # d(cap * tanh(x / cap)) / dx = 1 - (capped / cap)^2
    slope_CV = 1 - (logits_CV / head.soft_cap).square_() if head.soft_cap else None
    log_p_CV = logits_CV.div_(call.temperature)
    log_p_CV.sub_(torch.logsumexp(log_p_CV, dim=-1, keepdim=True))
    p_CV = log_p_CV.exp()
    ids_C = call.ids[rows]
    logprobs_C = log_p_CV.gather(1, ids_C[:, None]).squeeze(1)
    measures_4C[2] = logprobs_C
    measures_4C[3] = -torch.linalg.vecdot(p_CV, log_p_CV)
    result = call.objective(StudentChunk(log_p_CV, p_CV, ids_C, logprobs_C), call.teacher[rows], call.temperature)
    measures_4C[0] = result.value
    measures_4C[1] = result.reverse_kl
    factor = head.scale / call.temperature
    grad_CV = result.grad if factor == 1 else result.grad.mul_(factor)
    return grad_CV if slope_CV is None else grad_CV.mul_(slope_CV)


def _add_product(total_VD: Tensor, grad_CV: Tensor, hidden_CD: Tensor) -> None:
    """total += grad.T @ hidden; the product in the model's type, the sum over chunks in float32."""
    if hidden_CD.dtype == total_VD.dtype:
        total_VD.addmm_(grad_CV.T, hidden_CD)
    else:
        total_VD.add_(grad_CV.to(hidden_CD.dtype).T @ hidden_CD)
