"""Random problems for the losses, and one job's loss of every kind that the format has.

Letters: R rows, V vocabulary, D width of the student, K places of the support.
"""

from __future__ import annotations

import itertools
from typing import Any, get_args

import numpy as np
import torch
from hypothesis import strategies as st
from pydantic import TypeAdapter
from torch import Tensor

from stillhouse.core.spec import FullVocabularyLoss, LossSpec, PolicyGradientLoss, TopKLoss
from stillhouse.trainer.losses import PackedLoss, make_objective, packed_loss
from stillhouse.trainer.objectives.base import Head, Signals
from stillhouse.trainer.support import union
from tests.unit.loss_oracles import allowed, at, of_spans, probabilities

_LOSS: TypeAdapter[LossSpec] = TypeAdapter(LossSpec)

_KNOBS: dict[str, list[dict[str, Any]]] = {
    "jsd": [{"beta": 0.1}, {"beta": 0.5}, {"beta": 0.99}, {"beta": 0.2, "beta_rescale": True}],
    "skew_forward_kl": [{"alpha": 0.1}, {"alpha": 0.9}],
    "skew_reverse_kl": [{"alpha": 0.1}, {"alpha": 0.9}],
    "entropy_mix": [{"entropy_threshold": 1.0, "forward_weight": 0.7}],
}
"""Divergences with settings of their own."""

_BANDS: dict[str, dict[str, float]] = {
    "tis": {"gate_low": 0.7, "gate_high": 1.6},
    "icepop": {"gate_low": 0.7, "gate_high": 1.6},
    "seq_mask": {"gate_low": 0.7, "gate_high": 1.4},
}


def loss(objective: str, **fields: Any) -> Any:
    """A job's loss, validated as the gateway does."""
    return _LOSS.validate_python({"objective": objective, **fields})


def choices(model: Any, field: str) -> tuple[str, ...]:
    """What a field of the format may be: a new choice is tested, or fails, without being added here."""
    return get_args(model.model_fields[field].annotation)


def divergences() -> list[Any]:
    """Every divergence over the whole vocabulary."""
    return [
        loss("full_vocabulary", divergence=divergence, **knobs)
        for divergence in choices(FullVocabularyLoss, "divergence")
        for knobs in _KNOBS.get(divergence, [{}])
    ]


def top_ks() -> list[Any]:
    """Every top-k form on every support."""
    fields = ("divergence", "correction", "support")
    combined = itertools.product(*(choices(TopKLoss, field) for field in fields))
    return [loss("top_k", **dict(zip(fields, values, strict=True))) for values in combined]


def policy_gradients(**fields: Any) -> list[Any]:
    """Every estimator, gate, student's term and baseline; not every combination of them."""
    gates = [{"ratio_gate": gate, **_BANDS.get(gate, {})} for gate in choices(PolicyGradientLoss, "ratio_gate")]
    terms = [{"student_term": term} for term in choices(PolicyGradientLoss, "student_term")]
    baselines = [{"baseline": baseline} for baseline in choices(PolicyGradientLoss, "baseline")]
    estimators = [{"estimator": name} for name in choices(PolicyGradientLoss, "estimator") if name != "advantage"]
    combined: list[dict[str, Any]] = [{**gate, **term} for gate in gates for term in terms]
    combined += [{**baseline, **clip} for baseline in baselines for clip in ({}, {"advantage_clip": 0.7})]
    combined += [{**gate, **baseline} for gate in gates[-1:] for baseline in baselines[1:]]
    combined += [{**gate, **estimator} for gate in gates for estimator in estimators]
    spans = {"cross_tokenizer": True}
    combined += [{**spans, **gate, **term} for gate in gates if gate["ratio_gate"] != "seq_mask" for term in terms]
    combined += [{**spans, "advantage_clip": 0.7, "teacher_weight": 0.3}]
    combined += [{"discount": 0.9, "advantage_clip": 0.7}, {"discount": 1.0, "teacher_weight": 0.3, **gates[-1]}]
    return [loss("policy_gradient", **{**combination, **fields}) for combination in combined]


