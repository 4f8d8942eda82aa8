"""Jobs that go on from a checkpoint of another: they end as that one would have, and stand by themselves."""

from __future__ import annotations

import pytest

from stillhouse.core.blobs import JobArtifacts, sha256_file
from stillhouse.core.errors import ConflictError, NotFoundError
from stillhouse.core.oracle.verify import verify_job
from stillhouse.core.queue.jobs import JobRecord
from stillhouse.core.spec import JobSpec
from stillhouse.gateway import deleting, jobs
from stillhouse.gateway.auth import Caller
from stillhouse.trainer.manifests import list_manifests
from tests.cluster import Cluster, job_spec

STEPS = 6


def exported(artifacts: JobArtifacts, record: JobRecord) -> str:
    return sha256_file(artifacts.export(record.epoch) / "model.safetensors")


def submission(record: JobRecord) -> jobs.Submission:
    return jobs.Submission(JobSpec.model_validate(record.spec), Caller(""), "")


async def test_a_retried_job_ends_as_the_first_did_also_when_that_is_deleted(deployment: Cluster) -> None:
    ctx = deployment.ctx
    schedule = {"steps": STEPS, "prompts_per_step": 2, "group_size": 2, "max_staleness": 1}
    rows = [{"prompt": word} for word in ("tea", "rain")]
    spec = job_spec(
        stages__0__schedule=schedule,
        deterministic=True,
        checkpoint={"every_steps": 2, "keep_last": 4},
        evaluation={"data": {"rows": rows}, "num_prompts": 2, "max_tokens": 6},
    )
    first, artifacts = await deployment.succeeded(await deployment.submit(spec))
    expected = exported(artifacts, first)
    middle = next(ref for ref in list_manifests(artifacts) if ref.step == 2)
    with pytest.raises(ConflictError, match="is its end"):
        await jobs.retry(ctx, first, "", submission(first))
    with pytest.raises(NotFoundError, match="cannot go on from"):
        await jobs.retry(ctx, first, "ckpt_1-00000001-00000000", submission(first))
    made, is_replay = await jobs.retry(ctx, first, f"ckpt_{middle.epoch}-{middle.name}", submission(first))
    assert (made.retry_of, made.step, is_replay) == (first.id, 2, False)
    await deleting.delete(ctx, first)
    second, artifacts = await deployment.succeeded(made.id)
    assert exported(artifacts, second) == expected
    points = await ctx.jobs.metrics(made.id)
    assert [point["step"] for point in points][-4:] == [3, 4, 5, 6], "a deterministic job replays some steps before"
    assert second.result is not None
    assert second.result["evaluation"]["reverse_kl"]["before"] is not None
    assert "began at step 2" in " ".join(verify_job(artifacts, second).notes)


async def test_only_what_has_ended_is_tried_again(deployment: Cluster) -> None:
    job_id = await deployment.submit(job_spec(stages__0__schedule={"steps": 200, "prompts_per_step": 2}))
    record = await deployment.ctx.jobs.get(job_id)
    with pytest.raises(ConflictError, match="only a finished job"):
        await jobs.retry(deployment.ctx, record, "", submission(record))
    with pytest.raises(ConflictError, match="only a finished job"):
        await deleting.delete(deployment.ctx, record)
    await jobs.cancel(deployment.ctx, job_id)
    record = await deployment.ended(job_id)
    assert record.status == "cancelled"
