"""The oracle on jobs whose texts the student did not all write, and on jobs with outcome rewards."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stillhouse.core.oracle.samples import origin_of
from stillhouse.core.oracle.verify import verify_job
from stillhouse.core.spec import StageSpec
from stillhouse.core.tensors import floats_tensor, ids_tensor
from stillhouse.trainer.prompts import is_on_policy
from stillhouse.v1 import rollout_pb2 as pb
from tests.cluster import job_spec
from tests.unit.oracle_cases import STEPS, Job, failed

MIXTURE: dict[str, Any] = {
    "stages__0__loss": {"objective": "top_k", "k": 3},
    "stages__0__on_policy_fraction": 0.5,
    "stages__0__off_policy_source": "teacher",
}
GRPO: dict[str, Any] = {
    "teachers": {},
    "stages__0__loss": {"objective": "policy_gradient", "teacher_weight": 0, "reward": {"verifier": "exact"}},
}


class Mixed(Job):
    """A job with `MIXTURE` or `GRPO`."""

    def score(self, group: int, index: int, step: int, **changes: Any) -> pb.Score:
        score = super().score(group, index, step, **changes)
        num_tokens = score.rollout.completion_ids.shape[0]
        score.ClearField("sampled")
        if not self.spec.teachers:
            score.rollout.teacher, score.reward = "", 1.0
            score.none.SetInParent()
            return score
        for name, number in (("teacher_topk_ids", 3), ("teacher_topk_logprobs", 3)):
            make = ids_tensor if name.endswith("ids") else floats_tensor
            getattr(score.topk, name).CopyFrom(make([-1] * num_tokens * number))
            getattr(score.topk, name).shape[:] = [num_tokens, number]
        score.topk.teacher_logprobs.CopyFrom(floats_tensor([-2.0] * num_tokens))
        if not is_on_policy(self.spec.seed, group, self.spec.stages[0].on_policy_fraction):
            score.rollout.origin = pb.ORIGIN_TEACHER
            for name in ("rollout_logprobs", "spans", "weights_sha256"):
                score.rollout.ClearField(name)
        return score


def job(root: Path, changes: dict[str, Any], until: int) -> Mixed:
    made = Mixed(root, **changes)
    made.open()
    made.run(until)
    return made


@pytest.mark.parametrize("changes", [MIXTURE, GRPO], ids=["mixture", "grpo"])
def test_an_honest_job_is_clean_also_after_a_takeover(tmp_path: Path, changes: dict[str, Any]) -> None:
    made = job(tmp_path, changes, 3)
    made.open()
    made.run(STEPS)
    made.finish()
    report = verify_job(made.artifacts, made.record)
    assert report.ok, report.text()


def _pretend(score: pb.Score) -> None:
    """The teacher's text, sold as the student's own."""
    rollout = score.rollout
    rollout.origin = pb.ORIGIN_STUDENT
    rollout.rollout_logprobs.CopyFrom(floats_tensor([-1.0] * rollout.completion_ids.shape[0]))
    rollout.spans.add(first_token=0, policy_version=1, epoch=1)


def _unscored(score: pb.Score) -> None:
    score.none.SetInParent()


EDITS: dict[str, tuple[str, dict[str, Any], pb.Origin, Callable[[pb.Score], Any]]] = {
    "claims to be on-policy": ("origin", MIXTURE, pb.ORIGIN_TEACHER, _pretend),
    "claims to be the teacher's": (
        "origin",
        MIXTURE,
        pb.ORIGIN_UNSPECIFIED,
        lambda s: setattr(s.rollout, "origin", pb.ORIGIN_TEACHER),
    ),
    "of another source": (
        "origin",
        MIXTURE,
        pb.ORIGIN_TEACHER,
        lambda s: setattr(s.rollout, "origin", pb.ORIGIN_DATA),
    ),
    "a failure of another origin": (
        "origin",
        MIXTURE,
        pb.ORIGIN_TEACHER,
        lambda s: (setattr(s.rollout, "origin", pb.ORIGIN_DATA), failed(s, "not_written")),
    ),
    "weights for a teacher's text": (
        "origin",
        MIXTURE,
        pb.ORIGIN_TEACHER,
        lambda s: setattr(s.rollout, "weights_sha256", "1-1"),
    ),
    "no policy version of an own text": (
        "spans",
        MIXTURE,
        pb.ORIGIN_UNSPECIFIED,
        lambda s: s.rollout.ClearField("spans"),
    ),
    "not scored by the teacher": ("kind", MIXTURE, pb.ORIGIN_TEACHER, _unscored),
    "scored without a teacher": (
        "kind",
        GRPO,
        pb.ORIGIN_UNSPECIFIED,
        lambda s: s.sampled.teacher_logprobs.CopyFrom(floats_tensor([-1.0] * s.rollout.completion_ids.shape[0])),
    ),
    "no reward": ("reward", GRPO, pb.ORIGIN_UNSPECIFIED, lambda s: s.ClearField("reward")),
    "a reward that is no number": ("reward", GRPO, pb.ORIGIN_UNSPECIFIED, lambda s: setattr(s, "reward", math.nan)),
    "a reward above 1": ("reward", GRPO, pb.ORIGIN_UNSPECIFIED, lambda s: setattr(s, "reward", 1.5)),
    "a reward nobody asked for": ("reward", MIXTURE, pb.ORIGIN_UNSPECIFIED, lambda s: setattr(s, "reward", 1.0)),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_broken_rule_is_named(tmp_path: Path, name: str) -> None:
    rule, changes, origin, edit = EDITS[name]
    made = job(tmp_path, changes, 3)
    assert verify_job(made.artifacts, made.record).ok
    step = next(step for step in range(3) for score in made.scores(step) if score.rollout.origin == origin)
    scores = made.scores(step)
    edit(next(score for score in scores if score.rollout.origin == origin))
    made.journal(step, scores)
    assert rule in verify_job(made.artifacts, made.record).broken_rules()


def test_a_row_keeps_its_completion(tmp_path: Path) -> None:
    """The same row in a later pass over the data, with another text."""
    source = {"on_policy_fraction": 0, "off_policy_source": "data"}
    made = Mixed(
        tmp_path,
        **{f"stages__0__{name}": value for name, value in source.items()},
        stages__0__loss={"objective": "cross_entropy"},
        stages__0__schedule__group_size=1,
        teachers={},
    )
    made.open()
    for step in range(3):
        scores = [pb.Score(rollout=s.rollout, none=pb.NoScore()) for s in made.scores(step) if s.rollout.index == 0]
        for score in scores:
            score.rollout.origin = pb.ORIGIN_DATA
            for name in ("rollout_logprobs", "spans", "weights_sha256"):
                score.rollout.ClearField(name)
            score.rollout.completion_ids.CopyFrom(ids_tensor([score.rollout.row, 2 + (step == 2)]))
        made.train(step, made.journal(step, scores))
    assert verify_job(made.artifacts).broken_rules() == {"rows"}


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 1.0])
def test_trainer_and_oracle_draw_the_same_groups(fraction: float) -> None:
    """Two programs, one rule; the share is that of the job."""
    stage = job_spec(stages__0__on_policy_fraction=fraction)["stages"][0]
    spec = StageSpec.model_validate(stage)
    own = [is_on_policy(3, group, fraction) for group in range(2000)]
    assert own == [origin_of(3, group, spec) == pb.ORIGIN_STUDENT for group in range(2000)]
    assert sum(own) / len(own) == pytest.approx(fraction, abs=0.05)
    assert own != [is_on_policy(4, group, fraction) for group in range(2000)] or fraction in (0, 1)
