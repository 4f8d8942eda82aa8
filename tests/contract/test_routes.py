"""Every route x {no key, unknown key, too small a scope, another owner, the right owner, an administrator}.

The routes come from the application itself: whoever adds one says in ROUTES how it is called rightly. Laws:

- without a known key: 401; with a scope that is too small: 403 that names both scopes.
- what belongs to an owner looks to another one exactly like what does not exist, and is in no list of theirs.
- the right owner and an administrator get what the route promises.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.routing import Route

from stillhouse.core.blobs import sealed, write_json
from stillhouse.core.keys import create_key, remove_key
from stillhouse.core.schemas import Estimate, Preflight, Tokens
from stillhouse.gateway.auth import OPEN_PATHS
from stillhouse.gateway.middleware import SAFE_METHODS
from stillhouse.trainer import manifests
from tests.gateway_kit import Gateway, make_spec, open_gateway, problem

ROW = '{"prompt": "a row of %s"}\n'
SCORE = {"model": "big", "items": [{"prompt": "a", "text": "b"}]}
UNAVAILABLE = {503}
"""Routes that need a service, of which none runs here."""


@dataclass(frozen=True)
class Call:
    """A right request. `{...}` of the path is filled in from the owner's objects, `path` overrides that."""

    status: set[int] = field(default_factory=lambda: {200})
    json: Any = None
    content: str = ""
    kind: str = "application/json"
    path: str = ""
    scope: str = ""
    """Where it is not read for GET and write for the rest."""


ROUTES: dict[str, Call] = {
    "POST /v1/jobs": Call({201}, json=make_spec()),
    "GET /v1/jobs": Call(),
    "POST /v1/jobs/validate": Call(json=make_spec()),
    "GET /v1/jobs/{job_id}": Call(),
    "GET /v1/jobs/{job_id}/preflight": Call(),
    "POST /v1/jobs/{job_id}/cancel": Call({202}),
    "POST /v1/jobs/{job_id}/retry": Call({409}),  # it has not ended
    "DELETE /v1/jobs/{job_id}": Call({409}),
    "POST /v1/jobs/{job_id}/pause": Call({202}),
    "POST /v1/jobs/{job_id}/resume": Call({202, 409}),  # 409: it is not paused
    "GET /v1/jobs/{job_id}/events": Call(),
    "GET /v1/jobs/{job_id}/metrics": Call(),
    "GET /v1/jobs/{job_id}/evaluations": Call(),
    "GET /v1/jobs/{job_id}/samples": Call(),
    "GET /v1/jobs/{job_id}/logs": Call(),
    "GET /v1/jobs/{job_id}/dead_letters": Call(),
    "POST /v1/jobs/{job_id}/dead_letters/retry": Call({200, 409}, json={"ids": ["a"]}),  # 409: nobody leads the job
    "GET /v1/jobs/{job_id}/checkpoints": Call(),
    "GET /v1/jobs/{job_id}/checkpoints/{checkpoint_id}": Call(),
    "DELETE /v1/jobs/{job_id}/checkpoints/{checkpoint_id}": Call({204, 409}),  # 409: the newest one of a job that runs
    "PUT /v1/jobs/{job_id}/checkpoints/{checkpoint_id}/best": Call(),
    "DELETE /v1/jobs/{job_id}/checkpoints/{checkpoint_id}/best": Call(),
    "GET /v1/jobs/{job_id}/checkpoints/{checkpoint_id}/download": Call(),
    "HEAD /v1/jobs/{job_id}/checkpoints/{checkpoint_id}/download": Call(),
    "GET /v1/jobs/{job_id}/report": Call({200, 409}),  # 409: it has not ended
    # a body without a method: rows and teachers are for the tests of the façade
    "POST /v1/fine_tuning/jobs": Call({400}, json={"model": "small", "training_file": "file_00000000000000000009"}),
    "GET /v1/fine_tuning/jobs": Call(),
    "GET /v1/fine_tuning/jobs/{job_id}": Call(),
    "GET /v1/fine_tuning/jobs/{job_id}/events": Call(),
    "GET /v1/fine_tuning/jobs/{job_id}/checkpoints": Call(),
    "POST /v1/fine_tuning/jobs/{job_id}/cancel": Call(),
    "POST /v1/fine_tuning/jobs/{job_id}/pause": Call(),
    "POST /v1/fine_tuning/jobs/{job_id}/resume": Call({200, 409}),
    "POST /v1/files": Call({201}, content=ROW % "another file", kind="application/jsonl"),
    "GET /v1/files": Call(),
    "GET /v1/files/{file_id}": Call(),
    "GET /v1/files/{file_id}/content": Call(),
    "DELETE /v1/files/{file_id}": Call(),
    "POST /v1/score": Call(UNAVAILABLE, json=SCORE),
    "POST /v1/generate": Call(UNAVAILABLE, json={"model": "big", "prompt": "a", "max_tokens": 1}),
    "GET /v1/keys/me": Call(),
    "GET /v1/keys": Call(scope="admin"),
    "POST /v1/keys": Call({201}, json={"name": "new"}, scope="admin"),
    "DELETE /v1/keys/{name}": Call({204}, path="/v1/keys/spare", scope="admin"),
    "GET /v1/models": Call(),
    "GET /v1/models/{name}": Call(path="/v1/models/small"),
    "GET /v1/verifiers": Call(),
    "GET /v1/recipes": Call(),
    "GET /v1/recipes/{name}": Call(path="/v1/recipes/gkd"),
    "GET /v1/services": Call(),
}
"""How each route is called rightly, and what it then answers."""


