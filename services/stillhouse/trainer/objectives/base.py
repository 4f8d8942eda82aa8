"""What every objective is given and what it answers: distributions of a chunk of rows in, loss and gradient out.

An objective is one class with one method and a gradient in closed form; the kernel (losses.py) does the rest. The
student's logits, its softmax and the product with the head happen once, whatever the objective. The teacher's are made
when the objective asks for them, and never for one that does not.

Letters: R rows (trained completion tokens of a micro-batch), C rows of a chunk, V vocabulary, D width.
p is the student's distribution, q the teacher's, both of softmax(logits / temperature). Losses are in nats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Final, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

CONVERTED_COLUMNS: Final = 8192
"""Tokens of the vocabulary whose products exist at once in the model's type where logits are kept in another: 8 MB for
512 rows in bfloat16, and still 512 x 8192 x D for the matrix product to work on."""


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

    def logits(self, hidden_D: Tensor) -> Tensor:
        """[..., V] for [..., D], in float32 at least; the product itself runs in the weight's type, as in the model."""
        products_V = hidden_D.to(self.weight.dtype) @ self.weight.T
        return self.finish_(products_V.to(torch.promote_types(self.weight.dtype, torch.float32)))

    def project(self, hidden_CD: Tensor, out_CV: Tensor) -> Tensor:
        """`out` = hidden @ weight.T, nothing else."""
        hidden_CD = hidden_CD.to(self.weight.dtype)
        if out_CV.dtype == self.weight.dtype:
            return torch.mm(hidden_CD, self.weight.T, out=out_CV)
        for columns in converted_columns(self.weight):
            out_CV[:, columns] = hidden_CD @ self.weight[columns].T
        return out_CV

    def finish_(self, logits_CV: Tensor) -> Tensor:
        """Products to logits, in place: bias, scale, soft-cap."""
        if self.bias is not None:
            logits_CV.add_(self.bias)
        if self.scale != 1.0:
            logits_CV.mul_(self.scale)
        if self.soft_cap:
            logits_CV.div_(self.soft_cap).tanh_().mul_(self.soft_cap)
        return logits_CV

    def cap_slope(self, products_CV: Tensor) -> Tensor:
        """[C, V] derivative of the soft-cap, 1 - tanh(x / cap)^2, at products."""
        plain = replace(self, soft_cap=0.0)
        return plain.finish_(products_CV.clone()).div_(self.soft_cap).tanh_().square_().neg_().add_(1)

    def first(self, vocab_size: int) -> Head:
        """The head without tokens from `vocab_size` on."""
        if vocab_size >= self.weight.shape[0]:
            return self
        bias = None if self.bias is None else self.bias[:vocab_size]
        return replace(self, weight=self.weight[:vocab_size], bias=bias)


def converted_columns(weight_VD: Tensor) -> list[slice]:
    """The vocabulary in pieces of `CONVERTED_COLUMNS`."""
    return [slice(start, start + CONVERTED_COLUMNS) for start in range(0, len(weight_VD), CONVERTED_COLUMNS)]


