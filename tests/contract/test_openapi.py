"""Requests made from the whole OpenAPI document, with keys of several scopes, against the real gateway: no 5xx, answers
and statuses as they are documented, and 403 where the key's scope is not enough."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
import structlog
import uvicorn
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis.core.failures import Failure, FailureGroup
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance

from stillhouse.core.config import Settings
from stillhouse.core.keys import create_key
from stillhouse.core.service import open_context
from stillhouse.gateway.app import create_app
from tests.conftest import free_port
from tests.gateway_kit import add_model

CHECKS = [content_type_conformance, response_schema_conformance]
SAFE = ("GET", "HEAD", "OPTIONS")
SCOPES = {"admin": ["admin"], "writer": ["read", "write"], "reader": ["read"]}
"""Of the keys, each of an owner of its own."""
SLOW = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large, HealthCheck.large_base_example]


@pytest.fixture
def served(redis_url: str, tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """(URL, keys by the name of their scopes) of a gateway with two models."""
    add_model(tmp_path, "small")
    add_model(tmp_path, "big", size=8)
    made = Settings(home=tmp_path, redis_url=redis_url).resolved()
    made.artifacts_dir().mkdir()
    keys = {name: create_key(made.keys_path(), name, owner=name, scopes=scopes) for name, scopes in SCOPES.items()}
    app = create_app(open_context(made, "gateway", structlog.get_logger()), made)
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.02)
    yield f"http://127.0.0.1:{port}", keys
    server.should_exit = True
    thread.join(10)


def attack(url: str, keys: dict[str, str], examples: int) -> dict[str, str]:
    """{route: first wrong answer}."""
    wrong: dict[str, str] = {}
    result: Any
    for result in schemathesis.openapi.from_url(f"{url}/openapi.json").get_all_operations():
        operation = result.ok()
        if found := faults(operation, keys, examples):
            wrong[f"{operation.method.upper()} {operation.path}"] = found[0]
    return wrong


def faults(operation: Any, keys: dict[str, str], examples: int) -> list[str]:
    """What is wrong with the answers of a route."""
    found: list[str] = []

    @seed(1)
    @settings(max_examples=examples, phases=[Phase.generate], suppress_health_check=SLOW)
    @given(case=operation.as_strategy(), who=st.sampled_from(["admin", *SCOPES]))
    def check(case: Any, who: str) -> None:
        answer = case.call(headers={"Authorization": f"Bearer {keys[who]}"}, timeout=5)
        status, is_safe = answer.status_code, operation.method.upper() in SAFE
        if status < 400 and str(status) not in operation.definition.raw["responses"]:
            found.append(f"{who}: the status {status} is not documented")
        if who == "reader" and not is_safe and status != 403:
            found.append(f"a key without the scope 'write' got {status}")
        if answer.status_code >= 500 and answer.status_code != 503:  # 503: no service runs here
            found.append(f"{answer.status_code} {answer.text[:500]}")
        try:
            case.validate_response(answer, checks=CHECKS)
        except (Failure, FailureGroup) as failure:
            found.append(str(failure))

    check()
    return found


def test_answers_are_as_documented(served: tuple[str, dict[str, str]]) -> None:
    assert attack(*served, examples=3) == {}
