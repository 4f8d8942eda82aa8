"""Wire messages become the learner's samples, whoever wrote the completion and whether or not a teacher was asked."""

from __future__ import annotations

import numpy as np
import pytest

from stillhouse.core.errors import WireError
from stillhouse.core.tensors import floats_tensor, ids_tensor
from stillhouse.trainer.scored import ScoredSample
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


def with_lists(kind: str) -> pb.Score:
    """Three tokens, two ids by the teacher and three by the student at each."""
    score = scored(is_scored=False)
    score.rollout.target_ids.CopyFrom(ids_tensor(np.arange(9).reshape(3, 3)))
    score.rollout.entropies.CopyFrom(floats_tensor([0.5, 0.0, 2.0]))
    named = floats_tensor(np.full((3, 3), -3.0))
    if kind == "targets":
        score.targets.CopyFrom(pb.TargetsScore(target_logprobs=named, teacher_logprobs=floats_tensor([-2.0] * 3)))
    else:
        score.topk.CopyFrom(
            pb.TopKScore(
                teacher_topk_ids=ids_tensor(np.zeros((3, 2))),
                teacher_topk_logprobs=floats_tensor(np.full((3, 2), -4.0)),
                teacher_logprobs=floats_tensor([-2.0] * 3),
                target_logprobs=named,
            )
        )
    return score


@pytest.mark.parametrize("kind", ["targets", "topk"])
def test_named_tokens_come_with_what_the_teacher_says_of_them(kind: str) -> None:
    sample = to_sample(ScoredSample(with_lists(kind)), 1.0)
    assert sample.target_ids is not None
    assert sample.target_logprobs is not None
    assert sample.entropies is not None
    assert sample.target_ids.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert (sample.target_logprobs == -3).all()
    assert sample.entropies.tolist() == [0.5, 0.0, 2.0]
    assert (sample.teacher_logprobs == -2).all()
    assert (sample.topk_ids is None) == (kind == "targets")


def test_lists_of_different_shapes_are_refused() -> None:
    score = with_lists("topk")
    score.topk.target_logprobs.CopyFrom(floats_tensor(np.zeros((3, 2))))
    with pytest.raises(WireError, match=r"4/0: \[3, 2\] target_logprobs for \[3, 3\] target_ids"):
        to_sample(ScoredSample(score), 1.0)


def test_log_probabilities_of_different_temperatures_are_not_compared() -> None:
    score = scored()
    score.rollout.sampling.temperature = score.rollout.score.temperature = 0.7
    to_sample(ScoredSample(score), 1.0, 0.7)  # the same number, although it travelled in single precision
    with pytest.raises(WireError, match=r"4/0 was scored at temperature 0\.7, its stage trains at 0\.8"):
        to_sample(ScoredSample(score), 1.0, 0.8)
    score.rollout.sampling.temperature = 0.9
    with pytest.raises(WireError, match=r"4/0 was sampled at temperature 0\.9, its stage trains at 0\.7"):
        to_sample(ScoredSample(score), 1.0, 0.7)
    score.rollout.origin = pb.ORIGIN_DATA
    to_sample(ScoredSample(score), 1.0, 0.7)  # nobody sampled it


@pytest.mark.parametrize(("option", "value"), [("top_p", 0.9), ("top_k", 5), ("min_p", 0.1)])
def test_samples_drawn_from_a_part_of_the_vocabulary_are_flagged(option: str, value: float) -> None:
    score = scored()
    score.rollout.sampling.top_p = 1
    assert not to_sample(ScoredSample(score), 1.0).is_filtered
    setattr(score.rollout.sampling, option, value)
    assert to_sample(ScoredSample(score), 1.0).is_filtered