class World:
    """A gateway with callers, and objects of Alice."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        path = gateway.ctx.settings.keys_path()
        self.keys = {
            "unknown": "stillhouse_unknown",
            "reader": create_key(path, "reader", owner="alice", scopes=["read"]),
            "alice": create_key(path, "alice", scopes=["write"]),
            "bob": create_key(path, "bob", scopes=["write"]),
            "admin": create_key(path, "admin", scopes=["admin"]),
        }
        self.ids: dict[str, str] = {}

    async def fill(self) -> World:
        """Make one object of each kind, Alice's, in place of those there were."""
        for name in ("spare", "new"):
            remove_key(self.gateway.ctx.settings.keys_path(), name)
        create_key(self.gateway.ctx.settings.keys_path(), "spare")
        job = await self.send("alice", "POST /v1/jobs")
        content = ROW % "Alice"
        file = await self.send("alice", "POST /v1/files", Call(content=content, kind="application/jsonl"))
        self.ids = {"job_id": job.json()["id"], "file_id": file.json()["id"]}
        artifacts = self.gateway.ctx.artifacts.job(self.ids["job_id"])
        manifests.open_epoch(artifacts, 1, "a")
        ref = manifests.commit(artifacts, 1, 2, {}, lambda folder: (folder / "model.safetensors").touch())
        self.ids["checkpoint_id"] = f"ckpt_1-{ref.name}"
        none = Tokens(at_most=0, expected=0)
        costs = Estimate(sampled_tokens=none, scored_tokens=none, trained_tokens=none, bytes={}, seconds=None)
        found = Preflight(is_live=True, verdict="ok", checks=[], estimate=costs)
        write_json(artifacts.preflight, sealed(found.model_dump(mode="json")))
        return self

    async def send(
        self, caller: str, route: str, call: Call | None = None, ids: dict[str, str] | None = None
    ) -> httpx.Response:
        """The answer of a route to a caller; `ids` instead of Alice's."""
        call = call or ROUTES[route]
        method, _, template = route.partition(" ")
        headers = {"Authorization": f"Bearer {self.keys[caller]}" if caller else ""}
        headers |= {"Content-Type": call.kind} if call.content else {}
        body: dict[str, Any] = {"content": call.content} if call.content else {"json": call.json} if call.json else {}
        url = call.path or template.format(**(ids or self.ids))
        return await self.gateway.http.request(method, url, headers=headers, **body)


@pytest.fixture
async def world(redis_url: str, tmp_path: Path) -> AsyncIterator[World]:
    async with open_gateway(redis_url, tmp_path) as gateway:
        yield await World(gateway).fill()