def rewarded() -> list[Any]:
    """The outcome alone, and added to the teacher's advantage."""
    reward = {"weight": 0.6}
    return [
        loss("policy_gradient", teacher_weight=0, reward=reward),
        loss("policy_gradient", teacher_weight=0, reward=reward, ratio_gate="is"),
        loss("policy_gradient", reward=reward, advantage_clip=0.2),
        loss("policy_gradient", teacher_weight=0.5, reward=reward, baseline="full_vocabulary"),
        loss("policy_gradient", reward=reward, cross_tokenizer=True, ratio_gate="is"),
        loss("policy_gradient", reward=reward, discount=0.8, ratio_gate="seq_mask", **_BANDS["seq_mask"]),
    ]


DISTILLATION = divergences() + top_ks() + policy_gradients()
"""What learns from a teacher and has nothing to learn where p = q."""
EVERY_LOSS = [*DISTILLATION, *rewarded(), loss("cross_entropy")]


def name(spec: Any) -> str:
    """A loss by the settings that are not the default."""
    fields = spec.model_dump(exclude_defaults=True, exclude={"objective"})
    return "-".join([spec.objective, *(f"{key}={value}" for key, value in fields.items())])


HEADS: list[dict[str, Any]] = [
    {},
    {"bias": True, "padding": 3},
    {"scale": 0.3, "teacher_padding": 2},
    {"bias": True, "scale": 1.7, "soft_cap": 2.5, "padding": 1, "teacher_padding": 4},
]
"""Plain, with bias, padded on either side, scaled, soft-capped."""


