"""Wire messages become the learner's samples, whoever wrote the completion and whether or not a teacher was asked."""

from __future__ import annotations

import numpy as np
import pytest

from stillhouse.core.errors import WireError
from stillhouse.core.tensors import floats_tensor, ids_tensor
from stillhouse.trainer.exchange import ScoredSample
from stillhouse.trainer.train import to_sample
from stillhouse.v1 import rollout_pb2 as pb


def scored(origin: pb.Origin = pb.ORIGIN_STUDENT, *, is_scored: bool = True) -> pb.Score:
    """A sample of three tokens."""
    rollout = pb.Rollout(sample_id="4/0", prompt_ids=ids_tensor([1]), completion_ids=ids_tensor([5, 6, 2]))
    rollout.origin = origin
    if origin in (pb.ORIGIN_STUDENT, pb.ORIGIN_UNSPECIFIED):
        rollout.rollout_logprobs.CopyFrom(floats_tensor([-1.0] * 3))
        rollout.spans.add(first_token=0, policy_version=7, epoch=1)
    if is_scored:
        sampled = pb.SampledScore(teacher_logprobs=floats_tensor([-2.0] * 3))
        return pb.Score(rollout=rollout, sampled=sampled)
    return pb.Score(rollout=rollout, none=pb.NoScore())


def test_the_student_wrote_what_names_no_origin() -> None:
    for origin in (pb.ORIGIN_UNSPECIFIED, pb.ORIGIN_STUDENT):
        sample = to_sample(ScoredSample(scored(origin)), 1.0)
        assert sample.is_on_policy
        assert sample.oldest_policy_version == 7
        np.testing.assert_array_equal(sample.rollout_logprobs, [-1, -1, -1])


@pytest.mark.parametrize("origin", [pb.ORIGIN_DATA, pb.ORIGIN_TEACHER])
def test_other_texts_have_no_policy_that_sampled_them(origin: pb.Origin) -> None:
    sample = to_sample(ScoredSample(scored(origin)), 1.0)
    assert not sample.is_on_policy
    assert np.isnan(sample.rollout_logprobs).all()
    np.testing.assert_array_equal(sample.teacher_logprobs, [-2, -2, -2])


def test_without_a_teacher_nobody_said_anything_of_the_tokens() -> None:
    sample = to_sample(ScoredSample(scored(is_scored=False)), 1.0)
    assert np.isnan(sample.teacher_logprobs).all()
    np.testing.assert_array_equal(sample.rollout_logprobs, [-1, -1, -1])


def test_a_text_of_the_student_without_a_policy_version_is_refused() -> None:
    score = scored()
    score.rollout.ClearField("spans")
    with pytest.raises(WireError, match="4/0"):
        to_sample(ScoredSample(score), 1.0)
