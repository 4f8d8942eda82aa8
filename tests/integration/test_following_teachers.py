"""Jobs whose teacher is a moving average of their own student, through real services; jobs nobody can serve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from structlog.testing import capture_logs

from stillhouse.core.tensors import from_tensor
from stillhouse.teacher import app as teacher_app
from stillhouse.teacher.engines.base import Abilities
from stillhouse.trainer.journal import read_step
from stillhouse.v1 import rollout_pb2 as pb
from tests.cluster import Cluster, job_spec
from tests.waiting import wait_until

ROWS = [{"prompt": f"say {number}", "teacher": "self" if number % 2 else "main"} for number in range(4)]


def spec(decay: float, every: int = 1, **changes: Any) -> dict[str, Any]:
    """Half of the rows go to a frozen teacher, which moves the student."""
    return job_spec(
        teachers__self={"model": "student", "ema_of_student": {"decay": decay, "every": every}},
        stages__0__data__rows=ROWS,
        stages__0__loss={"objective": "top_k", "k": 16},
        stages__0__optimizer__lr=5e-3,
        **changes,
    )


def own_scores(made: Cluster, job_id: str, steps: int, epochs: Sequence[int] = (1,)) -> list[list[pb.Score]]:
    """By step, what the teacher that follows the student said."""
    artifacts = made.ctx.artifacts.job(job_id)
    found = []
    for step in range(steps):
        paths = [artifacts.journal(epoch, step) for epoch in epochs if artifacts.journal(epoch, step).exists()]
        found.append([score for score in read_step(paths[-1]).scores if score.rollout.teacher == "self"])
    return found


async def at_step(made: Cluster, job_id: str, step: int) -> None:
    async def reached() -> bool:
        record = await made.ctx.jobs.get(job_id)
        assert record.status != "failed", record.error
        return record.step >= step

    await wait_until(reached, timeout_s=60, what=f"step {step}")


async def test_without_decay_and_staleness_it_is_the_student_for_jobs_beside_each_other(deployment: Cluster) -> None:
    for name in ("sampler-1", "trainer-1"):
        await deployment.start(name.partition("-")[0], name)
    schedule = {"steps": 4, "prompts_per_step": 4, "max_staleness": 0}
    jobs = [
        await deployment.submit(spec(0, stages__0__schedule=schedule, samplers={"max": 1}, seed=seed))
        for seed in (1, 2)
    ]
    names: list[set[str]] = []
    for job_id in jobs:
        record = await deployment.ended(job_id)
        assert record.status == "succeeded", record.error
        steps = own_scores(deployment, job_id, 4)
        for scores in steps:
            assert len(scores) == 2
            for score in scores:
                assert score.teacher_sha256 == score.rollout.weights_sha256, "the weights that wrote it judge it"
                gap = from_tensor(score.topk.teacher_logprobs) - from_tensor(score.rollout.rollout_logprobs)
                assert np.abs(gap).max() <= 1e-4
        names.append({score.teacher_sha256 for scores in steps for score in scores})
    assert [len(found) for found in names] == [4, 4], "the student moves with every step"
    assert len(names[0] & names[1]) == 1, "the jobs share the registered weights and nothing else"


async def test_it_outlives_a_killed_teacher_and_a_killed_trainer(deployment: Cluster) -> None:
    schedule = {"steps": 9, "prompts_per_step": 4, "max_staleness": 1}
    job_id = await deployment.submit(spec(0.5, every=3, stages__0__schedule=schedule))
    await at_step(deployment, job_id, 2)
    await deployment.crash("teacher-0")
    await deployment.start("teacher", "teacher-0")
    await at_step(deployment, job_id, 5)
    await deployment.crash("trainer-0")
    await deployment.start("trainer", "trainer-1")
    record = await deployment.ended(job_id)
    assert (record.status, record.epoch) == ("succeeded", 2), record.error
    assert record.usage["failed_samples"] == 0
    steps = own_scores(deployment, job_id, 9, (1, 2))
    assert all(len(scores) == 2 for scores in steps)
    # an average that started from the weights of a later step would have another name
    seen = list(dict.fromkeys(score.teacher_sha256 for scores in steps for score in scores))
    assert seen[0] == steps[0][0].rollout.weights_sha256
    assert 2 <= len(seen) <= 3, "versions 0, 3 and 6 have one each, before and after the kills"
    for scores in steps:
        for score in scores:
            newest = max(span.policy_version for span in score.rollout.spans)
            assert seen.index(score.teacher_sha256) >= newest // 3, "at least as new as what wrote the sample"


async def test_a_job_that_no_teacher_can_serve_fails_at_its_start(
    deployment: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacking = Abilities("half", lacks={int(pb.SCORE_KIND_HIDDEN): "has no hidden states; use top_k"})
    monkeypatch.setattr(teacher_app, "TRANSFORMERS", lacking)
    await deployment.stop("teacher-0")
    await deployment.start("teacher", "teacher-0")
    refused = await deployment.ended(await deployment.submit(job_spec()))
    assert refused.status == "failed"
    assert refused.error is not None
    assert "teacher 'main': engine half has no hidden states; use top_k" in refused.error["message"]
    served = job_spec(stages__0__loss={"objective": "top_k", "k": 4}, stages__0__schedule__steps=1)
    assert (await deployment.ended(await deployment.submit(served))).status == "succeeded"
    # beside one that can, it leaves the stream alone
    monkeypatch.undo()
    await deployment.start("teacher", "teacher-1")
    job_id = await deployment.submit(job_spec(stages__0__schedule__steps=2))
    assert (await deployment.ended(job_id)).status == "succeeded"
    journal = read_step(deployment.ctx.artifacts.job(job_id).journal(1, 0))
    assert {score.teacher_instance for score in journal.scores} == {"teacher-1"}


async def test_a_job_taken_over_where_no_teacher_can_serve_it_says_so_and_waits(
    deployment: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = await deployment.submit(job_spec(stages__0__schedule__steps=4))
    await at_step(deployment, job_id, 1)
    await deployment.crash("trainer-0")
    await deployment.stop("teacher-0")
    lacking = Abilities("half", lacks={int(pb.SCORE_KIND_HIDDEN): "has no hidden states; use top_k"})
    monkeypatch.setattr(teacher_app, "TRANSFORMERS", lacking)
    await deployment.start("teacher", "teacher-0")
    with capture_logs() as logs:
        await deployment.start("trainer", "trainer-1")

        async def says_so() -> bool:
            phase = (await deployment.ctx.jobs.get(job_id)).progress.get("phase", "")
            return phase.startswith("waiting for a teacher: ") and "half has no hidden states; use top_k" in phase

        await wait_until(says_so, timeout_s=30, what="the reason in the job's progress")
        monkeypatch.undo()
        await deployment.start("teacher", "teacher-1")
        record = await deployment.ended(job_id)
    assert (record.status, record.epoch) == ("succeeded", 2), record.error
    assert [log["log_level"] for log in logs if log["event"] == "waiting for a teacher"] == ["warning"]


async def test_a_deterministic_job_is_left_alone_by_teachers_with_other_threads(deployment: Cluster) -> None:
    await deployment.stop("teacher-0")
    agreed = deployment.settings
    deployment.settings = agreed.model_copy(update={"threads": agreed.threads + 1})
    await deployment.start("teacher", "teacher-1")
    deployment.settings = agreed
    deterministic = job_spec(deterministic=True, stages__0__schedule__steps=2)
    refused = await deployment.ended(await deployment.submit(deterministic))
    assert refused.error is not None
    assert "needs engine transformers with 1 threads, as in its trainer" in refused.error["message"]
    assert "this teacher has engine transformers with 2" in refused.error["message"]
    await deployment.start("teacher", "teacher-0")
    job_id = await deployment.submit(deterministic)
    record = await deployment.ended(job_id)
    assert record.status == "succeeded", record.error
    journals = [read_step(deployment.ctx.artifacts.job(job_id).journal(1, step)) for step in range(2)]
    assert {score.teacher_instance for journal in journals for score in journal.scores} == {"teacher-0"}
