"""Every wrong request gets a problem+json that names the field and the fix."""

from __future__ import annotations

import copy
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, get_args

import pytest
from prometheus_client import generate_latest
from redis.exceptions import OutOfMemoryError, ResponseError
from structlog.testing import capture_logs

from stillhouse.core.metrics import exported
from stillhouse.core.queue.jobs import STATUSES
from stillhouse.core.schemas import Status
from stillhouse.gateway.problems import problem_response
from tests.gateway_kit import Gateway, add_model, make_spec, open_gateway, problem


@pytest.fixture
async def gateway(redis_url: str, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with open_gateway(redis_url, tmp_path) as opened:
        yield opened


def changed(path: str, value: Any) -> dict[str, Any]:
    """The valid job with one value replaced or added."""
    spec = copy.deepcopy(make_spec())
    node: Any = spec
    *parents, last = path.split(".")
    for part in parents:
        node = node[int(part)] if part.isdigit() else node.setdefault(part, {})
    node[int(last) if last.isdigit() else last] = value
    return spec


WRONG_FIELDS = [
    ("stages.0.loss.objective", "policy_gradiant", "stages.0.loss.objective", "policy_gradient"),
    ("stages.0.loss", {}, "stages.0.loss.objective", "add it"),
    ("stages.0.loss.advantage_clp", 1, "stages.0.loss.advantage_clp", "did you mean 'advantage_clip'?"),
    ("stages.0.loss.advantage_clip", -1, "stages.0.loss.advantage_clip", "> 0"),
    ("stages.0.sampling.temperature", 50, "stages.0.sampling.temperature", "<= 10"),
    ("stages.0.sampling.temperatur", 1, "stages.0.sampling.temperatur", "did you mean 'temperature'?"),
    ("stages.0.schedule.steps", 0, "stages.0.schedule.steps", ">= 1"),
    ("stages.0.schedule", {}, "stages.0.schedule.steps", "add it"),
    ("stages.0.data.rows.1", {"promt": "x"}, "stages.0.data.rows.1.promt", "did you mean 'prompt'?"),
    ("stages.0.data.rows.1", {}, "stages.0.data.rows.1", "exactly one of"),
    ("stages.0.data.rows.1", {"prompt": "\ud800"}, "stages.0.data.rows.1.prompt", "unicode"),
    ("stages.0.data.rows.0", {"prompt": "x", "teacher": "nobody"}, "stages.0.data.rows.0", "unknown teacher 'nobody'"),
    ("stages.0.data.file", "file_00000000", "stages.0.data", "exactly one of"),
    ("teachers", {"a b": {"model": "big"}}, "teachers.a b", "must match"),
    ("teachers", {}, "teachers", "name at least one teacher"),
    ("teachers", {"mean": {"model": "big"}}, "teachers", "no teacher can be called"),
    ("stages.0.sampling.stop_token_ids", [-1], "stages.0.sampling.stop_token_ids.0", ">= 0"),
    ("student.dtype", "float64", "student.dtype", "'float32' or 'bfloat16'"),
    ("learning_rate", 1, "learning_rate", "unknown key"),
    ("student", {"model": "nope"}, "student.model", "registered: big, small"),
    ("teachers.main.model", "nope", "teachers.main.model", "registered: big, small"),
    ("init_from", "job_0123456789", "init_from", "there is no job 'job_0123456789'"),
    ("init_from", "job_0123456789/../x", "init_from", "names no checkpoint"),
    ("teachers.main.model", "../big", "teachers.main.model", "names no model"),
    ("stages.0.data", {"file": "file_0123456789"}, "stages.0.data.file", "POST /v1/files"),
    ("stages.0.data.rows.1", {"prompt": "x" * 300}, "stages.0.data.rows.1", "row 1: 300 prompt tokens + 8"),
    ("stages.0.sampling.max_tokens", 256, "stages.0.data.rows.0", "max_sequence_length of the student 'small' of 256"),
    ("teachers.main.system_prompt", "y" * 300, "stages.0.data.rows.0", "max_sequence_length of the teacher 'main'"),
    ("teachers.spare", {"model": "big"}, "stages.0.data.rows.0", "name the row's 'teacher'"),
    ("evaluation", {"data": {"rows": [{"prompt": "two"}]}}, "evaluation.data.rows.0", "also a training prompt"),
    ("evaluation", {"data": {"rows": [{"prompt": "3"}]}, "num_prompts": 2}, "evaluation.num_prompts", "at most 1"),
    ("stages.0.data.mix", {"code": 1}, "stages.0.data.mix.code", "there is no teacher 'code', the job has main"),
    ("stages.0.data.mix", {"main": 0}, "stages.0.data.mix.main", "> 0"),
    ("evaluation", {"data": {"rows": [{"prompt": "3"}], "mix": {"main": 1}}}, "evaluation", "leave it out"),
    ("evaluation", {"verifier": "exact"}, "evaluation", "give both"),
    ("evaluation", {"data": {"rows": [{"prompt": "3"}]}, "verifier": "exact"}, "evaluation.data.rows.0", "'answer'"),
    (
        "evaluation",
        {"data": {"rows": [{"prompt": "3", "verifier": "x"}]}},
        "evaluation.data.rows.0",
        "unknown verifier",
    ),
]


@pytest.mark.parametrize(("path", "value", "param", "text"), WRONG_FIELDS, ids=range(len(WRONG_FIELDS)))
async def test_a_wrong_field_is_named_with_its_fix(
    gateway: Gateway, path: str, value: Any, param: str, text: str
) -> None:
    body = await gateway.refused(changed(path, value))
    assert body["param"] == param, body
    assert text in body["detail"], body
    assert body["code"] == "invalid_request"
    assert body["errors"][0]["param"] == param
    assert await gateway.ctx.jobs.list() == []
    assert gateway.ctx.artifacts.job_ids() == []


async def test_a_key_that_is_no_text_is_refused(gateway: Gateway) -> None:
    assert "unicode" in (await gateway.refused(changed("\ud800", 1)))["detail"]
    assert "unicode" in (await gateway.refused(make_spec(metadata={"\ud800": "x"})))["detail"]


async def test_the_job_all_these_vary_is_accepted(gateway: Gateway) -> None:
    assert (await gateway.submit()).status_code == 201


async def test_several_mistakes_are_reported_at_once(gateway: Gateway) -> None:
    spec = changed("student.model", "nope")
    spec["stages"][0]["sampling"]["temperature"] = 99
    spec["sed"] = 1
    body = await gateway.refused(spec)
    assert {error["param"] for error in body["errors"]} == {"sed", "stages.0.sampling.temperature"}
    assert "1 more" in body["detail"]


async def test_stages_are_told_apart_and_checked_one_by_one(gateway: Gateway) -> None:
    spec = make_spec()
    first = spec["stages"][0]
    spec["stages"] = [first, first]
    assert "stages.1.name: 'main' is stage 0's, too" in (await gateway.refused(spec))["detail"]
    spec["stages"] = [first, {**first, "name": "start"}]
    assert "'start' is what the job begins with" in (await gateway.refused(spec))["detail"]
    endless = {**first, "name": "endless", "sampling": {"stop_token_ids": [1_000_000]}}
    given = {**first, "name": "given", "on_policy_fraction": 0, "loss": {"objective": "cross_entropy"}}
    spec["stages"] = [first, endless, given]
    body = await gateway.refused(spec)
    assert {error["param"][:8] for error in body["errors"]} == {"stages.1", "stages.2"}
    spec["stages"] = [first, {**first, "name": "second"}]
    assert (await gateway.submit(spec)).status_code == 201


async def test_a_teacher_without_rows_is_refused(gateway: Gateway) -> None:
    spec = changed("stages.0.data.rows", [{"prompt": "x", "teacher": "main"}])
    spec["teachers"]["spare"] = {"model": "big"}
    body = await gateway.refused(spec)
    assert body["param"] == "teachers.spare"


async def test_rollouts_must_fit_into_a_queue_entry(gateway: Gateway) -> None:
    add_model(gateway.home, "long", max_length=1_000_000)
    add_model(gateway.home, "long-teacher", max_length=1_000_000, size=8)
    spec = make_spec(student={"model": "long"}, teachers={"main": {"model": "long-teacher"}})
    spec["stages"][0]["data"]["rows"] = [{"prompt": "x" * 57_592}]
    assert (await gateway.submit(spec)).status_code == 201
    spec["stages"][0]["data"]["rows"] = [{"prompt": "x" * 57_593}]
    body = await gateway.refused(spec)
    assert "the longest rollout the queue carries (900 KiB) of 57600" in body["detail"]


async def test_rows_of_a_file_are_checked_and_named_by_line(gateway: Gateway) -> None:
    data = b'{"prompt": "fine"}\n\n' + json.dumps({"prompt": "x" * 300}).encode()
    upload = await gateway.http.post("/v1/files", content=data, headers={"Content-Type": "application/jsonl"})
    assert upload.status_code == 201
    file_id = upload.json()["id"]
    body = await gateway.refused(changed("stages.0.data", {"file": file_id}))
    assert f"line 3 of {file_id}: 300 prompt tokens" in body["detail"]
    assert body["param"] == "stages.0.data.file"


@pytest.mark.parametrize("body", [b"{", b"", b"\xff\xfe{}", b"[" * 100_000, b'{"a": 1,}'])
async def test_malformed_json(gateway: Gateway, body: bytes) -> None:
    answer = await gateway.http.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})
    problem(answer, 422 if not body else 400)


