"""Steps that must not count and jobs that kill their trainers: whole jobs in one process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from stillhouse.core import failpoints
from stillhouse.core.blobs import JobArtifacts, read_json
from stillhouse.core.errors import NonFiniteError
from stillhouse.core.failpoints import InjectedError
from stillhouse.trainer import manifests
from stillhouse.trainer.lead import MAX_FRUITLESS
from stillhouse.trainer.learner import Learner
from tests.cluster import Cluster, job_spec


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    failpoints.install(None)


def poison(monkeypatch: pytest.MonkeyPatch, bad_steps: set[int]) -> None:
    """The loss of these steps is not finite, however often they are tried."""
    original = Learner.step

    def step(self: Any, samples: Any, *args: Any) -> dict[str, float]:
        if self.policy_version in bad_steps:
            ids = [sample.sample_id for sample in samples[:2]]
            raise NonFiniteError(f"step {self.policy_version}: the loss is nan", sample_ids=ids)
        return original(self, samples, *args)

    monkeypatch.setattr(Learner, "step", step)


def ledger(artifacts: JobArtifacts) -> dict[str, Any]:
    newest = manifests.list_manifests(artifacts)[-1]
    return manifests.verify(artifacts, newest)["ledger"]


async def events(deployment: Cluster, job_id: str, kind: str) -> list[dict[str, Any]]:
    return [event for event in await deployment.ctx.jobs.events(job_id) if event["type"] == kind]


async def test_a_step_without_a_finite_gradient_is_skipped(
    deployment: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, {1, 3})
    job_id = await deployment.submit(job_spec(stages__0__schedule__steps=6))
    record = await deployment.ended(job_id)
    assert (record.status, record.committed_step) == ("succeeded", 6), record.error
    artifacts = deployment.ctx.artifacts.job(job_id)
    assert ledger(artifacts)["skipped_steps"] == [1, 3]
    assert ledger(artifacts)["num_samples"] == 6 * 3
    skipped = [event["data"] for event in await events(deployment, job_id, "step.skipped")]
    assert [data["step"] for data in skipped] == [1, 3]
    assert [data["sample_ids"] for data in skipped] == [["3/0", "4/0"], ["9/0", "10/0"]]
    points = await deployment.ctx.jobs.metrics(job_id)
    assert [point["values"]["step/skipped"] for point in points] == [0, 1, 0, 1, 0, 0]


async def test_three_in_a_row_fail_the_job_and_leave_its_checkpoints(
    deployment: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, {4, 5, 6})
    job_id = await deployment.submit(job_spec(stages__0__schedule__steps=9))
    record = await deployment.ended(job_id)
    assert record.status == "failed"
    assert record.error is not None
    assert record.error["code"] == "non_finite"
    assert "loss is nan" in record.error["message"]
    artifacts = deployment.ctx.artifacts.job(job_id)
    kept = manifests.list_manifests(artifacts)
    assert [ref.step for ref in kept][-2:] == [4, 6], "committed every two steps, the skipped ones with old weights"
    hashes = [manifests.verify(artifacts, ref)["files"]["model.safetensors"]["sha256"] for ref in kept[-2:]]
    assert hashes[0] == hashes[1], "two skipped steps changed nothing"


async def test_a_job_that_crashes_every_claim_fails_and_says_why(deployment: Cluster) -> None:
    def crash(name: str, detail: str) -> None:
        if name == "trainer.planned":
            raise InjectedError("the bug that strikes each time")

    failpoints.install(crash)
    job_id = await deployment.submit(job_spec())
    record = await deployment.ended(job_id)
    assert record.status == "failed"
    assert record.error is not None
    assert f"{MAX_FRUITLESS} trainers in a row" in record.error["message"]
    assert "the bug that strikes each time" in record.error["message"]
    assert record.epoch == MAX_FRUITLESS + 1
    assert len(await events(deployment, job_id, "job.crashed")) == MAX_FRUITLESS
    assert read_json(deployment.ctx.artifacts.job(job_id).epoch(1) / "closed.json")["reason"] == "crashed"


async def test_crashes_with_progress_are_no_reason_to_give_up(deployment: Cluster) -> None:
    def crash(name: str, detail: str) -> None:
        if name == "trainer.journalled":
            raise InjectedError("once in every step")

    failpoints.install(crash)
    steps = MAX_FRUITLESS + 2
    job_id = await deployment.submit(job_spec(stages__0__schedule__steps=steps))
    record = await deployment.ended(job_id)
    assert record.status == "succeeded", record.error
    assert record.epoch == steps + 1
    assert ledger(deployment.ctx.artifacts.job(job_id))["num_samples"] == 3 * steps
