"""Between the queue's messages and the engine's: rollouts in, scores and failures out."""

from __future__ import annotations

from typing import Final, TypeVar

import numpy as np

from stillhouse.core.errors import WireError
from stillhouse.core.queue.streams import MAX_ENTRY_BYTES, Scope
from stillhouse.core.rollouts import SCHEMA_VERSION
from stillhouse.core.tensors import from_tensor, ids_list, ids_tensor, to_tensor
from stillhouse.teacher.blobstore import BlobStore
from stillhouse.teacher.engines.base import Scored, ScoreItem, Spans
from stillhouse.teacher.scoring import Batch
from stillhouse.v1 import rollout_pb2 as pb
from stillhouse.v1 import tensor_pb2

ListScore = TypeVar("ListScore", pb.TopKScore, pb.TargetsScore)
INLINE_BYTES: Final = 256 << 10
"""Larger top-k and targets payloads stay here and are fetched: most of an entry of the queue is for the rollout."""
ENTRY_BYTES: Final = MAX_ENTRY_BYTES - (4 << 10)
"""Rollout and payload together; the rest of an entry is for names and the message's own bytes."""
PER_TOKEN: Final = (
    "prompt_ids",
    "teacher_prompt_ids",
    "completion_ids",
    "rollout_logprobs",
    "loss_mask",
    "target_ids",
    "entropies",
)
"""What grows with the length of a rollout."""
HALF_DTYPES: Final = (tensor_pb2.DATA_TYPE_UNSPECIFIED, tensor_pb2.DATA_TYPE_FLOAT16)


def make_item(rollout: pb.Rollout, read_ids: list[int] | None = None, spans: Spans | None = None) -> ScoreItem:
    """What the engine needs of a rollout; with `spans` the completion is `read_ids`, the teacher's own tokens.

    Raises:
        WireError: a tensor contradicts its shape, or the request makes no sense.
    """
    spec = rollout.score
    kind = spec.kind if spans is None else pb.SCORE_KIND_SAMPLED
    if kind not in (pb.SCORE_KIND_SAMPLED, pb.SCORE_KIND_TOPK, pb.SCORE_KIND_TARGETS, pb.SCORE_KIND_HIDDEN):
        raise WireError(f"sample {rollout.sample_id}: score kind {spec.kind} is unknown here")
    if spec.dtype not in (*HALF_DTYPES, tensor_pb2.DATA_TYPE_FLOAT32):
        raise WireError(f"sample {rollout.sample_id}: scores travel as float16 or float32, not as type {spec.dtype}")
    own_prompt = rollout.HasField("teacher_prompt_ids")
    targets = None
    if rollout.HasField("target_ids"):
        targets = from_tensor(rollout.target_ids)
        if targets.ndim != 2:
            raise WireError(f"sample {rollout.sample_id}: target_ids must be [T, K], got {list(targets.shape)}")
    return ScoreItem(
        key=rollout.sample_id,
        prompt_ids=ids_list(rollout.teacher_prompt_ids if own_prompt else rollout.prompt_ids),
        completion_ids=ids_list(rollout.completion_ids) if read_ids is None else read_ids,
        kind=kind,
        temperature=spec.temperature or 1.0,
        top_k=spec.top_k,
        half=spec.dtype in HALF_DTYPES,
        target_ids=targets,
        spans=spans,
        traceparent=rollout.traceparent,
    )


