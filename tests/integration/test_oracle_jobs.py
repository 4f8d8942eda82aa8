"""The oracle on what real services leave: finished, crashed, cancelled and failed jobs break no rule."""

from __future__ import annotations

from typing import Any

import pytest
from safetensors.numpy import load_file

from stillhouse.core.blobs import read_json
from stillhouse.core.oracle.report import Report
from stillhouse.core.oracle.verify import verify_job
from stillhouse.trainer.manifests import list_manifests
from tests.cluster import Cluster, job_spec


async def verified(made: Cluster, job_id: str) -> Report:
    report = verify_job(made.ctx.artifacts.job(job_id), await made.ctx.jobs.get(job_id))
    assert report.ok, report.text()
    assert not report.damage
    return report


def spec(steps: int, **changes: Any) -> dict[str, Any]:
    schedule = {"steps": steps, "prompts_per_step": 3, "group_size": 2, "max_staleness": 1}
    return job_spec(stages__0__schedule=schedule, **changes)


async def test_a_finished_job_and_one_that_is_tampered_with(deployment: Cluster) -> None:
    job_id = await deployment.submit(spec(5, evaluation={"data": {"rows": [{"prompt": "tea"}]}, "max_tokens": 4}))
    assert (await deployment.ended(job_id)).status == "succeeded"
    report = await verified(deployment, job_id)
    assert report.counts["steps"] == 5
    assert report.counts["samples_trained"] == 30
    assert report.counts["ledgers"] == report.counts["manifests"] == 2
    assert report.counts["tensors_compared"] > 0, "export and checkpoint name their tensors alike"
    artifacts = deployment.ctx.artifacts.job(job_id)
    weights = list_manifests(artifacts)[-1].folder(artifacts) / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 0x40
    weights.write_bytes(bytes(data))
    record = await deployment.ctx.jobs.get(job_id)  # final.json comes a moment after it
    assert {"checkpoint", "export"} <= verify_job(artifacts, record).broken_rules()
    assert verify_job(artifacts, record, deep=False).ok, "sizes are right; only the hash tells"


async def test_a_job_whose_trainer_crashed(deployment: Cluster) -> None:
    job_id = await deployment.submit(spec(8, checkpoint={"every_steps": 3}))
    await deployment.at_step(job_id, 4)
    await deployment.crash("trainer-0")
    await verified(deployment, job_id)
    await deployment.start("trainer", "trainer-1")
    await verified(deployment, job_id)  # while it runs
    assert (await deployment.ended(job_id)).status == "succeeded"
    assert (await verified(deployment, job_id)).epoch == 2


async def test_a_cancelled_job_and_a_failed_one(deployment: Cluster) -> None:
    job_id = await deployment.submit(spec(1000))
    await deployment.at_step(job_id, 2)
    await deployment.ctx.jobs.request(job_id, allowed=("running",), status="cancelling")
    assert (await deployment.ended(job_id)).status == "cancelled"
    await verified(deployment, job_id)
    job_id = await deployment.submit(spec(3, student__model="nobody"))
    assert (await deployment.ended(job_id)).status == "failed"
    await verified(deployment, job_id)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_a_job_that_trains_an_adapter_and_averages_it(deployment: Cluster, dtype: str) -> None:
    """Its trainer crashes on the way; checkpoints hold the adapter, the export the average of it, merged and alone."""
    student = {"model": "student", "dtype": dtype, "lora": {"rank": 4}, "activation_checkpointing": True}
    evaluation = {"data": {"rows": [{"prompt": "tea"}]}, "max_tokens": 4}
    optimizer = {"lr": 1e-2, "ema_decay": 0.5}
    job_id = await deployment.submit(
        spec(6, student=student, evaluation=evaluation, stages__0__optimizer=optimizer, checkpoint={"every_steps": 2})
    )
    await deployment.at_step(job_id, 3)
    await deployment.crash("trainer-0")
    await deployment.start("trainer", "trainer-1")
    record = await deployment.ended(job_id)
    assert record.status == "succeeded", record.error
    report = await verified(deployment, job_id)
    assert report.epoch == 2
    artifacts = deployment.ctx.artifacts.job(job_id)
    export = artifacts.export(2)
    last = list_manifests(artifacts)[-1].folder(artifacts)
    learned = load_file(last / "model.safetensors")
    assert {name.rpartition(".lora_")[2] for name in learned} == {"A.weight", "B.weight"}
    assert report.counts["tensors_compared"] == len(learned) > 0
    averaged = load_file(export / "adapter" / "adapter_model.safetensors")
    assert any((averaged[name] != array).any() for name, array in learned.items()), "not what the last step left"
    card = (export / "README.md").read_text()
    for expected in ("moving average over the steps, with decay | 0.5", "Low-rank adapter", "rank: 4"):
        assert expected in card
    evaluations = {path.stem: read_json(path) for path in artifacts.evaluations.glob("*.json")}
    assert {int(step): result["averaged"] for step, result in evaluations.items()} == {0: False, 6: True}
    loaded = [event for event in await deployment.ctx.jobs.events(job_id) if event["type"] == "student.loaded"]
    assert len(loaded) == 2
    assert "samples are packed" in loaded[0]["message"]
    data = bytearray((export / "adapter" / "adapter_model.safetensors").read_bytes())
    data[-1] ^= 0x40  # of its exponent: whatever the number is, it changes by more than 1
    (export / "adapter" / "adapter_model.safetensors").write_bytes(bytes(data))
    assert verify_job(artifacts).broken_rules() == {"export"}
