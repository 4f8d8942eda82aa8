"""Samples that failed and are tried again, because a user asks for it: what becomes of their messages.

Safe as long as the trainer has not put their step together: until then a failure is only a sample that has ended, and
nothing was trained on. The trainer decides, since only it knows. Queue entries and marks of the new attempt are new
ones, so nothing of the old one is taken for it, and each sample still ends once.
"""

from __future__ import annotations

from typing import Final

from stillhouse.core import tracing
from stillhouse.trainer.scored import PendingGroup, ScoredSample
from stillhouse.v1 import rollout_pb2

RETRY_STRIDE: Final = 100
"""Attempts that a retry is ahead: the trainer itself puts a sample back a few times in between."""


def why_not(pending: PendingGroup | None, failed: ScoredSample | None) -> str:
    """Why a sample cannot be tried again, for people; '' = it can."""
    if pending is None or pending.is_journalled:
        return "its step (or evaluation) is done or about to be, and goes on without it; train on its row in a new job"
    if failed is None:
        return "it is not known here, or is being worked on"
    if not failed.is_failed:
        return "it has a score"
    if failed.score.rollout.completion_ids.data:
        return ""
    if pending.message is None:
        return "its text was to come from the data or a teacher, and could not be had: see its message"
    if len(pending.answers[failed.sample_id]) > 1:
        return "other teachers have scored the text that it had, and it would be written anew"
    return ""


def attempted(rollout: rollout_pb2.Rollout, attempt: int, epoch: int) -> rollout_pb2.Rollout:
    """The rollout for another attempt at scoring it."""
    again = rollout_pb2.Rollout()
    again.CopyFrom(rollout)
    again.attempt, again.epoch = attempt, epoch
    return again


def mark_again(rollout: rollout_pb2.Rollout, attempt: int) -> None:
    """A point in the trace: the sample is tried again; linked is whoever wrote or planned it before."""
    ids = {"job_id": rollout.job_id, "sample_id": rollout.sample_id}
    with tracing.span("again", links=[rollout.traceparent], attributes={"stillhouse.attempt": attempt}, **ids):
        pass


def alone(group: rollout_pb2.PromptGroup | None, rollout: rollout_pb2.Rollout, attempt: int) -> rollout_pb2.PromptGroup:
    """A sample of a group in a group of its own, to be written in another attempt: same seed, same weights or newer."""
    assert group is not None, "without it the retry was refused"
    again = rollout_pb2.PromptGroup()
    again.CopyFrom(group)
    again.ClearField("sample_indices")
    again.ClearField("seeds")
    again.sample_indices.append(rollout.index)
    again.seeds.append(dict(zip(group.sample_indices, group.seeds, strict=True))[rollout.index])
    again.attempt = attempt
    return again
