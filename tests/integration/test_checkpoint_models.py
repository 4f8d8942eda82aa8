"""Checkpoints of jobs as teachers and as the student's start, through real services."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stillhouse.core.blobs import JobArtifacts, read_json, sealed, unsealed, write_json
from stillhouse.core.checkpoints import EXPORT, START, locate, read_references
from stillhouse.trainer import manifests
from stillhouse.trainer.journal import read_step
from stillhouse.trainer.manifests import list_manifests
from stillhouse.v1 import rollout_pb2 as pb
from tests.cluster import Cluster, job_spec
from tests.waiting import wait_until

SAME_NATS = 1e-5
"""KL of equal weights, float32 on both sides, by two engines."""


async def finished(made: Cluster, **changes: Any) -> str:
    """A job that has ended well."""
    job_id = await made.submit(job_spec(**changes))
    record = await made.ended(job_id)
    assert record.status == "succeeded", record.error
    final = made.ctx.artifacts.job(job_id).final
    await wait_until(final.is_file, timeout_s=20, what="final.json, which comes last")
    return job_id


def checkpoint_of(job: JobArtifacts, step: int) -> str:
    ref = next(ref for ref in list_manifests(job) if ref.step == step)
    return f"{job.root.name}/ckpt_{ref.epoch}-{ref.name}"


def scores(job: JobArtifacts, step: int, epoch: int = 1) -> list[pb.Score]:
    return list(read_step(job.journal(epoch, step)).scores)


async def test_a_job_goes_on_from_another_and_an_equal_checkpoint_has_nothing_to_teach(deployment: Cluster) -> None:
    before = await finished(deployment)
    artifacts = deployment.ctx.artifacts
    last = checkpoint_of(artifacts.job(before), 4)
    job_id = await finished(
        deployment,
        init_from=last,
        teachers__main__model=before,
        teachers__start={"model": START},
        teachers__again={"model": last},
        stages__0__data__rows=[{"prompt": f"say {name}", "teacher": name} for name in ("main", "start", "again")],
        stages__0__optimizer__lr=1e-9,
        stages__0__schedule__steps=2,
    )
    record = await deployment.ctx.jobs.get(before)
    assert record.weights is not None
    written_with = {score.rollout.weights_sha256 for score in scores(artifacts.job(job_id), 0)}
    assert written_with == {record.weights["sha256"]}, "bit for bit what the other job published last"
    for name in ("main", "start", "again"):
        for value in await deployment.metric(job_id, f"loss/reverse_kl/{name}"):
            assert abs(value) <= SAME_NATS
    settled = read_references(artifacts.job(job_id))
    assert {reference: one.model for reference, one in settled.items()} == {
        before: f"{before}/{EXPORT}",
        last: last,
        START: last,
    }
    assert len({one.sha256 for one in settled.values()}) == 1, "equal checkpoints are one model to a teacher"
    card = (artifacts.job(job_id).export(1) / "README.md").read_text()
    assert f"Began with the weights of | {last} (sha256 " in card
    assert f"main: {before}/{EXPORT} (sha256 {settled[before].sha256[:12]})" in card


async def test_an_earlier_checkpoint_writes_texts_and_judges(deployment: Cluster) -> None:
    before = await finished(deployment, student__lora={"rank": 4}, stages__0__optimizer__lr=1e-2)
    earlier = checkpoint_of(deployment.ctx.artifacts.job(before), 2)
    job_id = await finished(
        deployment,
        teachers__main__model=earlier,
        stages__0__on_policy_fraction=0,
        stages__0__off_policy_source="teacher",
        stages__0__schedule__steps=1,
        evaluation={"data": {"rows": [{"prompt": "held out"}]}, "num_prompts": 1, "max_tokens": 8},
    )
    job = deployment.ctx.artifacts.job(job_id)
    entry = deployment.ctx.models.get(earlier)
    assert {score.rollout.origin for score in scores(job, 0)} == {pb.ORIGIN_TEACHER}
    assert {score.teacher_sha256 for score in scores(job, 0)} == {entry.sha256}
    first, after = (read_json(job.evaluations / f"{step:08d}.json") for step in (0, 1))
    assert first["samples"][0]["teacher"], "the checkpoint wrote it"
    assert after["reverse_kl"] < first["reverse_kl"]


async def test_a_takeover_finds_the_checkpoint_of_the_first_claim(deployment: Cluster) -> None:
    before = await finished(deployment)
    other = deployment.ctx.artifacts.job(before)
    # so that the newest is the last commit
    write_json(other.final, sealed({**unsealed(other.final), "status": "cancelled"}))
    named = locate(deployment.ctx.artifacts, before)
    job_id = await deployment.submit(job_spec(teachers__main__model=before, stages__0__schedule__steps=6))
    await deployment.at_step(job_id, 2)
    newest = list_manifests(other)[0]  # older weights as a newer checkpoint: of this job nothing may change
    manifests.commit(other, 1, 9, {}, lambda folder: _copy(newest.folder(other), folder))
    await deployment.crash("trainer-0")
    await deployment.start("trainer", "trainer-1")
    record = await deployment.ended(job_id)
    assert record.status == "succeeded", record.error
    assert record.epoch == 2
    assert locate(deployment.ctx.artifacts, before) != named
    job = deployment.ctx.artifacts.job(job_id)
    journals = [read_step(path) for path in job.epochs.glob("*/steps/*.journal")]
    assert {score.teacher_sha256 for journal in journals for score in journal.scores} == {
        deployment.ctx.models.get(named).sha256
    }
    assert len(journals) >= 6


def _copy(source: Path, target: Path) -> None:
    for path in source.glob("*.safetensors"):
        (target / path.name).write_bytes(path.read_bytes())


@pytest.mark.full
@pytest.mark.parametrize("change", ["student", "checkpoint"])
async def test_a_model_that_is_another_one_by_now_ends_the_job(deployment: Cluster, change: str) -> None:
    """Silently with another base or teacher it would be another job."""
    before = await finished(deployment)
    job_id = await deployment.submit(job_spec(teachers__main__model=before, stages__0__schedule__steps=50))
    await deployment.at_step(job_id, 2)
    await deployment.crash("trainer-0")
    if change == "student":
        deployment.add_model("student", seed=9)
    else:
        entry = deployment.ctx.models.get(f"{before}/{EXPORT}")
        (Path(entry.path) / "generation_config.json").unlink()
        deployment.ctx.models.register(entry.name, Path(entry.path))
    await deployment.start("trainer", "trainer-1")
    record = await deployment.ended(job_id)
    assert record.status == "failed"
    assert record.error is not None
    assert "the job began with" in record.error["message"]
    assert "register that model again as it was" in record.error["message"]


STAGES = [
    {
        "name": "one",
        "data": {"rows": [{"prompt": f"say {word}", "completion": word, "teacher": "big"} for word in ("one", "two")]},
        "sampling": {"max_tokens": 8},
        "on_policy_fraction": 0,
        "loss": {"objective": "cross_entropy"},
        "optimizer": {"lr": 1e-2},
        "schedule": {"steps": 2, "prompts_per_step": 2},
    },
    {
        "name": "two",
        "data": {"rows": [{"prompt": f"say {word}", "teacher": "big"} for word in ("one", "two")]},
        "sampling": {"max_tokens": 8},
        "loss": {"objective": "policy_gradient"},
        "optimizer": {"lr": 1e-9},
        "schedule": {"steps": 2, "prompts_per_step": 2},
    },
    {
        "name": "three",
        "data": {"rows": [{"prompt": f"say {name}", "teacher": name} for name in ("own", "first")]},
        "sampling": {"max_tokens": 8},
        "loss": {"objective": "full_vocabulary"},
        "optimizer": {"lr": 1e-9},
        "schedule": {"steps": 4, "prompts_per_step": 2, "max_staleness": 0},
    },
]
"""The second does next to nothing, so that the third begins with the first one's end."""