@pytest.mark.parametrize("body", [b"[]", b"null", b'"text"', b"1e999", b'{"seed": NaN}'])
async def test_json_that_is_no_job(gateway: Gateway, body: bytes) -> None:
    answer = await gateway.http.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})
    problem(answer, 422)


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "application/yaml", ""])
async def test_wrong_content_type(gateway: Gateway, content_type: str) -> None:
    headers = {"Content-Type": content_type}
    body = problem(await gateway.http.post("/v1/jobs", content=b"{}", headers=headers), 415)
    assert "Content-Type: application/json" in body["detail"]
    body = problem(await gateway.http.post("/v1/files", content=b"{}", headers=headers), 415)
    assert "application/jsonl" in body["detail"]


async def test_body_over_the_limit_with_length_and_chunked(gateway: Gateway) -> None:
    big = make_spec(name="x" * (1 << 20))
    body = problem(await gateway.submit(big), 413)
    assert "STILLHOUSE_MAX_BODY_MIB" in body["detail"]

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(64):
            yield b" " * (1 << 15)

    headers = {"Content-Type": "application/json"}
    body = problem(await gateway.http.post("/v1/jobs", content=chunks(), headers=headers), 413)
    assert body["code"] == "too_large"


async def test_a_body_of_just_under_the_limit_is_read(gateway: Gateway) -> None:
    padded = json.dumps(make_spec()).encode()
    padded += b" " * ((1 << 20) - len(padded))
    headers = {"Content-Type": "application/json"}
    assert (await gateway.http.post("/v1/jobs", content=padded, headers=headers)).status_code == 201
    problem(await gateway.http.post("/v1/jobs", content=padded + b" ", headers=headers), 413)


