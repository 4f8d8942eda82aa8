"""Jobs that go on from a checkpoint of another: they end as that one would have, and stand by themselves."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest

from stillhouse.core.blobs import JobArtifacts, sha256_file
from stillhouse.core.errors import ConflictError, CorruptError, NotFoundError, SpecError
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


def submission(record: JobRecord, key: str = "") -> jobs.Submission:
    return jobs.Submission(JobSpec.model_validate(record.spec), Caller(""), key)


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


async def test_the_same_key_gives_the_same_job_and_a_past_that_is_damaged_leaves_nothing(
    deployment: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    ctx = deployment.ctx
    spec = job_spec(checkpoint={"every_steps": 1, "keep_last": 4}, stages__0__schedule={"steps": 4})
    first, artifacts = await deployment.succeeded(await deployment.submit(spec))
    two, three = [f"ckpt_{ref.epoch}-{ref.name}" for ref in list_manifests(artifacts) if ref.step in (2, 3)]
    failed = replace(first, status="failed")  # it may go on from its newest checkpoint then
    made, is_replay = await jobs.retry(ctx, failed, "", submission(first, "again"))
    assert (made.step, is_replay) == (4, False)
    newest = list_manifests(artifacts)[-1]
    shutil.rmtree(artifacts.manifests(newest.epoch) / newest.name)  # another one is the newest now
    again, is_replay = await jobs.retry(ctx, failed, "", submission(first, "again"))
    assert (again.id, is_replay) == (made.id, True)
    with pytest.raises(SpecError, match="was used for job"):
        await jobs.retry(ctx, failed, two, submission(first, "again"))

    def damaged(*_: object) -> None:
        raise CorruptError("a journal does not verify")

    before = set(ctx.artifacts.job_ids())
    monkeypatch.setattr(jobs, "link", lambda origin, old, new: (new.root.mkdir(parents=True), damaged()))
    with pytest.raises(CorruptError):
        await jobs.retry(ctx, failed, three, submission(first))
    assert {path.name for path in artifacts.root.parent.iterdir()} == before


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
