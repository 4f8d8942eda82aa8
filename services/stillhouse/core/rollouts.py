"""A sample before anybody has written it, and its way to its teachers: what sampler, teacher and trainer agree on."""

from __future__ import annotations

from typing import Final

from stillhouse.v1 import rollout_pb2 as pb

SCHEMA_VERSION: Final = 1


def sample_id(group: pb.PromptGroup, index: int) -> str:
    """Name of a sample: "group/i"."""
    return f"{group.group_id}/{index}"


def rollout_mark(name: str, teacher: str, attempt: int = 0) -> str:
    """Mark of a sample on its way to a teacher; a sampler's attempt is that of its group."""
    return f"rollout:{name}:{teacher}:{attempt}"


def score_mark(name: str, teacher: str, attempt: int = 0) -> str:
    """Mark of a teacher's word on a sample in an attempt at scoring it. A sampler that ends the sample shares its
    group's attempt with the sample's (first) teacher: whoever comes first is the end."""
    return f"score:{name}:{teacher}:{attempt}"


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
        attempt=group.attempt,
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


def rollout_for(rollout: pb.Rollout, other: pb.FurtherTeacher | pb.Rollout) -> pb.Rollout:
    """The sample as another teacher of its mixture gets it, attempt 0."""
    asked = pb.Rollout()
    asked.CopyFrom(rollout)
    asked.teacher, asked.attempt = other.teacher, 0
    asked.ClearField("teacher_prompt_ids")
    if other.HasField("teacher_prompt_ids"):
        asked.teacher_prompt_ids.CopyFrom(other.teacher_prompt_ids)
    return asked


def add_further(score: pb.Score, further: pb.Score) -> None:
    """Put what another teacher of a mixture said beside what the first one did; the tokens are there once."""
    added = score.further.add()
    added.CopyFrom(further)
    added.rollout.CopyFrom(pb.Rollout(teacher=further.rollout.teacher, attempt=further.rollout.attempt))
    if further.rollout.HasField("teacher_prompt_ids"):
        added.rollout.teacher_prompt_ids.CopyFrom(further.rollout.teacher_prompt_ids)


def scores_of(score: pb.Score) -> list[pb.Score]:
    """What each teacher of a sample said, the first one's first."""
    return [score, *score.further]


def scores_apart(score: pb.Score) -> list[pb.Score]:
    """The same as scores of their own, each with the whole rollout."""
    found = [score]
    if score.further:
        alone = pb.Score()
        alone.CopyFrom(score)
        alone.ClearField("further")
        found = [alone]
    for further in score.further:
        whole = pb.Score()
        whole.CopyFrom(further)
        whole.rollout.CopyFrom(rollout_for(score.rollout, further.rollout))
        found.append(whole)
    return found
