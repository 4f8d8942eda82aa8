"""What waits for whom, who is well, and who uses which model."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from stillhouse.core.queue import keys
from stillhouse.core.queue.registry import ServiceInfo
from stillhouse.core.queue.streams import Scope
from stillhouse.gateway.deps import Caller
from stillhouse.gateway.queues import models
from stillhouse.gateway.queues import services as services_for
from stillhouse.v1 import rollout_pb2
from tests.gateway_kit import Gateway, open_gateway, problem


@pytest.fixture
async def gateway(redis_url: str, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with open_gateway(redis_url, tmp_path) as opened:
        yield opened


async def services(gateway: Gateway) -> dict[str, Any]:
    answer = await gateway.http.get("/v1/services")
    assert answer.status_code == 200, answer.text
    return answer.json()


async def beat(gateway: Gateway, role: str, **extra: str) -> None:
    await gateway.ctx.registry.beat(ServiceInfo(role, f"{role}-0", "h:1", 1, time.time(), 0.0, "1.2", extra=extra))


async def test_nothing_to_do(gateway: Gateway) -> None:
    body = await services(gateway)
    assert body["data"] == []
    assert [(queue["role"], queue["waiting"], queue["oldest_s"]) for queue in body["queues"]] == [
        ("trainer", 0, None),
        ("sampler", 0, None),
        ("teacher", 0, None),
    ]


async def test_work_is_counted_by_who_takes_it(gateway: Gateway) -> None:
    waiting, running = [(await gateway.submit()).json()["id"] for _ in range(2)]
    scope = Scope(running, await gateway.ctx.jobs.claim(running, "trainer-a", 60.0, 0))
    await gateway.ctx.jobs.update(scope, status="running")
    queue, redis = gateway.ctx.queue, gateway.ctx.redis
    prompts = keys.prompts(running, scope.epoch)
    await queue.open_stream(scope, prompts, keys.SAMPLERS_GROUP)
    for number in range(3):
        await queue.add(scope, prompts, f"plan:{number}", b"group")
    await queue.claim([prompts], keys.SAMPLERS_GROUP, "sampler-0", 1, 100)
    for teacher, model, number in (("main", "big", 2), ("other", "small", 1)):
        stream = keys.rollouts(running, scope.epoch, teacher)
        await queue.open_stream(scope, stream, keys.TEACHERS_GROUP)
        for index in range(number):
            await queue.add(scope, stream, f"{teacher}:{index}", b"rollout")
        task = rollout_pb2.TeacherTask(model=model).SerializeToString()
        await redis.sadd(keys.TEACHERS, model)  # type: ignore[misc]
        await redis.hset(keys.teacher(model), stream, task)  # type: ignore[misc]
    await beat(gateway, "teacher")
    await beat(gateway, "gateway")
    body = await services(gateway)
    found = {(queue["role"], queue["model"]): (queue["waiting"], queue["in_work"]) for queue in body["queues"]}
    assert found == {
        ("trainer", ""): (1, 1),
        ("sampler", ""): (2, 1),
        ("teacher", "big"): (2, 0),
        ("teacher", "small"): (1, 0),
    }
    assert all(0 <= queue["oldest_s"] < 60 for queue in body["queues"])
    own, gateways = body["data"][1], body["data"][0]
    assert (own["role"], own["queue"]["waiting"], own["queue"]["model"]) == ("teacher", 3, "")
    assert (gateways["role"], gateways["queue"]) == ("gateway", None)
    assert waiting != running


async def test_a_service_says_how_it_is(gateway: Gateway) -> None:
    await beat(gateway, "sampler")
    await beat(gateway, "teacher", problem="the model is too big")
    await beat(gateway, "trainer", draining="yes")
    body = await services(gateway)
    assert [service["health"] for service in body["data"]] == ["ok", "problem", "draining"]
    assert body["data"][0]["heartbeat_age_s"] < 5
    assert body["data"][0]["version"] == "1.2"
    await gateway.ctx.redis.zadd(keys.SERVICES, {"sampler:sampler-0": time.time() - 6})
    late = (await services(gateway))["data"][0]
    assert (late["health"], late["heartbeat_age_s"] >= 6) == ("late", True)


async def test_jobs_of_others_are_not_named(gateway: Gateway) -> None:
    job = (await gateway.submit()).json()["id"]
    await gateway.ctx.registry.beat(ServiceInfo("trainer", "trainer-0", "h:1", 1, time.time(), 0.0, job_id=job))
    owner = (await gateway.ctx.jobs.get(job)).owner
    for name, seen in ((owner, job), ("them", "")):
        found = await services_for(gateway.ctx, Caller(name, ("read",)))
        assert [service.job_id for service in found.data] == [seen]
        assert found.queues[0].waiting == 1, "how much there is to do is no secret"


async def test_a_model_says_where_it_is_and_for_whom(gateway: Gateway) -> None:
    job = (await gateway.submit()).json()["id"]
    await beat(gateway, "teacher", models="big small")
    await beat(gateway, "sampler", models="small")
    listed = {model["id"]: model for model in (await gateway.http.get("/v1/models")).json()["data"]}
    assert listed["big"]["loaded_by"] == ["teacher/teacher-0"]
    assert listed["small"]["loaded_by"] == ["sampler/sampler-0", "teacher/teacher-0"]
    assert [listed[name]["used_by"] for name in ("big", "small")] == [[job], [job]]
    assert (await gateway.http.get("/v1/models/small")).json() == listed["small"]
    (theirs,) = await models(gateway.ctx, Caller("them", ("read",)), [gateway.ctx.models.get("small")])
    assert theirs.used_by == [], "jobs of others are none of their business"
    await gateway.http.post(f"/v1/jobs/{job}/cancel")
    assert (await gateway.http.get("/v1/models/small")).json()["used_by"] == []
    problem(await gateway.http.get("/v1/models/none"), 404)


async def test_metrics_as_fewer_points(gateway: Gateway) -> None:
    job = (await gateway.submit()).json()["id"]
    scope = Scope(job, await gateway.ctx.jobs.claim(job, "trainer-a", 60.0, 0))
    for step in range(1, 11):
        values = {"loss": float(step), "odd": float("nan") if step % 2 == 0 else 1.0}
        await gateway.ctx.jobs.metric(scope, step, values | ({"rare": 5.0} if step == 3 else {}), stage="one")

    async def ask(**query: Any) -> list[dict[str, Any]]:
        return (await gateway.http.get(f"/v1/jobs/{job}/metrics", params=query)).json()["data"]

    points = await ask(resolution=4)
    assert [(point["first_step"], point["step"]) for point in points] == [(1, 3), (4, 6), (7, 9), (10, 10)]
    assert [point["values"]["loss"] for point in points] == [2.0, 5.0, 8.0, 10.0]
    assert [point["values"]["odd"] for point in points] == [1.0, 1.0, 1.0, None], "means of what is finite"
    assert [point["values"].get("rare") for point in points] == [5.0, None, None, None]
    assert await ask(resolution=10) == await ask(resolution=99) == await ask()
    assert [point["first_step"] for point in await ask()] == list(range(1, 11))
    (one,) = await ask(resolution=1, step_from=3, step_to=4, names="loss")
    assert (one["first_step"], one["step"], one["values"]) == (3, 4, {"loss": 3.5})
    table = await gateway.http.get(
        f"/v1/jobs/{job}/metrics", params={"resolution": 2, "names": "loss"}, headers={"Accept": "text/csv"}
    )
    rows = [line.split(",") for line in table.text.splitlines()]
    assert (rows[0][:3], rows[0][-1]) == (["epoch", "first_step", "step"], "loss")
    assert [(row[1], row[2], row[-1]) for row in rows[1:]] == [("1", "5", "3.0"), ("6", "10", "8.0")]
    problem(await gateway.http.get(f"/v1/jobs/{job}/metrics", params={"resolution": 0}), 422)


async def test_checkpoints_and_problems_of_others_are_not_named(gateway: Gateway) -> None:
    job = (await gateway.submit()).json()["id"]
    checkpoint = f"{job}/ckpt_1-00000002-00000000"
    await beat(gateway, "teacher", models=f"big {checkpoint}", problem=f"model '{checkpoint}' does not verify")
    await beat(gateway, "sampler", models="big", problem="model 'big' changed since it was registered")

    async def shown(caller: Caller) -> dict[str, tuple[str, str]]:
        found = (await services_for(gateway.ctx, caller)).data
        return {each.role: (each.extra["models"], each.extra["problem"]) for each in found}

    own = await shown(Caller("tester"))
    assert own["teacher"] == (f"big {checkpoint}", f"model '{checkpoint}' does not verify")
    other = await shown(Caller("bob", ("read",)))
    assert other["teacher"] == ("big", "it concerns another owner's job")
    assert other["sampler"] == own["sampler"] == ("big", "model 'big' changed since it was registered")
