"""The kernel: the head and an objective over packed completion rows, with closed-form gradients in chunks.

One `autograd.Function` applies the student's head, takes an objective's loss and its gradient with respect to the
logits, and keeps only the gradients of hidden rows and head: [rows, V] of a batch never exists, there is no autograd
graph over the vocabulary, and backward is a multiplication. A new objective is one class with one method
(objectives/base.py).

Rows go in two sizes. A chunk is what the matrix products work on: hundreds of rows, because each of them reads the
head, and the weight gradient is read and written once. Its logits lie in a buffer that all chunks share, where the
gradient takes their place; the teacher's in a second one, if the objective asks. A tile is what the objective works on:
a few rows of a chunk, so that its many passes over [rows, V] stay in the processor's caches.

Letters: R rows (trained completion tokens of a micro-batch), C rows of a chunk or of a tile, V vocabulary, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from stillhouse.core.spec import CrossEntropyLoss, FullVocabularyLoss, LossSpec, PolicyGradientLoss, TopKLoss
from stillhouse.trainer.objectives.base import (
    Head,
    Objective,
    SequenceObjective,
    Signals,
    StudentChunk,
    converted_columns,
    normaliser,
)
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

CHUNK_ROWS = 448
"""Most rows whose logits exist at once. The weight gradient is read and written once per chunk, which below 256 rows
costs more than the product itself; the two buffers of 448 rows are 176 MB for a vocabulary of 49,152."""

TILE_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 24}
"""Elements of a tile: the five or so arrays an objective works on, 2 MB each, fit the processor's last cache. A GPU
wants large pieces instead: 64 MB each."""


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
        spans=spec.cross_tokenizer,
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
    """Loss of R rows and what was measured on the way; only `loss` carries a gradient.

    Rows of weight 0 are not computed: their measures are 0.
    """

    loss: Tensor
    """[] weighted sum over rows."""
    values: Tensor
    """[R] loss of each row, without its weight."""
    reverse_kl: Tensor
    """[R] KL(student || teacher): exact from hidden states, a lower bound from k tokens, else the one-sample estimate;
    NaN without a teacher."""
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
    """sum_r weights[r] * loss of row r, for hidden [R, D], ids [R] and weights [R].

    Gradients reach hidden, weight and bias, each if it requires one: a frozen head costs no product of its own.
    """
    if isinstance(objective, SequenceObjective) and objective.needs_sequences:
        signals = objective.prepare(sampled_logprobs(hidden, head, ids, temperature), signals)
    (chosen,) = weights.nonzero(as_tuple=True)
    if len(chosen) == len(weights):
        loss, measures = _apply(objective, hidden, head, ids, weights, signals, temperature)
        return PackedLoss(loss, *measures.unbind(0))
    hidden = hidden.index_select(0, chosen)
    loss, measures = _apply(objective, hidden, head, ids[chosen], weights[chosen], signals[chosen], temperature)
    all_measures = measures.new_zeros(len(measures), len(weights)).index_copy_(1, chosen, measures)
    return PackedLoss(loss, *all_measures.unbind(0))


def _apply(objective, hidden, head: Head, ids, weights, signals, temperature) -> tuple[Tensor, Tensor]:
    call = _Call(objective, head.scale, head.soft_cap, ids, weights, signals, temperature)
    return _HeadLoss.apply(hidden, head.weight, head.bias, call)  # type: ignore[return-value]


@torch.no_grad()
def sampled_logprobs(hidden: Tensor, head: Head, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """[R] log p of the sampled tokens, in float32 at least, without gradients."""
    buffers = _Buffers(head, hidden)
    logprobs = torch.empty(len(hidden), dtype=buffers.dtype, device=hidden.device)
    for rows in _chunks(len(hidden)):
        logits_CV = head.project(hidden[rows], buffers.student(rows))
        for tile in buffers.tiles(len(logits_CV)):
            log_p_CV, _ = _distribution(head, logits_CV[tile], temperature, buffers)
            logprobs[rows][tile] = log_p_CV.gather(1, ids[rows][tile, None]).squeeze(1)
    return logprobs


@torch.no_grad()
def exact_reverse_kl(hidden: Tensor, head: Head, signals: Signals, temperature: float = 1.0) -> Tensor:
    """[R] KL(student || teacher) over the whole vocabulary, in float32 at least, without gradients."""
    buffers = _Buffers(head, hidden)
    kls = torch.empty(len(hidden), dtype=buffers.dtype, device=hidden.device)
    for rows in _chunks(len(hidden)):
        logits_CV = head.project(hidden[rows], buffers.student(rows))
        teacher = _TeacherChunk(signals[rows], buffers)
        for tile in buffers.tiles(len(logits_CV)):
            log_p_CV, p_CV = _distribution(head, logits_CV[tile], temperature, buffers)
            kls[rows][tile] = torch.linalg.vecdot(p_CV, log_p_CV.sub_(teacher[tile].log_q(temperature)))
    return kls


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


class _Buffers:
    """What all chunks and tiles of a call share, in float32 at least."""

    def __init__(self, head: Head, hidden: Tensor) -> None:
        self.dtype = torch.promote_types(head.weight.dtype, torch.float32)
        self._empty = partial(torch.empty, dtype=self.dtype, device=hidden.device)
        vocab_size = len(head.weight)
        elements = TILE_ELEMENTS.get(hidden.device.type, TILE_ELEMENTS["cuda"])
        # a multiple of 4: threads share a tile by rows
        self._tile_rows = max(4, elements // vocab_size // 4 * 4)
        longest = max((rows.stop - rows.start for rows in _chunks(len(hidden))), default=0)
        self._shape = (longest, vocab_size)
        self._student: Tensor = self._empty(self._shape)
        self._teacher: Tensor | None = None
        self._tile_shape = (min(self._tile_rows, longest), vocab_size)
        self._p = self._empty(self._tile_shape)
        self._q: Tensor | None = None

    def student(self, rows: slice) -> Tensor:
        """[C, V] for the student's logits, then their gradient."""
        return self._student[: rows.stop - rows.start]

    def teacher(self, num_rows: int) -> Tensor:
        """[C, V] for the teacher's logits; exists from the first time it is asked for."""
        if self._teacher is None:
            self._teacher = self._empty(self._shape)
        return self._teacher[:num_rows]

    def tiles(self, num_rows: int) -> list[slice]:
        """The tiles of a chunk."""
        return [slice(s, min(s + self._tile_rows, num_rows)) for s in range(0, num_rows, self._tile_rows)]

    def p(self, num_rows: int) -> Tensor:
        """[C, V] for the student's probabilities in a tile."""
        return self._p[:num_rows]

    def q(self, num_rows: int) -> Tensor:
        """[C, V] for the teacher's probabilities in a tile."""
        if self._q is None:
            self._q = self._empty(self._tile_shape)
        return self._q[:num_rows]


