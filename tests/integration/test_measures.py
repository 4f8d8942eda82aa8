"""What a job with several teachers measures of each, in training and held out; one model under two names."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from stillhouse.core.blobs import read_json
from stillhouse.core.oracle.verify import verify_job
from stillhouse.core.rpc import Peer
from stillhouse.trainer import heads
from stillhouse.trainer.batch import TeacherHead
from stillhouse.trainer.journal import read_step
from stillhouse.v1 import teacher_pb2, teacher_pb2_grpc
from stillhouse.v1.rollout_pb2 import TeacherTask
from tests.cluster import Cluster, cluster, job_spec

RIGHT, WRONG = ".|^$", "(?!)"
"""Patterns that match every text and none."""
MIX = {"math": 0.5, "code": 0.25, "chat": 0.25}


def rows(prefix: str, number: int, **more: Any) -> list[dict[str, Any]]:
    answers = {"math": RIGHT, "code": WRONG, "chat": RIGHT}
    return [
        {"prompt": f"{prefix} {name} {index}", "teacher": name, "answer": answers[name], **more}
        for name in MIX
        for index in range(number)
    ]


async def test_each_teacher_has_its_share_its_metrics_and_its_accuracy(
    deployment: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[str] = []
    fetch = heads._fetch

    async def counted(peer: Peer, task: TeacherTask) -> TeacherHead:
        fetched.append(task.model)
        return await fetch(peer, task)

    monkeypatch.setattr(heads, "_fetch", counted)
    deployment.add_model("other", seed=5)
    held_out = [row | ({"verifier": "regex"} if row["teacher"] != "chat" else {}) for row in rows("held-out", 2)]
    spec = job_spec(
        teachers={"math": {"model": "teacher"}, "code": {"model": "teacher"}, "chat": {"model": "other"}},
        stages__0__data={"rows": rows("train", 3), "mix": MIX},
        stages__0__loss={"objective": "policy_gradient", "reward": {"verifier": "regex"}},
        stages__0__schedule={"steps": 4, "prompts_per_step": 4, "group_size": 2, "max_staleness": 0},
        evaluation={"data": {"rows": held_out}, "max_tokens": 6, "every_steps": 2},
    )
    job_id = await deployment.submit(spec)
    record = await deployment.ended(job_id)
    assert record.status == "succeeded", record.error
    artifacts = deployment.ctx.artifacts.job(job_id)
    for step in range(4):
        groups = {score.rollout.group: score.rollout.teacher for score in read_step(artifacts.journal(1, step)).scores}
        assert Counter(groups.values()) == {"math": 2, "code": 1, "chat": 1}
    report = verify_job(artifacts, record)
    assert report.ok, report.violations

    for point in await deployment.ctx.jobs.metrics(job_id):
        values = point["values"]
        assert [values[f"reward/mean/{name}"] for name in MIX] == [1.0, 0.0, 1.0]
        assert abs(sum(values[f"tokens/share/{name}"] for name in MIX) - 1) < 1e-6
        assert all(f"loss/reverse_kl/{name}" in values for name in MIX)

    found = [read_json(artifacts.evaluations / f"{step:08d}.json") for step in (0, 2, 4)]
    for evaluation in found:
        assert (evaluation["accuracy"], evaluation["num_judged"]) == (0.5, 4)
        by_teacher = evaluation["by_teacher"]
        assert [by_teacher[name].get("accuracy") for name in MIX] == [1.0, 0.0, None]
        assert [by_teacher[name]["num_prompts"] for name in MIX] == [2, 2, 2]
        total = sum(part["reverse_kl"] * part["num_tokens"] for part in by_teacher.values())
        assert abs(total - evaluation["reverse_kl"] * evaluation["num_tokens"]) < 1e-3
        assert evaluation["samples"][0]["reward"] == 1.0
    assert record.result is not None
    compared = record.result["evaluation"]
    assert compared["accuracy"] == {"before": 0.5, "after": 0.5}
    for name in MIX:
        before, after = found[0]["by_teacher"][name], found[2]["by_teacher"][name]
        kl = {"before": before["reverse_kl"], "after": after["reverse_kl"]}
        assert compared["by_teacher"][name]["reverse_kl"] == kl
    card = (artifacts.export(record.epoch) / "README.md").read_text()
    assert "Held-out accuracy" in card
    assert "code: KL" in card
    events = [event for event in await deployment.ctx.jobs.events(job_id) if event["type"] == "evaluation"]
    assert events[0]["data"]["by_teacher"]["math"].keys() >= {"reverse_kl", "accuracy", "mean_length", "num_prompts"}
    assert "accuracy 0.500; by teacher: chat" in events[0]["message"]
    assert sorted(fetched) == ["other", "teacher"], "one head for the two names of a model"
    await check_loads(deployment)


async def check_loads(deployment: Cluster) -> None:
    """Two teachers of one model are one model in memory, loaded once."""
    (service,) = await deployment.ctx.registry.services("teacher")
    peer = deployment.ctx.peers.get(service.address, teacher_pb2_grpc.TeacherServiceStub, "teacher")
    info = await peer.unary("GetInfo", teacher_pb2.TeacherServiceGetInfoRequest(), timeout_s=10)
    assert {count.model: count.loads for count in info.loads} == {"teacher": 1, "other": 1}
    assert sorted(model.model for model in info.models) == ["other", "teacher"]


async def test_a_verifier_that_fails_costs_the_accuracy_and_not_the_job(deployment: Cluster) -> None:
    """One that is not installed here, and one that cannot read its row."""
    held_out = [
        {"prompt": "tea", "verifier": "haiku"},
        {"prompt": "rain", "verifier": "regex", "answer": "("},
        {"prompt": "maps", "answer": RIGHT},
        {"prompt": "bread", "answer": RIGHT},
    ]
    evaluation = {"data": {"rows": held_out}, "max_tokens": 4, "show": 0, "verifier": "regex"}
    job_id = await deployment.submit(job_spec(stages__0__schedule__steps=1, evaluation=evaluation))
    record = await deployment.ended(job_id)
    assert record.status == "succeeded", record.error
    assert record.result is not None
    assert record.result["evaluation"]["accuracy"]["after"] == 2 / 3
    told = [e["message"] for e in await deployment.ctx.jobs.events(job_id) if e["type"] == "accuracy.failed"]
    assert len(told) == 4, told
    assert told[0].startswith("1 held-out completions are not judged: verifier 'haiku' cannot be loaded")
    assert told[1].startswith("1 of 3 held-out completions got no verdict and count as wrong; ")


async def test_a_job_without_teachers_has_its_accuracy(tmp_path: Path, redis_url: str) -> None:
    """And needs no teacher process: nothing is asked of one."""
    async with cluster(tmp_path, redis_url, "sampler", "trainer") as deployment:
        deployment.add_model("student", seed=1)
        spec = job_spec(
            teachers={},
            stages__0__data={"rows": [{"prompt": f"say {word}", "answer": RIGHT} for word in ("one", "two")]},
            stages__0__loss={"objective": "policy_gradient", "teacher_weight": 0, "reward": {"verifier": "regex"}},
            stages__0__schedule={"steps": 2, "prompts_per_step": 2, "group_size": 2},
            evaluation={
                "data": {"rows": [{"prompt": "tea", "answer": RIGHT}, {"prompt": "rain", "answer": WRONG}]},
                "verifier": "regex",
                "max_tokens": 4,
            },
        )
        job_id = await deployment.submit(spec)
        record = await deployment.ended(job_id)
        assert record.status == "succeeded", record.error
        assert record.result is not None
        compared = record.result["evaluation"]
        assert compared["accuracy"] == {"before": 0.5, "after": 0.5}
        assert "reverse_kl" not in compared
        found = read_json(deployment.ctx.artifacts.job(job_id).evaluations / "00000002.json")
        assert (found["num_prompts"], found["by_teacher"]) == (2, {})
        messages = [e["message"] for e in await deployment.ctx.jobs.events(job_id) if e["type"] == "evaluation"]
        assert messages[0] == "step 0: held-out accuracy 0.500"