@pytest.mark.parametrize("lora", [pytest.param(None, marks=pytest.mark.full), {"rank": 4}], ids=["whole", "lora"])
async def test_the_end_of_an_earlier_stage_teaches_and_outlives_its_trainer(
    deployment: Cluster, lora: dict[str, Any] | None
) -> None:
    teachers = {"big": {"model": "teacher"}, "own": {"model": "stage/one"}, "first": {"model": START}}
    spec = job_spec(stages=STAGES, teachers=teachers, student__lora=lora, checkpoint={"every_steps": 1, "keep_last": 2})
    job_id = await deployment.submit(spec)
    job = deployment.ctx.artifacts.job(job_id)
    await deployment.at_step(job_id, 5)
    settled = read_references(job)
    await deployment.crash("trainer-0")
    await deployment.start("trainer", "trainer-1")
    record = await deployment.ended(job_id)
    assert (record.status, record.epoch) == ("succeeded", 2), record.error
    assert read_references(job) == settled
    assert settled["stage/one"].model == checkpoint_of(job, 2), "retention leaves the end of a stage"
    assert settled[START].model == "student"
    judged = {
        (score.rollout.teacher, score.teacher_sha256)
        for path in job.epochs.glob("*/steps/*.journal")
        for score in read_step(path).scores
        if score.rollout.teacher in ("own", "first")
    }
    assert judged == {("own", settled["stage/one"].sha256), ("first", settled[START].sha256)}
    points = {point["step"]: point["values"] for point in await deployment.ctx.jobs.metrics(job_id)}
    for step in (5, 6, 7, 8):
        assert abs(points[step]["loss/reverse_kl/own"]) <= SAME_NATS
        assert points[step]["loss/reverse_kl/first"] > 100 * SAME_NATS, "the first stage has moved the student"


async def test_weights_of_a_model_that_computes_otherwise_are_refused(deployment: Cluster) -> None:
    before = await finished(deployment, stages__0__schedule__steps=1)
    deployment.add_model("longer", seed=1, max_position_embeddings=512)
    job_id = await deployment.submit(job_spec(student__model="longer", init_from=before))
    record = await deployment.ended(job_id)
    assert record.status == "failed"
    assert record.error is not None
    assert "has max_position_embeddings 256, the student 'longer' has 512" in record.error["message"]
