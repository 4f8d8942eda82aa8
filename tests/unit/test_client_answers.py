"""Answers are models that also read like dicts, and gateways of other versions are understood."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from typing import Any

import pytest

from stillhouse.client.answers import read
from stillhouse.core.schemas import Checkpoint, Event, Job, Page

JOB: dict[str, Any] = {
    "id": "job_12345678", "name": "n", "status": "running", "is_terminal": False, "status_reason": "",
    "status_message": "", "spec": {"seed": 1}, "created_at": "t", "started_at": None, "finished_at": None,
    "progress": {"step": 1, "total_steps": 4, "percent": 25.0}, "usage": {}, "error": None, "result": None,
    "epoch": 1, "policy_version": 0, "trainer": "", "metadata": {},
}  # fmt: skip
EVENT = {"id": "1-0", "type": "log", "level": "info", "message": "m", "data": {}, "created_at": "t"}
CHECKPOINT = {
    "id": "ckpt_1-a", "job_id": "job_12345678", "kind": "checkpoint", "step": 1, "stage": "", "epoch": 1,
    "policy_version": 1, "created_at": "t", "size_bytes": 9, "sha256": "",
}  # fmt: skip


def test_an_answer_is_a_model_and_reads_like_a_dict() -> None:
    job = read(Job, JOB)
    assert isinstance(job, Job)
    assert job.status == job["status"] == job.get("status") == "running"
    assert job["progress"]["step"] == job.progress.step == 1
    assert "status" in job
    assert "nothing" not in job
    assert job.get("nothing", 3) == 3
    assert {**job, "more": 1}["more"] == dict(job, more=1)["more"] == 1
    with pytest.raises(KeyError, match="no field 'nothing'; it has id, "):
        job["nothing"]
    assert json.loads(json.dumps(job.to_dict()))["progress"]["total_steps"] == 4


def test_fields_that_only_a_newer_gateway_has_are_kept() -> None:
    job = read(Job, JOB | {"colour": "red", "progress": JOB["progress"] | {"mood": "good"}})
    assert (job["colour"], job.to_dict()["colour"], job.progress["mood"]) == ("red", "red", "good")
    page = read(Page[Event], {"data": [EVENT | {"new": {"a": [1]}}], "has_more": False})
    assert page.data[0]["new"] == {"a": [1]}
    assert pickle.loads(pickle.dumps(page.data[0])).to_dict() == page.data[0].to_dict()


def test_values_that_only_a_newer_gateway_has_do_not_break_it() -> None:
    page = read(Page[Checkpoint], {"data": [CHECKPOINT | {"kind": "snapshot", "new": 1}, CHECKPOINT], "has_more": True})
    first, second = page.data
    assert (first.kind, first["new"], first.step) == ("snapshot", 1, 1)
    assert isinstance(first, Checkpoint)
    assert second.kind == "checkpoint"
    assert page.has_more
    job = read(Job, JOB | {"progress": {"step": "many"}, "kind": 7})
    assert (job.kind, job.progress.step, job.status) == (7, "many", "running")
    assert job.to_dict()["progress"]["step"] == "many"


def test_an_older_gateway_leaves_fields_out() -> None:
    job = read(Job, {"id": "job_12345678", "status": "running"})
    assert job.status == "running"
    assert job.get("trainer", "-") == "-"
    assert "trainer" not in job
    with pytest.raises(AttributeError, match="trainer"):
        _ = job.trainer


def test_the_package_is_light_until_a_name_is_used() -> None:
    code = (
        "import sys, stillhouse; assert not {'httpx', 'pydantic'} & set(sys.modules);"
        "from stillhouse import ApiError, AsyncClient, Client;"
        "assert not {'torch', 'fastapi', 'grpc', 'redis', 'numpy'} & set(sys.modules), sorted(sys.modules);"
        "import stillhouse.core;"
        "assert set(stillhouse.__all__) <= set(dir(stillhouse))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
    with pytest.raises(ImportError):
        exec("from stillhouse import Nothing")
