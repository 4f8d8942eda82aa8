"""What a job asks its teachers for: the kinds of scores, told to teachers before the first rollout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from stillhouse.core.spec import FullVocabularyLoss, JobSpec, PolicyGradientLoss, StageSpec, TopKLoss
from stillhouse.core.spec_loss import Payload
from stillhouse.core.tensors import DTYPE_NAMES
from stillhouse.v1 import rollout_pb2

SCORE_KINDS: Final[Mapping[Payload, rollout_pb2.ScoreKind]] = {
    "none": rollout_pb2.SCORE_KIND_NONE,
    "sampled": rollout_pb2.SCORE_KIND_SAMPLED,
    "spans": rollout_pb2.SCORE_KIND_SPANS,
    "top_k": rollout_pb2.SCORE_KIND_TOPK,
    "targets": rollout_pb2.SCORE_KIND_TARGETS,
    "hidden": rollout_pb2.SCORE_KIND_HIDDEN,
}


def train_score(stage: StageSpec) -> rollout_pb2.ScoreSpec:
    """What the objective needs of each rollout."""
    loss = stage.loss
    payload = loss.payload()
    spec = rollout_pb2.ScoreSpec(
        kind=SCORE_KINDS[payload], temperature=stage.sampling.temperature, dtype=DTYPE_NAMES["float32"]
    )
    if payload == "hidden" and isinstance(loss, FullVocabularyLoss | PolicyGradientLoss):
        spec.dtype = DTYPE_NAMES[loss.hidden_dtype]
    if payload == "top_k" and isinstance(loss, TopKLoss | PolicyGradientLoss):
        spec.top_k = loss.k
    return spec


def held_out_kinds(*, by_spans: bool) -> tuple[rollout_pb2.ScoreKind, rollout_pb2.ScoreKind]:
    """For sampled and for greedy held-out completions that teachers score; `by_spans` where they may have other
    tokenizers."""
    if by_spans:
        return rollout_pb2.SCORE_KIND_SPANS, rollout_pb2.SCORE_KIND_SPANS
    return rollout_pb2.SCORE_KIND_HIDDEN, rollout_pb2.SCORE_KIND_SAMPLED


def held_out_score(kind: rollout_pb2.ScoreKind) -> rollout_pb2.ScoreSpec:
    """What held-out measurements need."""
    return rollout_pb2.ScoreSpec(kind=kind, temperature=1.0, dtype=DTYPE_NAMES["float32"])


def asks(spec: JobSpec) -> list[rollout_pb2.ScoreSpec]:
    """Every kind of score that a rollout of the job may ask a teacher for."""
    found = [train_score(stage) for stage in spec.stages]
    for stage in spec.stages:
        if stage.loss.record_top_k() and stage.loss.payload() == "top_k":  # support union: the student's tokens, too
            found.append(rollout_pb2.ScoreSpec(kind=rollout_pb2.SCORE_KIND_TARGETS, temperature=1.0))
    if spec.measures_kl():
        kinds = held_out_kinds(by_spans=spec.crosses_tokenizers())
        found += [held_out_score(kind) for kind in kinds]
    return [score for score in found if score.kind != rollout_pb2.SCORE_KIND_NONE]
