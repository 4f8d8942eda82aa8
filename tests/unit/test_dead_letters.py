"""Samples that were given up are listed for good: from the journals of the lineage, and from the queue meanwhile."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from stillhouse.cli import history as cli
from stillhouse.client.aio import AsyncClient
from stillhouse.client.client import Client
from stillhouse.core.queue import keys
from stillhouse.core.queue.streams import Scope
from stillhouse.trainer import manifests
from stillhouse.trainer.journal import StepJournal
from stillhouse.v1 import rollout_pb2
from tests.gateway_kit import Gateway, open_gateway, problem

PER_STEP = 2


@pytest.fixture
async def gateway(redis_url: str, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with open_gateway(redis_url, tmp_path) as opened:
        yield opened


def score(group: int, index: int = 0, reason: str = "", purpose: Any = rollout_pb2.PURPOSE_TRAIN) -> rollout_pb2.Score:
    rollout = rollout_pb2.Rollout(
        sample_id=f"{group}/{index}", group=group, index=index, row=group + 100, teacher="main", purpose=purpose
    )
    if not reason:
        return rollout_pb2.Score(rollout=rollout, sampled=rollout_pb2.SampledScore())
    failed = rollout_pb2.Failure(reason=reason, message=f"it was {reason}", service="teacher", attempts=3)
    return rollout_pb2.Score(rollout=rollout, failed=failed)


async def make_job(gateway: Gateway) -> Scope:
    job_id = (await gateway.submit()).json()["id"]
    return Scope(job_id, await gateway.ctx.jobs.claim(job_id, "trainer-a", 60.0, 0))


async def write(gateway: Gateway, scope: Scope, step: int, *scores: rollout_pb2.Score) -> None:
    artifacts = gateway.ctx.artifacts.job(scope.job_id)
    await StepJournal(artifacts, scope).write(step, scores, groups=[], next_group=0, micro_batches=[])


async def letters(gateway: Gateway, job_id: str, **query: Any) -> list[dict[str, Any]]:
    answer = await gateway.http.get(f"/v1/jobs/{job_id}/dead_letters", params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()["data"]


async def test_a_job_without_failures_has_none(gateway: Gateway) -> None:
    scope = await make_job(gateway)
    assert await letters(gateway, scope.job_id) == []
    manifests.open_epoch(gateway.ctx.artifacts.job(scope.job_id), 1, "a")
    await write(gateway, scope, 0, score(0), score(1))
    assert await letters(gateway, scope.job_id) == []


async def test_letters_outlive_the_queue_and_say_why(gateway: Gateway) -> None:
    scope = await make_job(gateway)
    artifacts = gateway.ctx.artifacts.job(scope.job_id)
    manifests.open_epoch(artifacts, 1, "a")
    await write(gateway, scope, 0, score(0), score(1, 1, "non_finite"))
    await gateway.ctx.redis.xadd(keys.dead(scope.job_id, 1), {"p": score(1, 1, "non_finite").SerializeToString()})
    await gateway.ctx.redis.xadd(keys.dead(scope.job_id, 1), {"p": score(5, 0, "exhausted").SerializeToString()})
    first, second = await letters(gateway, scope.job_id)
    assert first == {
        "id": "1/1",
        "object": "dead_letter",
        "step": 1,
        "epoch": 1,
        "row": 101,
        "teacher": "main",
        "reason": "non_finite",
        "message": "it was non_finite",
        "service": "teacher",
        "attempts": 3,
        "is_journalled": True,
    }
    assert (second["id"], second["step"], second["is_journalled"]) == ("5/0", 5 // PER_STEP + 1, False)
    await gateway.ctx.queue.close_epoch(scope)
    assert await letters(gateway, scope.job_id) == [first]


async def test_only_the_lineage_counts(gateway: Gateway) -> None:
    """What a zombie of an older epoch journalled after the takeover happened to nobody."""
    scope = await make_job(gateway)
    artifacts = gateway.ctx.artifacts.job(scope.job_id)
    manifests.open_epoch(artifacts, 1, "a")
    await write(gateway, scope, 0, score(0, 0, "mine"))
    manifests.open_epoch(artifacts, 2, "b")
    await write(gateway, scope, 1, score(2, 0, "zombie"))
    await write(gateway, Scope(scope.job_id, 2), 1, score(2, 1, "right"))
    assert [letter["reason"] for letter in await letters(gateway, scope.job_id)] == ["mine", "right"]


async def test_a_damaged_journal_hides_only_itself(gateway: Gateway) -> None:
    scope = await make_job(gateway)
    artifacts = gateway.ctx.artifacts.job(scope.job_id)
    manifests.open_epoch(artifacts, 1, "a")
    await write(gateway, scope, 0, score(0, 0, "x"))
    await write(gateway, scope, 1, score(2, 0, "y"))
    path = artifacts.journal(1, 0)
    path.write_bytes(path.read_bytes()[:-3])
    assert [letter["id"] for letter in await letters(gateway, scope.job_id)] == ["2/0"]


async def test_pages_in_order_and_the_clients(gateway: Gateway, capsys: pytest.CaptureFixture[str]) -> None:
    scope = await make_job(gateway)
    manifests.open_epoch(gateway.ctx.artifacts.job(scope.job_id), 1, "a")
    names = [(group, index) for group in (0, 1, 2, 9, 10, 11) for index in range(3)]
    for step in range(6):
        await write(gateway, scope, step, *(score(g, i, "bad") for g, i in reversed(names) if g // PER_STEP == step))
    expected = [f"{group}/{index}" for group, index in names]
    seen: list[str] = []
    while True:
        page = (
            await gateway.http.get(
                f"/v1/jobs/{scope.job_id}/dead_letters", params={"limit": 5, "after": seen[-1] if seen else ""}
            )
        ).json()
        seen += [letter["id"] for letter in page["data"]]
        if not page["has_more"]:
            break
    assert seen == expected
    answer = await gateway.http.get(f"/v1/jobs/{scope.job_id}/dead_letters", params={"after": "7/7"})
    assert problem(answer, 404)["param"] == "after"
    answer = await gateway.http.get("/v1/jobs/job_00000000000000000000/dead_letters")
    assert answer.status_code == 404


def answers(request: httpx.Request) -> httpx.Response:
    """Two pages."""
    known = [
        {"id": f"{n}/0", "step": None if n == 3 else n, "row": n, "teacher": "main", "reason": "bad"} for n in range(4)
    ]
    for letter in known:
        letter |= {"service": "teacher", "attempts": 1, "message": "why"}
    after = request.url.params.get("after", "")
    start = 0 if not after else int(after.partition("/")[0]) + 1
    return httpx.Response(200, json={"data": known[start : start + 2], "has_more": start + 2 < len(known)})


async def test_clients_and_command_show_all_pages(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    transport = httpx.MockTransport(answers)
    sync = Client("http://gateway", "key", transport=transport)
    twin = AsyncClient("http://gateway", "key", transport=transport)
    assert [letter["id"] for letter in sync.jobs.dead_letters("job_x")] == ["0/0", "1/0", "2/0", "3/0"]
    assert await twin.jobs.dead_letters("job_x") == sync.jobs.dead_letters("job_x")
    monkeypatch.setattr(cli, "Client", lambda: Client("http://gateway", "key", transport=transport))
    monkeypatch.setattr(shutil, "get_terminal_size", lambda *_: (160, 40))
    cli.show_dead_letters("job_x", as_json=False)
    shown = capsys.readouterr().out
    assert "3/0" in shown
    assert "teacher (1x)" in shown
    cli.show_dead_letters("job_x", as_json=True)
    assert len(json.loads(capsys.readouterr().out)) == 4
