"""Which tokens of a step train: the loss mask of each sample, by the stage's `tokens` and the step. No torch here.

    drop_truncated  nothing of a completion that was cut off at max_tokens
    mask_special    no special token but the one that ended the completion
    horizon         the first h(step) tokens of each completion
    select          of the tokens that the others leave, the `fraction` of each teacher's (or mixture's) that say most

Where teachers judge spans of text, a span trains as a whole: it does not if one of its tokens is taken away. Each only
takes tokens away. Nothing here draws or remembers, so a replay of a journal masks as the first run did. What does not
train is in no row of a micro-batch: it costs nothing in head and loss, and no denominator counts it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np

from stillhouse.core.errors import WireError
from stillhouse.core.spec import HorizonSpec, SelectSpec, TokensSpec
from stillhouse.trainer.batch import TrainSample
from stillhouse.trainer.mixtures import firsts, route, shares, together
from stillhouse.v1 import rollout_pb2


def mask_tokens(
    samples: Sequence[TrainSample], tokens: TokensSpec, step: int, special_ids: Collection[int] = ()
) -> list[TrainSample]:
    """The samples of step `step` of a stage (from 0) with the masks that they train with, in the same order.

    Raises:
        WireError: a sample lacks what the selection goes by.
    """
    end = None if tokens.horizon is None else horizon(tokens.horizon, step)
    special = np.asarray(sorted(special_ids if tokens.mask_special else ()), dtype=np.int64)
    masks = [_mask(sample, tokens.drop_truncated, special, end) for sample in samples]
    if tokens.select is not None:
        masks = _select(samples, masks, tokens.select)
    return [replace(sample, loss_mask=mask) for sample, mask in zip(samples, masks, strict=True)]


def horizon(spec: HorizonSpec, step: int) -> int:
    """Tokens of each completion that train at `step`: linear from `start`, `end` from step `steps` on."""
    return spec.start + (spec.end - spec.start) * min(step, spec.steps) // spec.steps


def token_metrics(samples: Sequence[TrainSample], teachers: Collection[str] = ()) -> dict[str, float]:
    """What of a step's completions trains, and the share of each of several teachers in that."""
    by_teacher = dict.fromkeys(teachers, 0.0)
    for sample, share in zip(samples, shares(samples), strict=True):
        by_teacher[sample.teacher] = by_teacher.get(sample.teacher, 0.0) + float(share) * sample.num_loss_tokens
    trained = sum(by_teacher.values())
    own = firsts(samples)
    dropped = sum(_is_truncated(sample) and not sample.num_loss_tokens for sample in own)
    metrics = {
        "tokens/selected_fraction": trained / max(1, sum(len(sample.completion_ids) for sample in own)),
        "completion/dropped_truncated": float(dropped),
        "completion/filtered_fraction": sum(sample.is_filtered for sample in own) / max(1, len(own)),
    }
    if len(teachers) > 1:
        metrics |= {f"tokens/share/{name}": count / max(1, trained) for name, count in by_teacher.items()}
    return metrics


def _mask(sample: TrainSample, drop_truncated: bool, special: np.ndarray, end: int | None) -> np.ndarray:
    """[T] uint8 of a sample by itself."""
    mask = (sample.loss_mask != 0).astype(np.uint8)
    if drop_truncated and _is_truncated(sample):
        mask[:] = 0
    is_special = np.isin(sample.completion_ids, special)
    if sample.finish_reason == rollout_pb2.FINISH_REASON_STOP:
        is_special[-1] = False  # where to end is what a student has to learn, too
    mask[is_special] = 0
    mask[len(mask) if end is None else end :] = 0
    if sample.spans is not None:
        mask[np.isin(sample.spans, sample.spans[mask == 0])] = 0
    return mask


def _is_truncated(sample: TrainSample) -> bool:
    return sample.finish_reason == rollout_pb2.FINISH_REASON_LENGTH


def _select(samples: Sequence[TrainSample], masks: Sequence[np.ndarray], select: SelectSpec) -> list[np.ndarray]:
    """The masks with the telling tokens only, counted over all samples of a teacher, or of a mixture; of equals the
    first. What several teachers judge has one mask for all of them."""
    chosen = [np.zeros_like(mask) for mask in masks]
    by_route: dict[tuple[str, ...], list[list[int]]] = {}
    for indices in together(samples):
        by_route.setdefault(route(samples, indices), []).append(indices)
    for own in by_route.values():
        rows = [np.flatnonzero(masks[indices[0]]) for indices in own]
        scores = np.concatenate([_scores(samples, i, select)[kept] for i, kept in zip(own, rows, strict=True)])
        is_chosen = np.zeros(len(scores), dtype=bool)
        is_chosen[np.argsort(-scores, kind="stable")[: max(1, round(select.fraction * len(scores)))]] = True
        parts = np.split(is_chosen, np.cumsum([len(kept) for kept in rows])[:-1])
        for indices, kept, part in zip(own, rows, parts, strict=True):
            for index in indices:
                chosen[index][kept[part]] = 1
    return chosen


def _scores(samples: Sequence[TrainSample], indices: Sequence[int], select: SelectSpec) -> np.ndarray:
    """[T] float64 how much each token of a sample says, nats: the mean over its teachers, by their shares."""
    own = [samples[index] for index in indices]
    return shares(own) @ np.stack([_score(sample, select) for sample in own])


def _score(sample: TrainSample, select: SelectSpec) -> np.ndarray:
    """[T] float64 how much each token says, nats."""
    if select.by == "entropy":
        if sample.entropies is None:
            raise WireError(
                f"sample {sample.sample_id}: no entropies, by which its stage selects tokens; its sampler must record "
                "them (record_entropies)"
            )
        scores = sample.entropies.astype(np.float64)
    else:
        log_ratio = sample.teacher_logprobs.astype(np.float64) - sample.rollout_logprobs
        scores = np.expm1(log_ratio) - log_ratio
    if np.isnan(scores).any():
        raise WireError(
            f"sample {sample.sample_id}: token {np.flatnonzero(np.isnan(scores))[0]} has no {select.by}, by which its "
            "stage selects tokens"
        )
    return scores
