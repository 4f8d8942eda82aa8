"""What every engine checks of an item before it scores it."""

from __future__ import annotations

import numpy as np

from stillhouse.teacher.engines.base import Engine, ScoreItem, Unscored
from stillhouse.v1 import rollout_pb2 as pb


def problem(item: ScoreItem, engine: Engine) -> Unscored | None:
    """Why an item cannot be scored by an engine of this length and vocabulary; None = it can."""
    if not item.prompt_ids or not item.completion_ids:
        sizes = f"{len(item.prompt_ids)} prompt and {len(item.completion_ids)} completion tokens"
        return Unscored(item.key, "empty", f"{sizes}; both are needed")
    if item.length > engine.max_sequence_length:
        return Unscored(item.key, "too_long", f"{item.length} tokens; the teacher reads {engine.max_sequence_length}")
    shape = None if item.target_ids is None else list(item.target_ids.shape)
    is_wrong = shape is not None and shape[0] != len(item.completion_ids)
    if is_wrong or (shape is None and item.kind == pb.SCORE_KIND_TARGETS):
        return Unscored(item.key, "bad_request", f"target_ids {shape} for {len(item.completion_ids)} tokens")
    named = np.zeros(0, np.int64) if item.target_ids is None else item.target_ids.ravel()
    wanted = np.concatenate([item.prompt_ids, item.completion_ids, named])
    if wanted.min() < 0 or wanted.max() >= engine.vocab_size:
        worst = wanted[np.abs(wanted).argmax()]
        return Unscored(item.key, "bad_ids", f"token id {worst}; the teacher knows {engine.vocab_size} ids")
    if item.kind == pb.SCORE_KIND_TOPK and not 0 < item.top_k <= engine.vocab_size:
        return Unscored(item.key, "bad_request", f"top_k {item.top_k} of a vocabulary of {engine.vocab_size}")
    return None