BAD_FILES = [
    (b'{"prompt": "a"}\n{"prompt": 5}\n', "line 2: prompt: "),
    (b'{"prompt": "a"}\n\n{"promt": "b"}\n', "line 3: promt: unknown key 'promt'; did you mean 'prompt'?"),
    (b'{"prompt": "a"}\nnot json', "line 2: "),
    (b'{"messages": [{"role": "assistant", "content": "x"}]}', "line 1: the last message must be the user's"),
    (b'{"messages": [{"role": "user", "content": " "}]}', "line 1: the last message of 'messages' is empty"),
    (b'{"prompt": "a", "teacher_prompt": [{"role": "user", "content": ""}]}', "of 'teacher_prompt' is empty"),
    (
        b'{"prompt": "a", "teacher_prompt": [{"role": "system", "content": "x"}]}',
        "must be the user's, got role 'system'",
    ),
    (b'[{"prompt": "a"}]', "line 1: "),
    (b"\xff\xff\n", "line 1: "),
    (b"", "no rows"),
    (b"\n\n \n", "no rows"),
]


@pytest.mark.parametrize(("data", "text"), BAD_FILES)
async def test_a_wrong_line_of_a_file_is_named(gateway: Gateway, data: bytes, text: str) -> None:
    answer = await gateway.http.post("/v1/files", content=data, headers={"Content-Type": "application/jsonl"})
    assert text in problem(answer, 422)["detail"]
    assert list((gateway.ctx.artifacts.root / "files").iterdir()) == []


