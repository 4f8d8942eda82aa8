"""The oracle on jobs whose teacher has another tokenizer: scores of spans, with lengths of their own."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillhouse.core.oracle.verify import verify_job
from stillhouse.core.tensors import floats_tensor, ids_tensor, to_tensor
from stillhouse.v1 import rollout_pb2 as pb
from tests.unit.oracle_cases import STEPS, Job


class Spanned(Job):
    """The teacher reads each completion as two tokens more; each is one span, spelled as usual or not."""

    def score(self, group: int, index: int, step: int, **changes: Any) -> pb.Score:
        score = super().score(group, index, step, **changes)
        num_tokens = score.rollout.completion_ids.shape[0]
        score.spans.teacher_ids.CopyFrom(ids_tensor(range(num_tokens + 2)))
        score.spans.teacher_logprobs.CopyFrom(floats_tensor([-2.0] * (num_tokens + 2)))
        score.spans.student_ends.CopyFrom(ids_tensor([num_tokens]))
        score.spans.teacher_ends.CopyFrom(ids_tensor([num_tokens + 2]))
        if index == 1:
            score.spans.is_canonical.CopyFrom(to_tensor(np.zeros(1, np.uint8)))
        return score


@pytest.fixture
def job(tmp_path: Path) -> Spanned:
    made = Spanned(tmp_path, stages__0__loss={"objective": "policy_gradient", "cross_tokenizer": True})
    made.open()
    made.run(3)
    return made


def test_an_honest_job_is_clean_also_after_a_takeover(job: Spanned) -> None:
    job.open()
    job.run(STEPS)
    job.finish()
    report = verify_job(job.artifacts, job.record)
    assert report.ok, report.text()


EDITS: dict[str, tuple[str, Callable[[pb.Score], Any]]] = {
    "beyond the completion": ("values", lambda s: s.spans.student_ends.CopyFrom(ids_tensor([99]))),
    "beyond the teacher's tokens": ("values", lambda s: s.spans.teacher_ends.CopyFrom(ids_tensor([99]))),
    "an empty span": ("values", lambda s: s.spans.student_ends.CopyFrom(ids_tensor([0]))),
    "one side only": ("values", lambda s: s.spans.teacher_ends.CopyFrom(ids_tensor([]))),
    "a mark too many": ("values", lambda s: s.spans.is_canonical.CopyFrom(to_tensor(np.ones(2, np.uint8)))),
    "a token without its id": ("values", lambda s: s.spans.teacher_ids.CopyFrom(ids_tensor([1, 2]))),
    "NaN": ("values", lambda s: s.spans.teacher_logprobs.CopyFrom(floats_tensor([math.nan] * 3))),
    "scores of tokens": ("kind", lambda s: s.sampled.teacher_logprobs.CopyFrom(s.rollout.rollout_logprobs)),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_broken_rule_is_named(job: Spanned, name: str) -> None:
    rule, edit = EDITS[name]
    assert verify_job(job.artifacts, job.record).ok
    scores = job.scores(1)
    edit(scores[0])
    job.journal(1, scores)
    assert rule in verify_job(job.artifacts, job.record).broken_rules()
