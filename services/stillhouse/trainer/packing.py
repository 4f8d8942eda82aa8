"""Which samples go through the model together, and how: micro-batches within a token budget, one teacher each.

For the body of the model samples lie one after the other in one row (packed), or each in a row of its own, padded on
the right; student.py says which of the two a model can do. Everything after it (head, loss) sees packed rows, one per
completion token that is trained on. No torch here.
Letters: B samples, L padded tokens, R rows, D width of the teacher's hidden state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from stillhouse.core.errors import WireError
from stillhouse.trainer.batch import TeacherHead, TrainSample
from stillhouse.trainer.mixtures import num_trained, route, together
from stillhouse.trainer.support import union

PADDING_ID = 0
"""Any id will do: with padding on the right, causal attention hides it from every real token."""


def plan_micro_batches(
    samples: Sequence[TrainSample],
    max_tokens: int,
    *,
    is_packed: bool = False,
    heads: Mapping[str, TeacherHead] | None = None,
) -> list[list[int]]:
    """Indices into `samples`, by micro-batch: one teacher each, at most `max_tokens` tokens of work (or one sample).

    Teachers come in order of their `heads` and then of their names, so that each head is loaded once a step, also one
    that several teachers share; within a teacher the longest samples come first, so that neighbours need little padding
    and a budget that is too large fails at once.
    """
    digests = {name: head.sha256 for name, head in (heads or {}).items()}

    def place(index: int) -> tuple[str, str, int, int]:
        sample = samples[index]
        return digests.get(sample.teacher, ""), sample.teacher, -sample.num_tokens, index

    order = sorted(range(len(samples)), key=place)
    plan: list[list[int]] = []
    for index in order:
        batch = plan[-1] if plan else []
        is_same = bool(batch) and samples[batch[0]].teacher == samples[index].teacher
        if is_same and _num_tokens(samples, [*batch, index], is_packed) <= max_tokens:
            batch.append(index)
        else:
            plan.append([index])
    return plan


def _num_tokens(samples: Sequence[TrainSample], batch: Sequence[int], is_packed: bool) -> int:
    """Tokens that the model computes for a micro-batch, padding included."""
    lengths = [samples[i].num_tokens for i in batch]
    return sum(lengths) if is_packed else max(lengths) * len(lengths)


def padding_fraction(samples: Sequence[TrainSample], plan: Sequence[Sequence[int]], *, is_packed: bool) -> float:
    """Share of the tokens of a step's forward passes that is padding."""
    run = [batch for batch in plan if trains(samples, batch)]
    computed = sum(_num_tokens(samples, batch, is_packed) for batch in run)
    return 1 - sum(samples[i].num_tokens for batch in run for i in batch) / computed if computed else 0.0


def trains(samples: Sequence[TrainSample], batch: Sequence[int]) -> bool:
    """Some token of the micro-batch is trained on; otherwise it is not run."""
    return any(samples[i].num_loss_tokens for i in batch)


def loss_weights(
    samples: Sequence[TrainSample],
    teacher_weights: Sequence[float],
    reduction: Literal["token_mean", "seq_mean_token_mean"],
    per_teacher: bool = False,
) -> list[float]:
    """Weight of each trained token of each sample, so that the step's loss is the plain sum over all rows.

    Denominators count the trained tokens (or sequences) of the whole step, hence the split into micro-batches changes
    nothing. A sample that several teachers judge counts once. With `per_teacher` they count those of the sample's
    teacher (or mixture of teachers), times the teachers that have any. They ignore the weights: a sample of weight 2
    pulls twice as hard, whatever else is in the step.
    """
    groups = together(samples)
    counts = [num_trained(samples, group) for group in groups]
    owners = [route(samples, group) if per_teacher else () for group in groups]
    totals: dict[tuple[str, ...], int] = {}
    for owner, count in zip(owners, counts, strict=True):
        totals[owner] = totals.get(owner, 0) + (count if reduction == "token_mean" else count > 0)
    num_owners = sum(total > 0 for total in totals.values())
    weights = [0.0] * len(samples)
    for group, owner, count in zip(groups, owners, counts, strict=True):
        denominator = max(1, totals[owner] * num_owners * (1 if reduction == "token_mean" else count))
        for index in group:
            weights[index] = samples[index].weight * teacher_weights[index] / denominator
    return weights


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Samples of one teacher, ready for one forward pass. Row r is one trained completion token."""

    teacher: str
    input_ids: np.ndarray
    """[B, L] int64 - prompt and completion up to its last trained token, without it (nothing is predicted from it),
    padded right; or [1, L] with all samples one after the other."""
    lengths: tuple[int, ...] | None
    """Tokens of each sample in `input_ids` when it is packed; none = it is padded."""
    positions: np.ndarray
    """[R] int64 - position in the flattened `input_ids` whose hidden state predicts the row's token."""
    sample_of_row: np.ndarray
    """[R] int64 - index into the step's samples."""
    token_of_row: np.ndarray
    """[R] int64 - index into the sample's completion."""
    ids: np.ndarray
    """[R] int64 - the sampled tokens."""
    weights: np.ndarray
    """[R] float32 - weight in the loss; see `loss_weights`."""
    rollout_logprobs: np.ndarray
    """[R] float32."""
    teacher_logprobs: np.ndarray
    """[R] float32."""
    outcome: np.ndarray
    """[R] float32 - advantage of the reward of the row's completion."""
    span: np.ndarray | None
    """[R] int64 - number of the row's span of text, unlike those of other samples; None = the teacher read tokens."""
    hidden: np.ndarray | None
    """[R, D] float16 or float32."""
    topk_ids: np.ndarray | None
    """[R, K] int64 - the support: the teacher's tokens, the student's, or both."""
    topk_logprobs: np.ndarray | None
    """[R, K] float32 - of them under the teacher."""
    topk_mask: np.ndarray | None
    """[R, K] bool - False = the place is empty; None = all are taken."""