class Case:
    """Random student, teacher, sequences and signals in float64; the sampler's policy is near the student's."""

    def __init__(
        self,
        lengths: list[int],
        vocab: int,
        widths: tuple[int, int],
        k: int,
        temperature: float,
        head: dict[str, Any],
        seed: int,
        same: bool = False,
        forbids: bool = True,
    ) -> None:
        self._draw = torch.Generator().manual_seed(seed)
        self.lengths, self.vocab, self.temperature, self.k = lengths, vocab, temperature, min(k, vocab)
        rows = sum(lengths)
        self.sample = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        self.hidden = self.normal(rows, widths[0]).requires_grad_()
        self.weight = self._head_weight(vocab + head.get("padding", 0), widths[0]).requires_grad_()
        self.bias = self.normal(len(self.weight)).requires_grad_() if head.get("bias") else None
        self.head = Head(self.weight, self.bias, head.get("scale", 1.0), head.get("soft_cap", 0.0)).first(vocab)
        self.same = same
        if same:
            self.teacher_hidden = self.hidden.detach()
            bias = None if self.head.bias is None else self.head.bias.detach()
            self.teacher_head = Head(self.head.weight.detach(), bias, self.head.scale, self.head.soft_cap)
        else:
            self.teacher_hidden = self.normal(rows, widths[1])
            weight = self._head_weight(vocab + head.get("teacher_padding", 0), widths[1])
            bias = self.normal(len(weight)) if head.get("bias") else None
            self.teacher_head = Head(weight, bias, self.head.scale, self.head.soft_cap).first(vocab)
        self.ids = torch.randint(vocab, (rows,), generator=self._draw)
        self.weights = self.uniform(rows) * (self.uniform(rows) > 0.3)
        self._forbidden = self.uniform(rows, vocab) < (0.1 if forbids and not same else 0.0)
        self._forbidden[:, 0] = False
        gap = 0.0 if same else 0.5 * self.normal(rows)
        self.log_mu = at(self.p().detach(), self.ids).log() + gap
        self.outcome = self.normal(len(lengths))[self.sample]
        self._student_ranks = self.normal(rows, vocab)
        is_first = self.uniform(rows) < 0.5
        is_first[torch.tensor([0, *itertools.accumulate(lengths)][:-1])] = True
        self.span = is_first.cumsum(0) + 10

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._draw, dtype=torch.float64)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self._draw, dtype=torch.float64)

    def _head_weight(self, vocab: int, width: int) -> Tensor:
        return self.normal(vocab, width) * (1.2 / width**0.5)

    @property
    def trained(self) -> Tensor:
        """[R] bool: rows that have a weight; the others need not be computed."""
        return self.weights != 0

    def leaves(self) -> list[Tensor]:
        return [self.hidden, self.weight] + ([] if self.bias is None else [self.bias])

    def p(self) -> Tensor:
        return probabilities(self.hidden, self.head, self.temperature)

    def q(self) -> Tensor:
        """[R, V] of the hidden states."""
        return probabilities(self.teacher_hidden, self.teacher_head, self.temperature)

    def sent_q(self) -> Tensor:
        """[R, V] of a teacher that forbids some tokens: their log-probability is -inf."""
        q = self.q().masked_fill(self._forbidden, 0)
        return q / q.sum(-1, keepdim=True)

    def _named_ids(self, spec: Any) -> list[Tensor]:
        """[R, k] each, of whom the support asks; a `policy_gradient` asks the teacher."""
        teacher = self.sent_q().topk(self.k).indices
        student = self._student_ranks.topk(self.k).indices
        return {"teacher": [teacher], "student": [student], "union": [teacher, student]}[
            getattr(spec, "support", "teacher")
        ]

    def support(self, spec: Any) -> Tensor:
        """[R, V] which tokens are in it."""
        is_in = torch.zeros(len(self.ids), self.vocab, dtype=torch.bool)
        return is_in.scatter(1, torch.cat(self._named_ids(spec), dim=1), True)

    def signals(self, spec: Any) -> Signals:
        """What the payload of a loss brings, and nothing else."""
        payload = spec.payload()
        log_q = self.sent_q().log()
        facts: dict[str, Any] = {"rollout_logprobs": self.log_mu, "sample": self.sample, "outcome": self.outcome}
        if payload == "hidden":
            return Signals(hidden=self.teacher_hidden, head=self.teacher_head, **facts)
        if payload != "none":
            facts["logprobs"] = at(log_q, self.ids)
        if payload == "spans":
            log_q_spans = of_spans(self, at(allowed(self.sent_q()), self.ids).log())
            facts |= {"logprobs": torch.tensor(log_q_spans, dtype=torch.float64), "span": self.span}
        if payload in ("top_k", "targets"):
            facts |= self._named(self._named_ids(spec), log_q)
        return Signals(**facts)

    def _named(self, named: list[Tensor], log_q: Tensor) -> dict[str, Tensor]:
        """The support as the learner gets it; empty places hold rubbish."""
        if len(named) == 1:
            return {"topk_ids": named[0], "topk_logprobs": log_q.gather(1, named[0])}
        zeros = np.zeros(named[0].shape, dtype=np.float32)
        merged = union(named[0].numpy(), zeros, named[1].numpy(), zeros)
        mask = torch.from_numpy(merged.mask)
        rubbish = torch.randint(self.vocab, mask.shape, generator=self._draw)
        ids = torch.where(mask, torch.from_numpy(merged.ids), rubbish)
        return {"topk_ids": ids, "topk_logprobs": log_q.gather(1, ids).where(mask, torch.nan), "topk_mask": mask}

    def packed(self, spec: Any, rows: Any = slice(None)) -> PackedLoss:
        """The loss of some rows, by the code under test."""
        signals = self.signals(spec)[rows]
        objective = make_objective(spec)
        weights = self.weights[rows]
        return packed_loss(objective, self.hidden[rows], self.head, self.ids[rows], weights, signals, self.temperature)


def cases(**fixed: Any) -> st.SearchStrategy[Case]:
    """Random cases: sequences of one token and more, k from 1 to V."""
    drawn: dict[str, Any] = {
        "lengths": st.lists(st.integers(1, 5), min_size=1, max_size=3),
        "vocab": st.integers(2, 12),
        "widths": st.tuples(st.integers(1, 5), st.integers(1, 5)),
        "k": st.integers(1, 12),
        "temperature": st.sampled_from([0.5, 1.0, 2.0]),
        "head": st.sampled_from(HEADS),
        "seed": st.integers(0, 2**31),
    }
    return st.builds(Case, **{**drawn, **{key: st.just(value) for key, value in fixed.items()}})


def example() -> tuple[Tensor, Tensor]:
    """The known example: logits of student and teacher, 1.5 * normal, V = 50; numpy default_rng(0), student first."""
    draw = np.random.default_rng(0)
    return torch.from_numpy(1.5 * draw.normal(size=50)), torch.from_numpy(1.5 * draw.normal(size=50))