class _TeacherChunk:
    """The signals of a chunk, by tiles. The teacher's head is applied to the whole chunk when a tile first needs it."""

    def __init__(self, signals: Signals, buffers: _Buffers) -> None:
        self._signals, self._buffers = signals, buffers
        self._products: Tensor | None = None

    def __getitem__(self, tile: slice) -> Signals:
        if self._signals.hidden is None:
            return self._signals[tile]
        space_CV = self._buffers.q(tile.stop - tile.start)
        return replace(self._signals[tile], products=lambda: self._all()[tile], space=space_CV)

    def _all(self) -> Tensor:
        if self._products is None:
            head, hidden_CD = self._signals.head, self._signals.hidden
            assert head is not None
            assert hidden_CD is not None
            self._products = head.project(hidden_CD, self._buffers.teacher(len(hidden_CD)))
        return self._products


class _HeadLoss(torch.autograd.Function):
    """(hidden [R, D], weight [V, D], bias [V] | None) -> (loss [], measures [5, R]); gradients made in forward."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: _Call) -> tuple[Tensor, Tensor]:
        head = Head(weight, bias, call.scale, call.soft_cap)
        buffers = _Buffers(head, hidden)
        row_weights = call.weights.to(buffers.dtype)
        measures = torch.empty(5, len(hidden), dtype=buffers.dtype, device=hidden.device)
        grads = _Gradients(hidden, head, buffers.dtype, ctx.needs_input_grad)
        for rows in _chunks(len(hidden)):
            products_CV = head.project(hidden[rows], buffers.student(rows))
            teacher = _TeacherChunk(call.signals[rows], buffers)
            for tile in buffers.tiles(len(products_CV)):
                own = slice(rows.start + tile.start, rows.start + tile.stop)
                _tile(head, products_CV[tile], call, own, teacher[tile], buffers, row_weights[own], measures[:, own])
            grads.add(products_CV, rows)
        ctx.save_for_backward(*grads.finished())
        ctx.mark_non_differentiable(measures)
        return torch.dot(measures[0], row_weights), measures

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss: Tensor, _: Tensor):  # type: ignore[override]
        grads = ctx.saved_tensors
        if grad_loss != 1:  # the usual case is loss.backward(): spare a copy of the head
            grads = tuple(None if grad is None else grad * grad_loss for grad in grads)
        return *grads, None


def _tile(
    head: Head,
    products_CV: Tensor,
    call: _Call,
    rows: slice,
    signals: Signals,
    buffers: _Buffers,
    weights_C: Tensor,
    measures_5C: Tensor,
) -> None:
    """Products hidden @ weight.T to their gradient, in place; fills in the measures."""
    # d(cap * tanh(x / cap)) / dx = 1 - tanh(x / cap)^2, and x is lost below
    slope_CV = head.cap_slope(products_CV) if head.soft_cap else None
    log_p_CV, p_CV = _distribution(head, products_CV, call.temperature, buffers)
    ids_C = call.ids[rows]
    logprobs_C = log_p_CV.gather(1, ids_C[:, None]).squeeze(1)
    measures_5C[2] = logprobs_C
    measures_5C[3] = -torch.linalg.vecdot(p_CV, log_p_CV)
    result = call.objective(StudentChunk(log_p_CV, p_CV, ids_C, logprobs_C), signals, call.temperature)
    measures_5C[0] = result.value
    measures_5C[1] = result.reverse_kl
    measures_5C[4] = 1.0 if result.gate is None else result.gate
    grad_CV = torch.mul(result.grad, (weights_C * (head.scale / call.temperature))[:, None], out=products_CV)
    if slope_CV is not None:
        grad_CV.mul_(slope_CV)


def _distribution(head: Head, products_CV: Tensor, temperature: float, buffers: _Buffers) -> tuple[Tensor, Tensor]:
    """([C, V] log p, in the place of the products; [C, V] p)."""
    logits_CV = head.finish_(products_CV)
    if temperature != 1:
        logits_CV.div_(temperature)
    p_CV = buffers.p(len(logits_CV))
    return logits_CV.sub_(normaliser(logits_CV, p_CV)), p_CV


class _Gradients:
    """Gradients of hidden rows, weight and bias, those that are wanted; sums over chunks are taken in float32."""

    def __init__(self, hidden: Tensor, head: Head, dtype: torch.dtype, wanted: Sequence[bool]) -> None:
        self._hidden, self._head = hidden, head
        weight, bias = head.weight, head.bias
        self._of_hidden = torch.zeros_like(hidden, dtype=dtype) if wanted[0] else None
        self._of_weight = torch.zeros_like(weight, dtype=dtype) if wanted[1] else None
        self._of_bias = torch.zeros_like(bias, dtype=dtype) if wanted[2] and bias is not None else None

    def add(self, grad_CV: Tensor, rows: slice) -> None:
        """Take over the gradient of a chunk's products."""
        weight = self._head.weight
        hidden_CD = self._hidden[rows].to(weight.dtype)
        for columns in [slice(None)] if grad_CV.dtype == weight.dtype else converted_columns(weight):
            grad_CX = grad_CV[:, columns].to(weight.dtype)
            if self._of_hidden is not None:
                _add_product(self._of_hidden[rows], grad_CX, weight[columns])
            if self._of_weight is not None:
                _add_product(self._of_weight[columns], grad_CX.T, hidden_CD)
        if self._of_bias is not None:
            self._of_bias += grad_CV.sum(0)

    def finished(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients, each in the type of what it belongs to."""
        inputs = (self._hidden, self._head.weight, self._head.bias)
        sums = (self._of_hidden, self._of_weight, self._of_bias)
        return tuple(  # type: ignore[return-value]
            None if total is None or of is None else total.to(of.dtype) for total, of in zip(sums, inputs, strict=True)
        )


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b; the product in the model's type, the sum in the total's."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total.add_(a @ b)


def _chunks(num_rows: int) -> list[slice]:
    """Rows in pieces of nearly the same size, none above `CHUNK_ROWS`."""
    size = math.ceil(num_rows / max(1, math.ceil(num_rows / CHUNK_ROWS)))
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)] if num_rows else []
