"""A sample before anybody has written it: what sampler and trainer both make of a prompt group."""

from __future__ import annotations

from typing import Final

from stillhouse.v1 import rollout_pb2 as pb

SCHEMA_VERSION: Final = 1


def sample_id(group: pb.PromptGroup, index: int) -> str:
    """Name of a sample: "group/i"."""
    return f"{group.group_id}/{index}"


def score_mark(name: str, attempt: int = 0) -> str:
    """Mark of a sample's end in an attempt at scoring it. A sampler that ends it shares attempt 0 with the teacher's
    score: whoever comes first is the end."""
    return f"score:{name}:{attempt}"


def blank_rollout(group: pb.PromptGroup, index: int) -> pb.Rollout:
    """A sample of the group without its completion, and without whoever writes it."""
    rollout = pb.Rollout(
        schema_version=SCHEMA_VERSION,
        job_id=group.job_id,
        epoch=group.epoch,
        sample_id=sample_id(group, index),
        purpose=group.purpose,
        group=group.group,
        index=index,
        teacher=group.teacher,
        prompt_ids=group.prompt_ids,
        sampling=group.sampling,
        score=group.score,
        seed=dict(zip(group.sample_indices, group.seeds, strict=False)).get(index, 0),
        row=group.row,
        traceparent=group.traceparent,
    )
    if group.HasField("teacher_prompt_ids"):
        rollout.teacher_prompt_ids.CopyFrom(group.teacher_prompt_ids)
    return rollout
