"""Keys over REST, what each scope may do, and that owners do not see each other's objects."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from stillhouse.core.keys import create_key, load_keys
from tests.gateway_kit import Gateway, make_spec, open_gateway, problem


@pytest.fixture
async def gateway(redis_url: str, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with open_gateway(redis_url, tmp_path) as opened:
        yield opened


def headers(gateway: Gateway, name: str, **options: Any) -> dict[str, str]:
    """Of a new key."""
    return {"Authorization": f"Bearer {create_key(gateway.ctx.settings.keys_path(), name, **options)}"}


async def test_keys_are_made_shown_once_and_revoked(gateway: Gateway) -> None:
    admin = headers(gateway, "boss", scopes=["admin"])
    body = {"name": "alice-laptop", "owner": "alice", "scopes": ["write"], "limits": {"active_jobs": 2}}
    answer = await gateway.http.post("/v1/keys", json=body, headers=admin)
    assert answer.status_code == 201
    assert answer.headers["cache-control"] == "no-store"
    made = answer.json()
    assert made["scopes"] == ["read", "write"]
    assert made["limits"]["active_jobs"] == 2
    assert made["key"] not in gateway.ctx.settings.keys_path().read_text()
    me = (await gateway.http.get("/v1/keys/me", headers={"Authorization": f"Bearer {made['key']}"})).json()
    assert (me["name"], me["owner"], me["scopes"]) == ("alice-laptop", "alice", ["read", "write"])
    listed = (await gateway.http.get("/v1/keys", headers=admin)).text
    assert made["key"] not in listed
    assert [key["name"] for key in json.loads(listed)["data"]] == ["alice-laptop", "boss", "tester"]
    problem(await gateway.http.post("/v1/keys", json=body, headers=admin), 409)
    assert (await gateway.http.delete("/v1/keys/alice-laptop", headers=admin)).status_code == 204
    problem(await gateway.http.get("/v1/keys/me", headers={"Authorization": f"Bearer {made['key']}"}), 401)
    problem(await gateway.http.delete("/v1/keys/alice-laptop", headers=admin), 404)
    assert "last key" in problem(await gateway.http.delete("/v1/keys/boss", headers=admin), 409)["detail"]


async def test_wrong_keys_are_refused(gateway: Gateway) -> None:
    admin = headers(gateway, "boss", scopes=["admin"])
    for change in ({"name": "a b"}, {"owner": "x/y"}, {"scopes": []}, {"scopes": ["root"]}, {"limits": {"jobs": 1}}):
        body = {"name": "carol", **change}
        assert problem(await gateway.http.post("/v1/keys", json=body, headers=admin), 422)["param"], change
    assert len(load_keys(gateway.ctx.settings.keys_path())) == 2


async def test_scopes_hold(gateway: Gateway) -> None:
    read, write = headers(gateway, "r", scopes=["read"]), headers(gateway, "w")
    assert (await gateway.http.get("/v1/jobs", headers=read)).status_code == 200
    refused = problem(await gateway.http.post("/v1/jobs", json=make_spec(), headers=read), 403)
    assert refused["code"] == "forbidden"
    assert "'write'" in refused["detail"]
    assert (await gateway.http.post("/v1/jobs", json=make_spec(), headers=write)).status_code == 201
    for method in ("GET", "POST"):
        problem(await gateway.http.request(method, "/v1/keys", json={"name": "x"}, headers=write), 403)


async def test_keys_of_old_files_may_do_everything(gateway: Gateway) -> None:
    path = gateway.ctx.settings.keys_path()
    entries = json.loads(path.read_text())
    path.write_text(json.dumps([{name: entry[name] for name in ("name", "sha256", "created_at")} for entry in entries]))
    me = (await gateway.http.get("/v1/keys/me")).json()
    assert (me["owner"], me["scopes"]) == ("tester", ["read", "write", "admin"])


async def test_owners_do_not_see_each_other(gateway: Gateway) -> None:
    alice, bob = headers(gateway, "a1", owner="alice"), headers(gateway, "b1", owner="bob")
    second, admin = headers(gateway, "a2", owner="alice"), headers(gateway, "boss", scopes=["admin"])
    job = (await gateway.http.post("/v1/jobs", json=make_spec(), headers=alice)).json()["id"]
    rows = b'{"prompt": "only mine"}\n'
    jsonl = {"Content-Type": "application/jsonl"}
    file = (await gateway.http.post("/v1/files", content=rows, headers={**alice, **jsonl})).json()["id"]
    for caller, sees in ((alice, True), (second, True), (bob, False), (admin, True)):
        status = 200 if sees else 404
        for url in (f"/v1/jobs/{job}", f"/v1/jobs/{job}/events", f"/v1/files/{file}", f"/v1/jobs?after={job}"):
            assert (await gateway.http.get(url, headers=caller)).status_code == status, url
        listed = (await gateway.http.get("/v1/jobs", headers=caller)).json()["data"]
        assert [each["id"] for each in listed] == [job] * sees
    [stage] = make_spec()["stages"]
    spec = make_spec(stages=[{**stage, "data": {"file": file}}])
    assert "no file" in problem(await gateway.http.post("/v1/jobs", json=spec, headers=bob), 422)["detail"]
    assert (await gateway.http.post("/v1/jobs", json=spec, headers=second)).status_code == 201
    spec = make_spec(init_from=job)
    assert "there is no job" in problem(await gateway.http.post("/v1/jobs", json=spec, headers=bob), 422)["detail"]
    assert "no checkpoint yet" in problem(await gateway.http.post("/v1/jobs", json=spec, headers=alice), 422)["detail"]


async def test_authentication_that_is_off_makes_no_keys(redis_url: str, tmp_path: Path) -> None:
    async with open_gateway(redis_url, tmp_path, auth="none") as gateway:
        assert (await gateway.http.get("/v1/keys/me")).json()["scopes"] == ["read", "write", "admin"]
        problem(await gateway.http.post("/v1/keys", json={"name": "x"}), 409)


async def test_who_may_not_manage_keys_is_told_at_once_what_it_takes(gateway: Gateway) -> None:
    read = headers(gateway, "r", scopes=["read"])
    for method, path in (("POST", "/v1/keys"), ("DELETE", "/v1/keys/r"), ("GET", "/v1/keys")):
        refused = problem(await gateway.http.request(method, path, headers=read), 403)
        assert "the scope 'admin'" in refused["detail"], method
    assert "the scope 'write'" in problem(await gateway.http.post("/v1/jobs", json={}, headers=read), 403)["detail"]


async def test_a_page_behind_another_owners_job_does_not_tell_that_there_is_one(gateway: Gateway) -> None:
    alice, bob = headers(gateway, "alice"), headers(gateway, "bob")
    job = (await gateway.http.post("/v1/jobs", json=make_spec(), headers=alice)).json()["id"]
    for path in ("/v1/fine_tuning/jobs", "/v1/jobs"):
        assert (await gateway.http.get(path, params={"after": job}, headers=alice)).status_code == 200
        theirs = problem(await gateway.http.get(path, params={"after": job}, headers=bob), 404)
        none = problem(await gateway.http.get(path, params={"after": "job_00000000000000000000"}, headers=bob), 404)
        assert theirs["detail"].replace(job, "job_00000000000000000000") == none["detail"]
