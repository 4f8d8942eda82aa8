"""Checkpoints that users mark as best, and delete: nothing that is needed goes, and the answer says what for."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from stillhouse.core.blobs import JobArtifacts
from stillhouse.core.checkpoints import Settled, settle
from stillhouse.core.pins import pinned
from stillhouse.core.queue.streams import Scope
from stillhouse.gateway import checkpoints as gateway_checkpoints
from stillhouse.trainer import manifests, retention
from stillhouse.trainer.manifests import ManifestRef
from tests.gateway_kit import Gateway, make_spec, open_gateway, problem


@pytest.fixture
async def gateway(redis_url: str, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with open_gateway(redis_url, tmp_path) as opened:
        yield opened


class Job:
    """A job whose trainer committed some steps."""

    def __init__(self, gateway: Gateway, job_id: str) -> None:
        self.gateway, self.id = gateway, job_id
        self.artifacts: JobArtifacts = gateway.ctx.artifacts.job(job_id)
        self.url = f"/v1/jobs/{job_id}/checkpoints"
        manifests.open_epoch(self.artifacts, 1, "a")
        self.refs: list[ManifestRef] = []

    def commit(self, *steps: int) -> list[str]:
        """Ids of the checkpoints."""
        for step in steps:
            parent = self.refs[-1].as_json() if self.refs else None
            ref = manifests.commit(self.artifacts, 1, step, {"parent": parent}, _write)
            self.refs.append(ref)
        return [retention.checkpoint_id(ref) for ref in self.refs[-len(steps) :]]

    async def delete(self, checkpoint: str) -> Any:
        return await self.gateway.http.delete(f"{self.url}/{checkpoint}")

    async def kept(self, checkpoint: str) -> str:
        """Why it may not be deleted."""
        body = problem(await self.delete(checkpoint), 409)
        assert (await self.gateway.http.get(f"{self.url}/{checkpoint}")).status_code == 200
        return body["detail"]


def _write(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"weights")


async def make_job(gateway: Gateway, **spec: Any) -> Job:
    answer = await gateway.submit(make_spec(**spec))
    assert answer.status_code == 201, answer.text
    return Job(gateway, answer.json()["id"])


async def test_one_checkpoint(gateway: Gateway) -> None:
    job = await make_job(gateway)
    (checkpoint,) = job.commit(1)
    found = (await gateway.http.get(f"{job.url}/{checkpoint}")).json()
    assert found == (await gateway.http.get(job.url)).json()["data"][0]
    assert (found["is_best"], found["is_pinned"]) == (False, False)
    for wrong, status in (("ckpt_1-00000009-00000000", 404), ("ckpt_export", 404), ("ckpt_A", 422)):
        problem(await gateway.http.get(f"{job.url}/{wrong}"), status)


async def test_what_is_old_goes_and_the_two_newest_that_verify_stay(gateway: Gateway) -> None:
    job = await make_job(gateway)
    first, second, third, fourth = job.commit(1, 2, 3, 4)
    (job.refs[2].folder(job.artifacts) / "model.safetensors").write_bytes(b"rotten")
    for checkpoint in (second, third, fourth):  # the third does not verify
        assert "from which the job would go on" in await job.kept(checkpoint)
    assert (await job.delete(first)).status_code == 204
    problem(await job.delete(first), 404)
    listed = [item["id"] for item in (await gateway.http.get(job.url)).json()["data"]]
    assert listed == [second, third, fourth]
    assert not list(job.artifacts.epochs.glob("*/manifests/tmp.*"))


async def test_ends_of_stages_and_bases_of_claims_stay(gateway: Gateway) -> None:
    stage = make_spec()["stages"][0]
    job = await make_job(gateway, stages=[{**stage, "name": "one"}, {**stage, "name": "two"}])
    first, *_, end = job.commit(1, 2, 3)
    job.commit(4, 5)
    assert "a stage ended with it" in await job.kept(end)
    manifests.open_epoch(job.artifacts, 2, "b")  # from step 5
    base = retention.checkpoint_id(job.refs[-1])
    for step in (6, 7, 8):
        manifests.commit(job.artifacts, 2, step, {"parent": None}, _write)
    assert "newest claim of the job opened from it" in await job.kept(base)
    assert (await job.delete(first)).status_code == 204
    await gateway.http.post(f"/v1/jobs/{job.id}/cancel")
    assert (await gateway.http.get(f"/v1/jobs/{job.id}")).json()["status"] == "cancelled"
    assert (await job.delete(end)).status_code == 204, "the job has ended"


async def test_what_another_job_names_stays(gateway: Gateway) -> None:
    job = await make_job(gateway)
    first, *_ = job.commit(1, 2, 3)
    other = (await gateway.submit(make_spec(teachers={"main": {"model": f"{job.id}/{first}"}}))).json()["id"]
    assert "names it as a model" in await job.kept(first)
    await gateway.http.post(f"/v1/jobs/{other}/cancel")
    assert (await job.delete(first)).status_code == 204


async def test_who_names_it_during_the_deletion_keeps_it(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    job, other = await make_job(gateway), await make_job(gateway)
    first, *_ = job.commit(1, 2, 3)
    real, calls = gateway_checkpoints.why_needed, 0

    def why_needed(*args: Any) -> str:
        nonlocal calls
        calls += 1
        if calls == 2:  # it is out of sight
            settle(other.artifacts, {"x": Settled(f"{job.id}/{first}")})
        return real(*args)

    monkeypatch.setattr(gateway_checkpoints, "why_needed", why_needed)
    assert "names it as a model" in problem(await job.delete(first), 409)["detail"]
    assert (await gateway.http.get(f"{job.url}/{first}")).status_code == 200


async def test_a_mark_keeps_a_checkpoint_until_it_is_taken_back(gateway: Gateway) -> None:
    job = await make_job(gateway)
    first, second, *_ = job.commit(1, 2)
    assert (await gateway.http.put(f"{job.url}/{first}/best")).json()["is_pinned"] is True
    job.commit(3, 4, 5, 6)
    assert "marked as best" in await job.kept(first)
    retention.retain(job.artifacts, retention.Policy(keep_last=2), None)
    left = (await gateway.http.get(job.url)).json()["data"]
    assert [item["step"] for item in left] == [1, 5, 6], "clean-up leaves it, too"
    assert [item["is_best"] for item in left] == [True, False, False]
    problem(await gateway.http.put(f"{job.url}/{second}/best"), 404)
    assert pinned(job.artifacts) == [first], "what is gone is not marked"
    fifth = left[1]["id"]
    await gateway.http.put(f"{job.url}/{fifth}/best")
    both = (await gateway.http.get(job.url)).json()["data"]
    assert [(item["is_best"], item["is_pinned"]) for item in both] == [(False, True), (True, True), (False, False)]
    for _ in range(2):
        taken = (await gateway.http.delete(f"{job.url}/{first}/best")).json()
        assert (taken["is_best"], taken["is_pinned"]) == (False, False)
    assert (await job.delete(first)).status_code == 204


async def test_without_marks_the_best_is_what_evaluation_found(gateway: Gateway) -> None:
    job = await make_job(gateway)
    first, second = job.commit(1, 2)
    scope = Scope(job.id, await gateway.ctx.jobs.claim(job.id, "trainer-a", 60.0, 1))
    await gateway.ctx.jobs.update(scope, best_checkpoint=first)

    async def best() -> list[str]:
        return [item["id"] for item in (await gateway.http.get(job.url)).json()["data"] if item["is_best"]]

    assert await best() == [first]
    await gateway.http.put(f"{job.url}/{second}/best")
    assert await best() == [second]
    await gateway.http.delete(f"{job.url}/{second}/best")
    assert await best() == [first]


async def test_the_export_goes_with_its_job(gateway: Gateway) -> None:
    job = await make_job(gateway)
    job.artifacts.export(0).mkdir(parents=True)
    assert "goes with the job" in await job.kept("ckpt_export")
    problem(await gateway.http.put(f"{job.url}/ckpt_export/best"), 409)