def make_score(
    rollout: pb.Rollout,
    item: ScoreItem,
    scored: Scored,
    batch: Batch,
    scope: Scope,
    blobs: BlobStore,
    instance: str,
    *,
    is_inline: bool = False,
) -> pb.Score:
    """The score that goes on the queue; what is too big for it is kept in `blobs`: hidden states always, lists unless
    `is_inline`, for callers who get it over another way.
    """
    score = pb.Score(
        schema_version=SCHEMA_VERSION,
        rollout=rollout,
        teacher_sha256=batch.sha256,
        teacher_instance=instance,
        score_s=batch.score_s,
        is_cached=batch.is_cached,
    )
    teacher_logprobs = to_tensor(scored.teacher_logprobs)
    if item.spans is not None:
        score.spans.teacher_ids.CopyFrom(ids_tensor(item.completion_ids))
        score.spans.teacher_logprobs.CopyFrom(teacher_logprobs)
        score.spans.student_ends.CopyFrom(ids_tensor(item.spans.student_ends))
        score.spans.teacher_ends.CopyFrom(ids_tensor(item.spans.teacher_ends))
        if not all(item.spans.is_canonical):
            score.spans.is_canonical.CopyFrom(to_tensor(np.array(item.spans.is_canonical, dtype=np.uint8)))
    elif rollout.score.kind == pb.SCORE_KIND_HIDDEN:
        assert scored.hidden is not None, "the engine gives what the kind asks for"
        hidden = to_tensor(scored.hidden)
        score.hidden.blob.CopyFrom(blobs.put(scope, hidden.data))
        score.hidden.dtype = hidden.dtype
        score.hidden.shape.extend(hidden.shape)
        score.hidden.teacher_logprobs.CopyFrom(teacher_logprobs)
        score.hidden.head_sha256 = batch.head_sha256
    elif rollout.score.kind == pb.SCORE_KIND_TOPK:
        assert scored.topk_ids is not None, "the engine gives what the kind asks for"
        assert scored.topk_logprobs is not None
        assert scored.tail_logprobs is not None
        topk = pb.TopKScore(
            teacher_topk_ids=to_tensor(scored.topk_ids),
            teacher_topk_logprobs=to_tensor(scored.topk_logprobs),
            tail_logprobs=to_tensor(scored.tail_logprobs),
            teacher_logprobs=teacher_logprobs,
        )
        if scored.target_logprobs is not None:
            topk.target_logprobs.CopyFrom(to_tensor(scored.target_logprobs))
        score.topk.CopyFrom(topk if is_inline or _fits(rollout, topk) else _kept(topk, scope, blobs))
    elif rollout.score.kind == pb.SCORE_KIND_TARGETS:
        assert scored.target_logprobs is not None, "the engine gives what the kind asks for"
        targets = pb.TargetsScore(target_logprobs=to_tensor(scored.target_logprobs), teacher_logprobs=teacher_logprobs)
        score.targets.CopyFrom(targets if is_inline or _fits(rollout, targets) else _kept(targets, scope, blobs))
    else:
        score.sampled.teacher_logprobs.CopyFrom(teacher_logprobs)
    return score


def _fits(rollout: pb.Rollout, payload: pb.TopKScore | pb.TargetsScore) -> bool:
    """Whether the queue carries a payload beside its rollout, which may be large itself: it names target ids."""
    size = payload.ByteSize()
    return size <= INLINE_BYTES and rollout.ByteSize() + size <= ENTRY_BYTES


def _kept(score: ListScore, scope: Scope, blobs: BlobStore) -> ListScore:
    """The message with a reference only; the payload is the message itself, serialized."""
    return type(score)(blob=blobs.put(scope, score.SerializeToString()))


def blob_key(score: pb.Score) -> str:
    """Key of the payload a score refers to; empty = none."""
    kind = score.WhichOneof("result")
    return getattr(score, kind).blob.key if kind in ("hidden", "topk", "targets") else ""


def score_bytes(score: pb.Score) -> int:
    """Size of a score with its payload, without the rollout it carries."""
    kind = score.WhichOneof("result")
    payload = getattr(score, kind).blob.size_bytes if kind in ("hidden", "topk", "targets") else 0
    return score.ByteSize() - score.rollout.ByteSize() + payload


def make_failure(rollout: pb.Rollout, instance: str, reason: str, message: str, attempts: int) -> pb.Score:
    """The end of a sample that could not be scored."""
    failure = pb.Failure(reason=reason, message=message, service="teacher", attempts=attempts)
    return pb.Score(schema_version=SCHEMA_VERSION, rollout=rollout, failed=failure, teacher_instance=instance)


def without_tokens(rollout: pb.Rollout) -> pb.Rollout:
    """The rollout's identity, where its tokens do not fit into an entry."""
    small = pb.Rollout()
    small.CopyFrom(rollout)
    for name in PER_TOKEN:
        small.ClearField(name)
    return small