@dataclass(frozen=True, eq=False)
class Signals:
    """What teacher and sampler say about R rows. An objective takes what it needs; absent is what nobody sent."""

    logprobs: Tensor | None = None
    """[R] teacher's log q of the sampled tokens."""
    hidden: Tensor | None = None
    """[R, D_teacher] teacher's states, to which `head` is applied."""
    head: Head | None = None
    products: Callable[[], Tensor] | None = None
    """Gives `head.project` of `hidden`, [R, V], to be overwritten, hence once; none = made when needed. The kernel sets
    it, so that one product serves all tiles of a chunk."""
    space: Tensor | None = None
    """[R, V] memory for q; none = new memory, which costs a page fault for every 4 KiB."""
    topk_ids: Tensor | None = None
    """[R, K] int64, the support: the teacher's likeliest tokens, the student's, or both; no id twice in a row, but
    where `topk_mask` is False."""
    topk_logprobs: Tensor | None = None
    """[R, K] log q of them, under the whole vocabulary."""
    topk_mask: Tensor | None = None
    """[R, K] bool, False = the place is empty (rows of a union have different sizes); none = all are taken."""
    outcome: Tensor | None = None
    """[R] advantage of the completion's reward, normalised within its group."""
    rollout_logprobs: Tensor | None = None
    """[R] log mu of the sampled tokens, under the policy that sampled them."""
    sample: Tensor | None = None
    """[R] int64, which rows belong to the same sequence; they are neighbours and in order."""
    span: Tensor | None = None
    """[R] int64, which rows belong to the same span of text; all rows of a span are there, and `logprobs` are of it."""
    gate: Tensor | None = None
    """[R] weight of each row, where an objective has prepared it."""
    advantage: Tensor | None = None
    """[R] likewise."""
    reverse_kl: Tensor | None = None
    """[R] likewise."""

    def __getitem__(self, rows: slice | Tensor) -> Signals:
        shared = ("head", "products", "space")
        per_row = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in shared}
        return Signals(head=self.head, **{name: None if v is None else v[rows] for name, v in per_row.items()})

    def log_q(self, temperature: float) -> Tensor:
        """[R, V] log-probabilities of the whole vocabulary; the caller may overwrite them."""
        return self.teacher(temperature)[0]

    def teacher(self, temperature: float) -> tuple[Tensor, Tensor]:
        """([R, V] log q, [R, V] q) of the whole vocabulary; the caller may overwrite them. To be asked once."""
        assert self.hidden is not None, "this objective needs the teacher's hidden states"
        assert self.head is not None, "this objective needs the teacher's head"
        logits_RV = self.head.logits(self.hidden) if self.products is None else self.head.finish_(self.products())
        if temperature != 1:
            logits_RV.div_(temperature)
        q_RV = torch.empty_like(logits_RV) if self.space is None else self.space
        return logits_RV.sub_(normaliser(logits_RV, q_RV)), q_RV


def normaliser(logits_CV: Tensor, p_CV: Tensor) -> Tensor:
    """[C, 1] logsumexp of the logits; writes their softmax into `p`.

    Cheaper than softmax and log_softmax, and better: they add up a vocabulary in float32 term by term, which left
    gradients with a relative error of 1e-4 where this leaves 2e-6; `sum` adds in a tree.
    """
    torch.softmax(logits_CV, dim=-1, out=p_CV)
    p_CV.div_(p_CV.sum(-1, keepdim=True))
    return logits_CV.amax(-1, keepdim=True) - p_CV.amax(-1, keepdim=True).log()


class StudentChunk(NamedTuple):
    """The student's distribution at C rows, few enough for the caches (a tile). An objective may overwrite `log_p` and
    `p`, and answer with one of them."""

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
    gate: Tensor | None = None
    """[C] weight that the objective gave the row; none = 1."""


class Objective(Protocol):
    """A loss of each row that depends on the student's distribution there."""

    def __call__(self, student: StudentChunk, signals: Signals, temperature: float) -> ChunkLoss:
        """Loss and gradient of each row, not weighted, not reduced."""
        ...


@runtime_checkable
class SequenceObjective(Objective, Protocol):
    """An objective whose rows depend on others of their sequence: it is shown all of them before the first chunk."""

    @property
    def needs_sequences(self) -> bool:
        """False = its present settings need no first look."""
        ...

    def prepare(self, logprobs_R: Tensor, signals: Signals) -> Signals:
        """The signals, completed from the student's log p of all R sampled tokens."""
        ...


def through_softmax(p_CV: Tensor, slope_CV: Tensor) -> Tensor:
    """[C, V] gradient with respect to the logits of a loss whose gradient with respect to p is `slope`.

    p_j (slope_j - sum_v p_v slope_v); both arguments are overwritten.
    """
    mean_C = torch.linalg.vecdot(p_CV, slope_CV)
    return slope_CV.sub_(mean_C[:, None]).mul_(p_CV)
