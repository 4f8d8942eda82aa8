"""Who gets in: every route, with and without a key."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from stillhouse.core.errors import ConfigError, ConflictError, SpecError
from stillhouse.core.keys import create_key, load_keys, remove_key
from stillhouse.gateway.auth import OPEN_PATHS, KeyStore
from tests.gateway_kit import Gateway, open_gateway, problem


@pytest.fixture
async def gateway(redis_url: str, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with open_gateway(redis_url, tmp_path) as opened:
        yield opened


async def test_every_route_needs_the_right_key(gateway: Gateway) -> None:
    document = (await gateway.http.get("/openapi.json")).json()
    routes = [(method.upper(), path) for path, item in document["paths"].items() for method in item]
    assert len(routes) >= 17, routes
    routes += [
        ("GET", "/v1/unknown"),
        ("GET", "/"),
        ("DELETE", "/v1/jobs"),
        ("GET", "/v1/jobs/"),
        ("GET", "/metrics/x"),
    ]
    for method, template in routes:
        path = re.sub(r"\{\w+\}", "job_0123456789", template)
        for value in (None, "Bearer stillhouse_wrong", "Bearer ", f"Basic {gateway.key}", gateway.key, "Bearer \xff"):
            headers = [(b"Authorization", (value or "").encode("latin-1"))]  # replaces the fixture's key
            answer = await gateway.http.request(method, path, headers=headers)
            if template in OPEN_PATHS:
                assert answer.status_code == 200, (method, path)
            else:
                assert answer.status_code == 401, (method, path, value)
                assert method == "HEAD" or problem(answer, 401)["code"] == "unauthorized"
                assert answer.headers["www-authenticate"].startswith("Bearer")


async def test_open_routes_are_exactly_these(gateway: Gateway) -> None:
    assert {"/healthz", "/readyz", "/metrics", "/openapi.json", "/docs"} == OPEN_PATHS
    for path in OPEN_PATHS:
        assert (await gateway.http.get(path, headers={"Authorization": ""})).status_code == 200


async def test_a_wrong_key_reads_no_body(gateway: Gateway) -> None:
    async def never() -> AsyncIterator[bytes]:
        raise AssertionError("the body was read")
        yield b""

    headers = {"Authorization": "Bearer nope", "Content-Type": "application/json"}
    problem(await gateway.http.post("/v1/jobs", content=never(), headers=headers), 401)


async def test_keys_come_and_go_without_a_restart(gateway: Gateway) -> None:
    path = gateway.ctx.settings.keys_path()
    fresh = create_key(path, "fresh")
    headers = {"Authorization": f"Bearer {fresh}"}
    assert (await gateway.http.get("/v1/models", headers=headers)).status_code == 200
    assert remove_key(path, "fresh")
    assert not remove_key(path, "fresh")
    problem(await gateway.http.get("/v1/models", headers=headers), 401)
    path.unlink()
    problem(await gateway.http.get("/v1/models"), 401)


async def test_a_damaged_keys_file_lets_nobody_in(gateway: Gateway) -> None:
    gateway.ctx.settings.keys_path().write_text("[{")
    problem(await gateway.http.get("/v1/models"), 500)


async def test_auth_none_lets_everybody_in(redis_url: str, tmp_path: Path) -> None:
    async with open_gateway(redis_url, tmp_path, auth="none") as gateway:
        assert (await gateway.http.get("/v1/models", headers={"Authorization": ""})).status_code == 200


def test_the_file_holds_no_key_and_is_private(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    key = create_key(path, "a")
    assert key.startswith("stillhouse_")
    assert key not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    assert set(json.loads(path.read_text())[0]) == {"name", "sha256", "created_at", "owner", "scopes", "limits"}
    found = KeyStore(path).find(key)
    assert found is not None
    assert (found.name, found.owner, found.scopes) == ("a", "a", ("read", "write"))
    assert KeyStore(path).find(key + "x") is None
    with pytest.raises(ConflictError, match="already"):
        create_key(path, "a")
    with pytest.raises(SpecError, match="letters"):
        create_key(path, "a b")
    path.write_text('[{"name": 1}]')
    with pytest.raises(ConfigError, match="cannot be read"):
        load_keys(path)