def routes(gateway: Gateway) -> list[str]:
    """`METHOD /path` of all routes that need a key, as the application has them."""
    app: Any = gateway.http._transport.app  # type: ignore[attr-defined]
    found = []
    for route in app.routes:
        assert isinstance(route, Route), f"{route} is of a kind that this test does not know"
        methods = set(route.methods or ()) - ({"HEAD"} if "GET" in (route.methods or ()) else set())
        found += [f"{method} {route.path}" for method in sorted(methods) if route.path not in OPEN_PATHS]
    return found


async def test_every_route_says_what_it_expects(world: World) -> None:
    found = routes(world.gateway)
    assert sorted(set(found)) == sorted(found)
    missing, gone = sorted(set(found) - set(ROUTES)), sorted(set(ROUTES) - set(found))
    assert missing == [], "add to ROUTES in this file how they are called rightly, and what they then answer"
    assert gone == [], "there are no such routes (any more)"


def scope_of(route: str) -> str:
    return ROUTES[route].scope or ("read" if route.split()[0] in SAFE_METHODS else "write")


def is_problem(route: str, answer: httpx.Response, status: int) -> dict[str, Any]:
    """The problem of an answer; HEAD has no body."""
    if not route.startswith("HEAD"):
        return problem(answer, status)
    assert answer.status_code == status
    return {"code": ""}


def without(ids: dict[str, str], found: dict[str, Any]) -> str:
    """A problem without what its caller sent."""
    text = repr([found.get(name) for name in ("status", "code", "detail", "param", "errors")])
    for value in ids.values():
        text = text.replace(value, "ID")
    return text


MISSING = {
    "job_id": "job_00000000000000000009",
    "file_id": "file_00000000000000000009",
    "checkpoint_id": "ckpt_1-00000009-00000009",
}


async def test_each_route_answers_each_caller_as_it_should(world: World, subtests: pytest.Subtests) -> None:
    for route in ROUTES:
        with subtests.test(route):
            await refuses_strangers(world, route)
            await refuses_small_scopes(world, route)
            if scope_of(route) != "admin":
                await hides_from_others(world, route)
            for caller in ("admin",) if scope_of(route) == "admin" else ("alice", "admin"):
                await answers(world, route, caller)
            if scope_of(route) == "read":
                await answers(world, route, "reader")


async def refuses_strangers(world: World, route: str) -> None:
    for caller in ("", "unknown"):
        assert is_problem(route, await world.send(caller, route), 401)["code"] in ("unauthorized", "")


async def refuses_small_scopes(world: World, route: str) -> None:
    for caller, granted in (("reader", ["read"]), ("alice", ["read", "write"])):
        if scope_of(route) in granted:
            continue
        refused = problem(await world.send(caller, route), 403)
        assert refused["code"] == "forbidden"
        assert f"scope '{scope_of(route)}', and '{caller}' has {', '.join(granted)}" in refused["detail"]


async def hides_from_others(world: World, route: str) -> None:
    """Bob sees of Alice's what he sees of nobody's, and may do what is nobody's."""
    if "{" in route and not ROUTES[route].path:
        others = is_problem(route, await world.send("bob", route), 404)
        nobodys = is_problem(route, await world.send("bob", route, ids=MISSING), 404)
        assert without(world.ids, others) == without(MISSING, nobodys)
        return
    answer = await world.send("bob", route)
    assert answer.status_code in ROUTES[route].status, answer.text
    assert [name for name in world.ids.values() if name in answer.text] == []


async def answers(world: World, route: str, caller: str) -> None:
    """What the route promises; then everything is as before."""
    answer = await world.send(caller, route)
    assert answer.status_code in ROUTES[route].status, (caller, answer.text)
    if route.split()[0] not in SAFE_METHODS:
        await world.fill()


def test_ids_in_paths_are_known() -> None:
    """What stands in braces is an object of Alice, unless the path is given."""
    for route, call in ROUTES.items():
        if not call.path:
            assert set(re.findall(r"{(\w+)}", route)) <= set(MISSING), route