def collate(
    samples: Sequence[TrainSample], indices: Sequence[int], weights: Sequence[float], *, is_packed: bool = False
) -> MicroBatch:
    """The micro-batch of `samples[i] for i in indices`; `weights` is per sample of the step.

    Completion token t of a sample is predicted from position P + t - 1.
    """
    chosen = [samples[i] for i in indices]
    teachers = sorted({sample.teacher for sample in chosen})
    if len(teachers) != 1:
        raise WireError(f"a micro-batch takes samples of one teacher, got {teachers}")
    tokens = [np.concatenate([s.prompt_ids, s.completion_ids])[: s.num_tokens - 1] for s in chosen]
    input_ids, offsets = (_packed if is_packed else _padded)(tokens)
    rows = [np.flatnonzero(sample.loss_mask) for sample in chosen]
    starts = [offset + len(sample.prompt_ids) - 1 for offset, sample in zip(offsets, chosen, strict=True)]

    def gather(name: str) -> np.ndarray:
        return np.concatenate([getattr(sample, name)[kept] for sample, kept in zip(chosen, rows, strict=True)])

    has_hidden = all(sample.hidden is not None for sample in chosen)
    topk_ids, topk_logprobs, topk_mask = _support(chosen, gather)
    counts = [len(kept) for kept in rows]
    return MicroBatch(
        teacher=teachers[0],
        input_ids=input_ids,
        lengths=tuple(map(len, tokens)) if is_packed else None,
        positions=np.concatenate([start + kept for start, kept in zip(starts, rows, strict=True)]).astype(np.int64),
        sample_of_row=np.repeat(np.asarray(indices, dtype=np.int64), counts),
        token_of_row=np.concatenate(rows).astype(np.int64),
        ids=gather("completion_ids").astype(np.int64),
        weights=np.repeat(np.asarray([weights[i] for i in indices], dtype=np.float32), counts),
        rollout_logprobs=gather("rollout_logprobs").astype(np.float32),
        teacher_logprobs=gather("teacher_logprobs").astype(np.float32),
        outcome=np.repeat(np.asarray([sample.outcome for sample in chosen], dtype=np.float32), counts),
        span=_spans(chosen, rows),
        hidden=gather("hidden") if has_hidden else None,
        topk_ids=topk_ids,
        topk_logprobs=topk_logprobs,
        topk_mask=topk_mask,
    )


def _spans(samples: Sequence[TrainSample], rows: Sequence[np.ndarray]) -> np.ndarray | None:
    """[R] spans of all samples, counted on from one sample to the next."""
    found, first = [], 0
    for sample, kept in zip(samples, rows, strict=True):
        if sample.spans is None:
            return None
        found.append(sample.spans[kept].astype(np.int64) + first)
        first += len(sample.spans)  # no sample has more spans than tokens
    return np.concatenate(found)


def _padded(tokens: Sequence[np.ndarray]) -> tuple[np.ndarray, list[int]]:
    """([B, L] one sequence per row, where each begins when flattened)."""
    length = max(map(len, tokens))
    input_ids = np.full((len(tokens), length), PADDING_ID, dtype=np.int64)
    for row, sequence in enumerate(tokens):
        input_ids[row, : len(sequence)] = sequence
    return input_ids, [row * length for row in range(len(tokens))]


def _packed(tokens: Sequence[np.ndarray]) -> tuple[np.ndarray, list[int]]:
    """([1, L] all sequences in one row, where each begins)."""
    lengths = [len(sequence) for sequence in tokens]
    return np.concatenate(tokens).astype(np.int64)[None], [0, *np.cumsum(lengths)[:-1].tolist()]


def _support(
    samples: Sequence[TrainSample], gather: Callable[[str], np.ndarray]
) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]:
    """Ids, log-probabilities and mask of the tokens that the rows name: the teacher's, the student's, or both sets."""
    has_topk = all(sample.topk_ids is not None for sample in samples)
    has_targets = all(sample.target_ids is not None for sample in samples)
    if has_topk and has_targets:
        return union(gather("topk_ids"), gather("topk_logprobs"), gather("target_ids"), gather("target_logprobs"))
    if not has_topk and not has_targets:
        return None, None, None
    name = "topk" if has_topk else "target"
    return gather(f"{name}_ids").astype(np.int64), gather(f"{name}_logprobs").astype(np.float32), None
