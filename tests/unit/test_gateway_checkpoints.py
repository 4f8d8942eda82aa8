"""Jobs that name checkpoints, over REST: refused with both sides and the fix, or accepted and settled."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from stillhouse.core.blobs import JobArtifacts, sealed, write_json
from stillhouse.core.checkpoints import Settled, named, read_references
from stillhouse.gateway import jobs
from stillhouse.trainer import manifests
from stillhouse.trainer.manifests import open_epoch
from tests.gateway_kit import Gateway, add_model, make_spec, open_gateway

BEFORE = "job_00000000000000000001"


@pytest.fixture
async def gateway(redis_url: str, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with open_gateway(redis_url, tmp_path) as opened:
        yield opened


def commit(gateway: Gateway, step: int = 2, **spec: Any) -> str:
    """A checkpoint of an earlier job."""
    job = gateway.ctx.artifacts.job(BEFORE)
    if not job.job_json.is_file():
        write_json(job.job_json, sealed({"id": BEFORE, "owner": "tester", "spec": make_spec(**spec)}))
        open_epoch(job, 1, "a")
    ref = manifests.commit(job, 1, step, {}, lambda folder: (folder / "model.safetensors").touch())
    return f"{BEFORE}/ckpt_1-{ref.name}"


def teacher(model: str) -> dict[str, Any]:
    return make_spec(teachers={"main": {"model": model}})


def settled(gateway: Gateway, job_id: str) -> dict[str, Settled]:
    return read_references(JobArtifacts(gateway.ctx.artifacts.root / "jobs" / job_id))


async def test_what_newest_means_is_settled_when_the_job_is_accepted(gateway: Gateway) -> None:
    first = commit(gateway)
    answer = await gateway.submit({**teacher(BEFORE), "init_from": first})
    assert answer.status_code == 201, answer.text
    job = answer.json()
    second = commit(gateway, 4)
    assert settled(gateway, job["id"]) == {BEFORE: Settled(first), first: Settled(first)}
    assert job["spec"]["teachers"]["main"]["model"] == BEFORE, "as it was sent"
    later = (await gateway.submit(teacher(BEFORE))).json()["id"]
    assert settled(gateway, later) == {BEFORE: Settled(second)}
    assert named(gateway.ctx.artifacts) == {first, second}
    cancelled = await gateway.http.post(f"/v1/jobs/{later}/cancel")
    assert cancelled.json()["status"] == "cancelled"
    assert named(gateway.ctx.artifacts) == {first}


async def test_checkpoints_that_are_not_there_are_refused(gateway: Gateway) -> None:
    there = commit(gateway).partition("/")[2]
    for spec, param in (
        ({**make_spec(), "init_from": f"{BEFORE}/ckpt_1-00000003-00000000"}, "init_from"),
        (teacher(f"{BEFORE}/ckpt_1-00000003-00000000"), "teachers.main.model"),
    ):
        body = await gateway.refused(spec)
        assert (body["param"], len(body["errors"])) == (param, 1)
        assert f"has no checkpoint 'ckpt_1-00000003-00000000' (any more); it has {there}" in body["detail"]
    assert "there is no job" in (await gateway.refused(teacher("job_00000000000000000002")))["detail"]
    body = await gateway.refused(make_spec(student={"model": BEFORE}))
    assert (body["param"], "unknown model" in body["detail"]) == ("student.model", True)
    assert gateway.ctx.artifacts.job_ids() == [BEFORE]


async def test_a_checkpoint_of_another_model_is_no_start(gateway: Gateway) -> None:
    name = commit(gateway, student={"model": "big"})
    body = await gateway.refused(make_spec(init_from=name))
    assert body["param"] == "init_from"
    assert f"the hidden_size of {name} is 8, that of the student 'small' is 4" in body["detail"]
    assert "name the model that the checkpoint is of as student.model" in body["detail"]
    assert (await gateway.submit(make_spec(init_from=name, student={"model": "big"}))).status_code == 201
    assert (await gateway.submit(teacher(name))).status_code == 201, "a teacher may be of any size"


async def test_a_checkpoint_with_another_tokenizer_neither_starts_nor_teaches(gateway: Gateway) -> None:
    add_model(gateway.home, "other", extra_token="<x>")
    name = commit(gateway, student={"model": "other"})
    body = await gateway.refused({**teacher(name), "init_from": name})
    assert {error["param"] for error in body["errors"]} == {"init_from", "teachers.main.model"}
    assert "its tokenizer differs from the student's" in body["errors"][1]["message"]


async def test_a_checkpoint_whose_model_is_not_registered_any_more_is_refused(gateway: Gateway) -> None:
    name = commit(gateway, student={"model": "gone"})
    assert (
        "whose student is not registered any more: unknown model 'gone'"
        in (await gateway.refused(teacher(name)))["detail"]
    )


async def test_one_that_is_deleted_at_this_moment_leaves_no_job(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = commit(gateway)
    preflight = jobs.preflight

    def then_deleted(*arguments: Any) -> Any:
        found = preflight(*arguments)
        shutil.rmtree(gateway.ctx.artifacts.job(BEFORE).manifests(1))
        return found

    monkeypatch.setattr(jobs, "preflight", then_deleted)
    assert "(any more)" in (await gateway.refused(teacher(name), 404))["detail"]
    assert gateway.ctx.artifacts.job_ids() == [BEFORE]
    assert await gateway.ctx.jobs.list() == []


async def test_the_student_as_the_job_began_may_teach_from_the_first_step(gateway: Gateway) -> None:
    spec = teacher("stage/start")
    spec["evaluation"] = {"data": {"rows": [{"prompt": "three"}]}, "num_prompts": 1}
    assert (await gateway.submit(spec)).status_code == 201
    spec = teacher("stage/main")
    body = await gateway.refused(spec)
    assert body["param"] == "stages.0.data.rows.0"
    assert "asks the teacher 'main' in stage 'main' and that is stage/main, which has not ended then" in body["detail"]


async def test_the_end_of_a_stage_teaches_after_it_and_is_not_measured_before(gateway: Gateway) -> None:
    stage = make_spec()["stages"][0]
    texts = [{"prompt": "one", "completion": "1"}, {"prompt": "two", "completion": "2"}]
    first = {**stage, "name": "sft", "data": {"rows": texts}, "on_policy_fraction": 0}
    first["loss"] = {"objective": "cross_entropy"}
    spec = {**teacher("stage/sft"), "stages": [first, {**stage, "name": "opd"}]}
    assert (await gateway.submit(spec)).status_code == 201, "the first stage asks nobody"
    body = await gateway.refused({**teacher("stage/opd"), "stages": spec["stages"]})
    assert (body["param"], "stage/opd, which has not ended then" in body["detail"]) == ("stages.1.data.rows.0", True)
    rows = [{"prompt": "a", "teacher": "main"}, {"prompt": "b", "teacher": "big"}]
    both = {name: {**stage, "name": name, "data": {"rows": rows}} for name in ("one", "two")}
    shared = {"teachers": {"main": {"model": "stage/one"}, "big": {"model": "big"}}}
    body = await gateway.refused({**make_spec(**shared), "stages": list(both.values())})
    assert body["param"] == "stages.0.data.rows.0"
    both["one"]["data"]["mix"] = {"big": 1}
    answer = await gateway.submit({**make_spec(**shared), "stages": list(both.values())})
    assert answer.status_code == 201, "a mix that leaves the teacher out never asks it"
    spec["evaluation"] = {"data": {"rows": [{"prompt": "three"}]}, "num_prompts": 1}
    body = await gateway.refused(spec)
    assert body["param"] == "evaluation.data.rows.0"
    assert "in held-out evaluation, from the first step on, and that is stage/sft" in body["detail"]