async def test_wrong_queries(gateway: Gateway) -> None:
    job = (await gateway.submit()).json()["id"]
    for url, param in [
        ("/v1/jobs?limit=0", "limit"),
        ("/v1/jobs?limit=1000", "limit"),
        ("/v1/jobs?statu=queued", "statu"),
        ("/v1/jobs?status=done", "status"),
        ("/v1/jobs?order=up", "order"),
        ("/v1/jobs?after=x:lease", "after"),
        (f"/v1/jobs/{job}/events?after=١", "after"),
        ("/v1/jobs/..%2fx", "job_id"),
        (f"/v1/jobs/{job}/events?after=x", "after"),
        (f"/v1/jobs/{job}/metrics?step_from=-1", "step_from"),
        ("/v1/files/file_UPPERCASE", "file_id"),
    ]:
        answer = await gateway.http.get(url)
        if answer.status_code != 404:
            assert problem(answer, 422)["param"] == param, url
        else:
            assert ".." in url


async def test_what_does_not_exist(gateway: Gateway) -> None:
    job = (await gateway.submit()).json()["id"]
    for url in [
        "/v1/nothing",
        "/v1/jobs/job_0123456789",
        "/v1/jobs/job_0123456789/events",
        "/v1/jobs/job_0123456789/metrics",
        "/v1/jobs/job_0123456789/evaluations",
        "/v1/jobs/job_0123456789/checkpoints",
        f"/v1/jobs/{job}/checkpoints/ckpt_1-00000001-abcdef01/download",
        f"/v1/jobs/{job}/checkpoints/ckpt_export/download",
        f"/v1/jobs/{job}/checkpoints/..%2f..%2fjob.json/download",
        "/v1/files/file_0123456789",
        "/v1/models/nope",
    ]:
        assert problem(await gateway.http.get(url), 404)["code"] == "not_found"
    problem(await gateway.http.post("/v1/jobs/job_0123456789/cancel"), 404)
    assert problem(await gateway.http.get("/v1/jobs?after=job_0123456789"), 404)["param"] == "after"


async def test_wrong_method(gateway: Gateway) -> None:
    answer = await gateway.http.delete("/v1/jobs")
    problem(answer, 405)
    assert answer.headers["allow"]


async def test_a_crash_says_nothing_about_itself(gateway: Gateway) -> None:
    (gateway.home / "models.yaml").write_text("models: {small: {name: secret-detail}}")
    body = problem(await gateway.http.get("/v1/models"), 500)
    assert "secret-detail" not in json.dumps(body)
    assert body["code"] == "internal"


async def test_a_broken_file_of_keys_is_logged(gateway: Gateway) -> None:
    gateway.ctx.settings.keys_path().write_text("{")
    with capture_logs() as logs:
        problem(await gateway.http.get("/v1/jobs"), 500)
    assert "request failed" in [entry["event"] for entry in logs]


async def test_an_invented_method_gets_no_time_series_of_its_own(gateway: Gateway) -> None:
    await gateway.http.request("BREW", "/v1/jobs")
    metrics = generate_latest(exported("gateway")).decode()
    assert "BREW" not in metrics
    assert 'method="other"' in metrics


def test_a_refused_command_is_our_mistake_and_a_full_server_is_not() -> None:
    for error, status in ((ResponseError("ERR syntax"), 500), (OutOfMemoryError("OOM"), 503)):
        assert problem_response(error, "/v1/jobs", "r").status_code == status


def test_the_status_type_is_the_list_of_statuses() -> None:
    assert set(get_args(Status)) == set(STATUSES)
