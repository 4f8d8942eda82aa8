"""POST /v1/score: what is refused, and how texts become tokens. No teacher runs here."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from stillhouse.cli.score import batches
from stillhouse.core.errors import OverloadedError
from stillhouse.core.queue.registry import ServiceInfo
from stillhouse.core.spec_score import MAX_ALTERNATIVES, MAX_ITEMS, MAX_TOKENS
from stillhouse.gateway.scoring import Slots, in_turn
from tests.gateway_kit import Gateway, open_gateway, problem


@pytest.fixture
async def gateway(redis_url: str, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with open_gateway(redis_url, tmp_path) as opened:
        yield opened


async def refused(gateway: Gateway, status: int, **body: Any) -> dict[str, Any]:
    return problem(await gateway.http.post("/v1/score", json={"model": "big", **body}), status)


async def test_without_a_teacher_there_is_a_reason_and_a_time_to_come_back(gateway: Gateway) -> None:
    answer = await gateway.http.post("/v1/score", json={"model": "big", "items": [{"text": "a text"}]})
    assert "no teacher service answers" in problem(answer, 503)["detail"]
    assert int(answer.headers["retry-after"]) > 0


async def test_a_key_is_needed_and_the_model_must_be_registered(gateway: Gateway) -> None:
    items = [{"text": "a text"}]
    problem(await gateway.http.post("/v1/score", json={}, headers={"Authorization": "Bearer no"}), 401)
    assert "huge" in (await refused(gateway, 404, model="huge", items=items))["detail"]


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({}, "items", "required"),
        ({"items": []}, "items", "at least 1"),
        ({"items": [{"text": "ab"}] * (MAX_ITEMS + 1)}, "items", f"at most {MAX_ITEMS}"),
        ({"items": [{}]}, "items.0", "either 'text' or 'token_ids'"),
        ({"items": [{"text": "ab", "token_ids": [1]}]}, "items.0", "either 'text' or 'token_ids'"),
        ({"items": [{"text": "ab", "prompt_ids": [1]}]}, "items.0", "go with 'token_ids'"),
        ({"items": [{"token_ids": [1, 2], "prompt": "a"}]}, "items.0", "goes with 'text'"),
        ({"items": [{"token_ids": [1, -2]}]}, "items.0.token_ids.1", "out of range"),
        (
            {"items": [{"text": "ab"}, {"token_ids": [1, 255, 256]}]},
            "items.1",
            "'big' has no token id 256, its last is 255",
        ),
        ({"items": [{"prompt_ids": [999], "token_ids": [1]}]}, "items.0", "no token id 999"),
        ({"items": [{"text": "ab"}], "kind": "hidden"}, "kind", "unknown key"),
        ({"items": [{"txt": "ab"}]}, "items.0.txt", "did you mean 'text'?"),
        ({"items": [{"text": "ab"}], "top_k": 51}, "top_k", "out of range"),
        ({"items": [{"text": "ab"}], "temperature": 0}, "temperature", "out of range"),
        ({"items": [{"text": "a"}]}, "items.0", "nothing comes before it"),
        ({"items": [{"text": "fits"}, {"text": "x" * 257}]}, "items.1", "257 tokens are more than"),
        ({"items": [{"text": "x" * 200, "prompt": "y" * 57}]}, "items.0", "257 tokens are more than"),
        ({"items": [{"text": "x" * 256}] * 33}, "items", f"8448 tokens in one request, at most {MAX_TOKENS}"),
        ({"items": [{"text": "x" * 256}] * 2, "top_k": 40}, "top_k", f"20400 alternatives, at most {MAX_ALTERNATIVES}"),
    ],
)
async def test_what_cannot_be_scored_is_refused_with_path_and_reason(
    gateway: Gateway, body: dict[str, Any], param: str, says: str
) -> None:
    found = await refused(gateway, 422, **body)
    assert any(item["param"] == param and says in f"{item['message']}; {item['fix']}" for item in found["errors"]), (
        found
    )


async def test_the_document_tells_how_to_ask(gateway: Gateway) -> None:
    document = (await gateway.http.get("/openapi.json")).json()
    operation = document["paths"]["/v1/score"]["post"]
    assert operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/ScoreRequest")
    assert "alternatives" in operation["description"]
    assert {"items", "top_k"} <= document["components"]["schemas"]["ScoreRequest"]["properties"].keys()


def test_only_so_many_requests_wait_for_teachers() -> None:
    slots = Slots(2)
    with slots, slots, pytest.raises(OverloadedError, match="2 score requests"), slots:
        pass
    with slots:
        pass  # both are free again, also after a refusal


def test_a_model_goes_to_one_teacher_and_models_are_spread() -> None:
    teachers = [ServiceInfo("teacher", f"teacher-{n}", "h:1", 1, 0.0, 0.0) for n in range(3)]
    first = [in_turn(teachers, f"model-{n}")[0].instance for n in range(30)]
    assert first == [in_turn(teachers[::-1], f"model-{n}")[0].instance for n in range(30)]
    assert set(first) == {"teacher-0", "teacher-1", "teacher-2"}


def test_the_command_sends_what_a_request_takes() -> None:
    items = [{"text": "x" * 1000, "n": n} for n in range(100)]
    sent = list(batches(items, top_k=0))
    assert [item for batch in sent for item in batch] == items
    assert all(len(batch) <= MAX_ITEMS and sum(len(item["text"]) for item in batch) <= MAX_TOKENS for batch in sent)
    assert [len(batch) for batch in batches(items[:3], top_k=50)] == [1, 1, 1]
    assert [len(batch) for batch in batches([{"text": "x"}] * 130, top_k=0)] == [64, 64, 2]
