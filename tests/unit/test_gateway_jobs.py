"""Jobs over REST: durable before the answer, once per key, listed, cancelled, with their history."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from stillhouse.core.blobs import read_json, write_json
from stillhouse.core.queue import keys
from stillhouse.core.queue.streams import Scope
from stillhouse.core.recipes import recipes
from stillhouse.gateway.routes import deadline, system
from tests.gateway_kit import Gateway, make_spec, open_gateway, problem


@pytest.fixture
async def gateway(redis_url: str, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with open_gateway(redis_url, tmp_path) as opened:
        yield opened


async def claimed(gateway: Gateway, status: str = "running") -> Scope:
    """A job that a trainer leads."""
    job = (await gateway.submit()).json()["id"]
    scope = Scope(job, await gateway.ctx.jobs.claim(job, "trainer-a", 5.0, 0))
    await gateway.ctx.jobs.update(scope, status=status)
    return scope


async def test_an_accepted_job_is_durable_and_readable(gateway: Gateway) -> None:
    answer = await gateway.submit(make_spec(metadata={"team": "a"}))
    assert answer.status_code == 201
    job = answer.json()
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
    assert job["object"] == "job"
    assert (job["status"], job["is_terminal"], job["epoch"]) == ("queued", False, 0)
    assert job["created_at"].endswith("Z")
    assert job["metadata"] == {"team": "a"}
    assert job["progress"]["total_steps"] == 3
    assert job["spec"]["stages"][0]["schedule"]["group_size"] == 1, "defaults are filled in"
    document = read_json(gateway.ctx.artifacts.job(job["id"]).job_json)
    assert document["spec"] == job["spec"]
    assert document["owner"] == "tester"
    assert (await gateway.http.get(answer.headers["location"])).json() == job


async def test_the_same_key_gives_the_same_answer(gateway: Gateway) -> None:
    first = await gateway.submit(key="k1")
    scope = Scope(first.json()["id"], await gateway.ctx.jobs.claim(first.json()["id"], "trainer-a", 5.0, 0))
    await gateway.ctx.jobs.update(scope, status="running")
    second = await gateway.submit(key="k1")
    assert second.status_code == 201
    assert second.content == first.content
    assert second.headers["location"] == first.headers["location"]
    assert second.headers["idempotent-replayed"] == "true"
    body = problem(await gateway.submit(make_spec(seed=7), key="k1"), 422)
    assert body["param"] == "Idempotency-Key"
    assert first.json()["id"] in body["detail"]
    assert problem(await gateway.submit(key="a b"), 422)["param"] == "Idempotency-Key"
    other = await gateway.submit(key="k2")
    assert other.json()["id"] != first.json()["id"]


async def test_requests_with_one_key_at_once_make_one_job(gateway: Gateway) -> None:
    answers = await asyncio.gather(*(gateway.submit(key="k") for _ in range(20)))
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.content for answer in answers}) == 1
    assert gateway.ctx.artifacts.job_ids() == [answers[0].json()["id"]]
    assert len(list((gateway.ctx.artifacts.root / "jobs").iterdir())) == 1, "no folder is left of the losers"


async def test_a_replay_needs_no_model_any_more(gateway: Gateway) -> None:
    first = await gateway.submit(key="k1")
    (gateway.home / "models.yaml").unlink()
    assert (await gateway.submit(key="k1")).content == first.content


async def test_listing_pages_through_all_jobs_once(gateway: Gateway) -> None:
    ids = [(await gateway.submit(make_spec(seed=seed))).json()["id"] for seed in range(5)]
    for order, expected in (("asc", ids), ("desc", ids[::-1])):
        seen: list[str] = []
        after = ""
        while True:
            page = (await gateway.http.get(f"/v1/jobs?limit=2&order={order}&after={after}")).json()
            seen += [job["id"] for job in page["data"]]
            if not page["has_more"]:
                break
            after = seen[-1]
        assert seen == expected
    assert page["object"] == "list"
    assert page["data"][0]["spec"]["stages"][0]["data"]["rows"] is None


async def test_listing_by_status(gateway: Gateway) -> None:
    ids = [(await gateway.submit(make_spec(seed=seed))).json()["id"] for seed in range(4)]
    await gateway.http.post(f"/v1/jobs/{ids[1]}/cancel")
    await gateway.http.post(f"/v1/jobs/{ids[3]}/cancel")
    page = (await gateway.http.get("/v1/jobs?status=cancelled&order=asc&limit=1")).json()
    assert [job["id"] for job in page["data"]] == [ids[1]]
    assert page["has_more"]
    page = (await gateway.http.get(f"/v1/jobs?status=cancelled&order=asc&limit=1&after={ids[1]}")).json()
    assert [job["id"] for job in page["data"]] == [ids[3]]
    assert not page["has_more"]


async def test_cancelling_a_job_nobody_claimed_ends_it(gateway: Gateway) -> None:
    job = (await gateway.submit()).json()["id"]
    answer = await gateway.http.post(f"/v1/jobs/{job}/cancel")
    assert answer.status_code == 202
    assert (answer.json()["status"], answer.json()["is_terminal"]) == ("cancelled", True)
    assert answer.json()["finished_at"]
    assert await gateway.ctx.jobs.active_ids() == []
    assert read_json(gateway.ctx.artifacts.job(job).root / "final.json")["status"] == "cancelled"
    body = problem(await gateway.http.post(f"/v1/jobs/{job}/cancel"), 409)
    assert "'cancelled'" in body["detail"]
    assert body["code"] == "conflict"


@pytest.mark.parametrize("status", ["queued", "validating", "starting", "running", "stalled"])
async def test_cancelling_a_claimed_job_asks_its_trainer(gateway: Gateway, status: str) -> None:
    scope = await claimed(gateway, status)
    for _ in range(2):
        answer = await gateway.http.post(f"/v1/jobs/{scope.job_id}/cancel")
        assert (answer.status_code, answer.json()["status"]) == (202, "cancelling")
    events = await gateway.ctx.jobs.events(scope.job_id)
    assert [event["data"].get("status") for event in events] == ["queued", "cancelling"]


async def test_the_view_of_a_running_job(gateway: Gateway) -> None:
    scope = await claimed(gateway)
    progress = {
        "phase": "training",
        "stage": "main",
        "bottleneck": "teacher",
        "eta_s": 12.5,
        "tokens": 99,
        "kl": float("nan"),
    }
    weights = {"policy_version": 2, "epoch": 1}
    await gateway.ctx.jobs.update(scope, step=2, progress=progress, weights=weights, started_at=1.5, usage={"a": 1})
    job = (await gateway.http.get(f"/v1/jobs/{scope.job_id}")).json()
    assert job["progress"] | {} == {
        "step": 2, "total_steps": 3, "percent": 66.67, "eta_s": 12.5, "phase": "training", "bottleneck": "teacher",
        "stage": "main", "tokens": 99, "kl": None,
    }  # fmt: skip
    assert job["policy_version"] == 2
    assert job["started_at"] == "1970-01-01T00:00:01.500Z"
    assert (job["trainer"], job["usage"], job["epoch"]) == ("trainer-a", {"a": 1}, 1)


async def test_event_pages_go_on_where_the_last_one_ended(gateway: Gateway) -> None:
    job = (await gateway.submit()).json()["id"]
    for number in range(6):
        await gateway.ctx.jobs.event(job, "log", str(number))
    seen: list[str] = []
    after = ""
    while True:
        page = (await gateway.http.get(f"/v1/jobs/{job}/events?limit=3&after={after}")).json()
        seen += [event["message"] for event in page["data"]]
        if not page["has_more"]:
            break
        after = page["data"][-1]["id"]
    assert seen == ["queued", "0", "1", "2", "3", "4", "5"]


async def finished_with_events(gateway: Gateway, number: int) -> str:
    scope = await claimed(gateway)
    for index in range(number):
        await gateway.ctx.jobs.event(scope.job_id, "step", f"line {index}\nand more", step=index)
    await gateway.ctx.jobs.update(scope, status="succeeded", release=True)
    await gateway.ctx.jobs.event(scope.job_id, "job.status", "done", status="succeeded")
    return scope.job_id


def parse_sse(text: str) -> list[dict[str, Any]]:
    """Events of a stream; the SSE id and event fields must repeat what the data says."""
    events = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if line and not line.startswith(":"))
        if fields:
            event = json.loads(fields["data"])
            assert (fields["id"], fields["event"]) == (event["id"], event["type"])
            events.append(event)
    return events


@pytest.mark.parametrize("is_wiped", [False, True], ids=["from redis", "from the file"])
async def test_a_stream_resumes_exactly_after_every_event(gateway: Gateway, is_wiped: bool) -> None:
    job = await finished_with_events(gateway, 5)
    if is_wiped:
        await gateway.ctx.redis.delete(keys.events(job))
    headers = {"Accept": "text/event-stream"}
    answer = await gateway.http.get(f"/v1/jobs/{job}/events", headers=headers)
    assert answer.headers["content-type"].startswith("text/event-stream")
    whole = parse_sse(answer.text)
    assert [event["type"] for event in whole] == ["job.status", *["step"] * 5, "job.status"]
    assert whole[-1]["data"] == {"status": "succeeded"}
    for position, event in enumerate(whole[:-1]):
        for params, extra in (({}, {"Last-Event-ID": event["id"]}), ({"after": event["id"]}, {})):
            rest = await gateway.http.get(f"/v1/jobs/{job}/events", params=params, headers={**headers, **extra})
            assert parse_sse(rest.text) == whole[position + 1 :]


async def test_trimmed_events_come_from_the_file(gateway: Gateway) -> None:
    job = await finished_with_events(gateway, 5)
    whole = (await gateway.http.get(f"/v1/jobs/{job}/events")).json()["data"]
    await gateway.ctx.redis.xtrim(keys.events(job), maxlen=2, approximate=False)
    assert (await gateway.http.get(f"/v1/jobs/{job}/events")).json()["data"] == whole
    page = (await gateway.http.get(f"/v1/jobs/{job}/events?limit=4&after={whole[1]['id']}")).json()
    assert page["data"] == whole[2:6]
    assert page["has_more"]


async def taken_over(gateway: Gateway, scope: Scope) -> Scope:
    """The claim after `scope`."""
    await gateway.ctx.redis.delete(keys.lease(scope.job_id))
    return Scope(scope.job_id, await gateway.ctx.jobs.claim(scope.job_id, "trainer-other", 60.0, 0))


async def with_metrics(gateway: Gateway) -> str:
    scope = await claimed(gateway)
    for step in range(1, 4):
        await gateway.ctx.jobs.metric(scope, step, {"loss": step / 2, "kl": float("nan") if step == 2 else 0.1})
    await gateway.ctx.jobs.metric(await taken_over(gateway, scope), 3, {"loss": 9.0, "late": 1.0})
    return scope.job_id


@pytest.mark.parametrize("is_wiped", [False, True], ids=["from redis", "from the file"])
async def test_metrics_by_name_and_step(gateway: Gateway, is_wiped: bool) -> None:
    job = await with_metrics(gateway)
    if is_wiped:
        await gateway.ctx.redis.delete(keys.metrics(job))
    points = (await gateway.http.get(f"/v1/jobs/{job}/metrics")).json()["data"]
    assert [(point["step"], point["epoch"]) for point in points] == [(1, 1), (2, 1), (3, 2)]
    assert points[1]["values"] == {"loss": 1.0, "kl": None}
    assert points[2]["values"] == {"loss": 9.0, "late": 1.0}, "of a step that was trained again the newest"
    points = (await gateway.http.get(f"/v1/jobs/{job}/metrics?names=loss&step_from=2&step_to=2")).json()["data"]
    assert [point["values"] for point in points] == [{"loss": 1.0}]
    problem(await gateway.http.get(f"/v1/jobs/{job}/metrics?step_from=2&step_to=1"), 422)


async def test_metrics_as_csv(gateway: Gateway) -> None:
    job = await with_metrics(gateway)
    answer = await gateway.http.get(f"/v1/jobs/{job}/metrics", headers={"Accept": "text/csv"})
    assert answer.headers["content-type"].startswith("text/csv")
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    assert [(row["epoch"], row["step"], row["loss"], row["kl"], row["late"]) for row in rows] == [
        ("1", "1", "0.5", "0.1", ""),
        ("1", "2", "1.0", "", ""),
        ("2", "3", "9.0", "", "1.0"),
    ]


async def test_evaluations_come_in_step_order(gateway: Gateway) -> None:
    job = (await gateway.submit()).json()["id"]
    folder = gateway.ctx.artifacts.job(job).evaluations
    for step in (10, 2, 0):
        write_json(folder / f"{step}.json", {"step": step, "reverse_kl": 1.0 / (step + 1)})
    data = (await gateway.http.get(f"/v1/jobs/{job}/evaluations")).json()["data"]
    assert [item["step"] for item in data] == [0, 2, 10]


async def test_a_queue_server_that_is_silent_is_503(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    async def silence(*_: object, **__: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(deadline, "REQUEST_TIMEOUT_S", 0.05)
    monkeypatch.setattr(system, "READY_TIMEOUT_S", 0.05)
    monkeypatch.setattr(gateway.ctx.redis, "execute_command", silence)
    for url in ("/v1/jobs/job_0123456789", "/readyz"):
        assert problem(await gateway.http.get(url), 503)["code"] == "unavailable"


async def test_redis_down_is_503_with_retry_after(tmp_path: Path) -> None:
    async with open_gateway("redis://127.0.0.1:1/0", tmp_path) as gateway:
        gateway.ctx.redis.connection_pool.connection_kwargs["retry"].update_supported_errors([])
        gateway.ctx.redis.connection_pool.connection_kwargs["retry"]._retries = 0
        for answer in (await gateway.http.get("/v1/jobs"), await gateway.submit(), await gateway.http.get("/readyz")):
            assert problem(answer, 503)["code"] == "unavailable"
            assert int(answer.headers["retry-after"]) > 0
        assert gateway.ctx.artifacts.job_ids() == [], "what was refused left nothing behind"
        assert (await gateway.http.get("/healthz")).status_code == 200


async def test_an_answer_that_takes_too_long_is_not_blamed_on_the_queue_server(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hang(*_: Any, **__: Any) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(deadline, "REQUEST_TIMEOUT_S", 0.05)
    monkeypatch.setattr(gateway.ctx.jobs, "list", hang)
    body = problem(await gateway.http.get("/v1/jobs"), 503)
    assert "took longer than 0.05 s" in body["detail"]
    assert "queue server" not in body["detail"]


async def test_metrics_are_read_back_in_pages_and_the_last_of_a_step_wins(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stillhouse.core.queue.jobs.METRICS_PAGE", 4)
    scope = await claimed(gateway)
    jobs = gateway.ctx.jobs
    for step in range(1, 11):
        await jobs.metric(scope, step, {"loss": 0.0})
    second = await taken_over(gateway, scope)
    for step in range(6, 14):
        await jobs.metric(second, step, {"loss": 0.0})
    for step_from, step_to in ((0, None), (1, 13), (8, None), (7, 9), (13, None), (14, None), (0, 5)):
        points = await jobs.metrics(scope.job_id, step_from=step_from, step_to=step_to)
        expected = range(max(step_from, 1), (13 if step_to is None else step_to) + 1)
        assert [(point["step"], point["epoch"]) for point in points] == [(n, 1 if n < 6 else 2) for n in expected]


async def test_pre_flights_run_one_at_a_time(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    running, most = 0, 0

    def slow(*_: Any) -> dict[str, Any]:
        nonlocal running, most
        running += 1
        most = max(most, running)
        threading.Event().wait(0.02)  # gives up the interpreter, so that another one could start
        running -= 1
        return {}

    monkeypatch.setattr("stillhouse.gateway.jobs.preflight", slow)
    monkeypatch.setattr("stillhouse.gateway.rows.LIGHT_ROWS", 1)  # small jobs need not wait
    answers = await asyncio.gather(*(gateway.submit(make_spec(seed=seed)) for seed in range(4)))
    assert [answer.status_code for answer in answers] == [201] * 4
    assert most == 1


async def test_rest_lists_the_verifiers(gateway: Gateway) -> None:
    answer = await gateway.http.get("/v1/verifiers")
    assert answer.status_code == 200
    found: dict[str, Any] = {info["id"]: info for info in answer.json()["data"]}
    assert found["math"] == {
        "id": "math",
        "object": "verifier",
        "about": "The last boxed or final expression equals the reference answer, by math-verify.",
        "needs_answer": True,
        "source": "built in",
        "problem": "",
    }


async def test_rest_explains_recipes_and_takes_them(gateway: Gateway) -> None:
    listed = (await gateway.http.get("/v1/recipes")).json()["data"]
    assert [item["id"] for item in listed] == list(recipes())
    one = await gateway.http.get("/v1/recipes/mopd")
    assert one.json() == next(item for item in listed if item["id"] == "mopd")
    preset = one.json()["presets"][0]
    assert preset["values"]["schedule.prompts_per_step"]["source"].startswith("arXiv:2606.30406, ")
    assert "unknown recipe 'nope'" in problem(await gateway.http.get("/v1/recipes/nope"), 404)["detail"]

    rows = {"rows": [{"prompt": "one"}, {"prompt": "two"}]}
    stage = {"recipe": "mopd", "data": rows, "sampling": {"max_tokens": 8}, "schedule": {"prompts_per_step": 2}}
    accepted = await gateway.submit(make_spec(stages=[stage]))
    assert accepted.status_code == 201, accepted.text
    stored = accepted.json()["spec"]["stages"][0]
    assert stored["recipe"] == "mopd"
    assert stored["loss"]["advantage_clip"] == preset["stage"]["loss"]["advantage_clip"] == 5
    assert stored["schedule"]["steps"] == preset["stage"]["schedule"]["steps"]
    assert (stored["schedule"]["prompts_per_step"], stored["sampling"]["max_tokens"]) == (2, 8)
    refused = await gateway.refused(make_spec(stages=[{**stage, "recipe": "mopt"}]))
    assert [item["param"] for item in refused["errors"]] == ["stages.0.recipe"]


async def test_the_openapi_document_lets_recipes_stand_for_loss_and_schedule(gateway: Gateway) -> None:
    stage = (await gateway.http.get("/openapi.json")).json()["components"]["schemas"]["StageSpec"]
    assert stage["required"] == ["data"]
    assert {"recipe", "loss", "schedule"} <= stage["properties"].keys()
