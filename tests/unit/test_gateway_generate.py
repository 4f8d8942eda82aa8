"""POST /v1/generate: what is refused, whom it asks, which model is meant. No sampler runs here."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from stillhouse.core.blobs import sealed, write_json
from stillhouse.core.errors import OverloadedError
from stillhouse.core.queue.registry import ServiceInfo
from stillhouse.gateway import generating
from stillhouse.gateway.scoring import Slots
from tests.gateway_kit import Gateway, make_model, open_gateway, problem


@pytest.fixture
async def gateway(redis_url: str, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with open_gateway(redis_url, tmp_path, teacher_memory_gib=1.0) as opened:
        yield opened


async def refused(gateway: Gateway, status: int, **body: Any) -> dict[str, Any]:
    answer = await gateway.http.post("/v1/generate", json={"model": "big", **body})
    return problem(answer, status)


ASK = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}


async def test_without_a_sampler_there_is_a_reason_and_a_time_to_come_back(gateway: Gateway) -> None:
    answer = await gateway.http.post("/v1/generate", json={"model": "big", **ASK})
    assert "no sampler service answers" in problem(answer, 503)["detail"]
    assert int(answer.headers["retry-after"]) > 0


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({}, None, "either 'prompt' or 'messages'"),
        ({"prompt": "a", **ASK}, None, "either 'prompt' or 'messages'"),
        ({"prompt": ""}, "prompt", "at least 1"),
        ({**ASK, "max_tokens": 0}, "max_tokens", "out of range"),
        ({**ASK, "max_tokens": 1024, "n": 3}, None, "3072 tokens, at most 2048"),
        ({**ASK, "n": 9}, "n", "out of range"),
        ({**ASK, "temperature": 0.01}, None, "0 for greedy"),
        ({**ASK, "seed": -1}, "seed", "out of range"),
        ({**ASK, "temprature": 1}, "temprature", "did you mean 'temperature'?"),
        ({**ASK, "model": "stage/one"}, "model", "names no model"),
        ({"prompt": "a", "chat_template_kwargs": {"x": 1}}, None, "go with 'messages'"),
        ({"prompt": "x" * 250, "max_tokens": 8}, "prompt", "lower max_tokens to 6"),
        ({"prompt": "x" * 300, "max_tokens": 8}, "prompt", "shorten it"),
    ],
)
async def test_what_cannot_be_written_is_refused_with_path_and_reason(
    gateway: Gateway, body: dict[str, Any], param: str | None, says: str
) -> None:
    found = await refused(gateway, 422, **body)
    texts = [f"{item['message']}; {item['fix']}" for item in found["errors"] if item["param"] == (param or "")]
    assert any(says in text for text in texts), found


async def test_unknown_models_jobs_and_checkpoints_are_404(gateway: Gateway) -> None:
    assert "unknown model 'huge'" in (await refused(gateway, 404, model="huge", **ASK))["detail"]
    assert "no job" in (await refused(gateway, 404, model="job_0123456789", **ASK))["detail"]
    job_id = (await gateway.submit()).json()["id"]
    assert "no checkpoint yet" in (await refused(gateway, 404, model=job_id, **ASK))["detail"]
    gone = f"{job_id}/ckpt_1-00000002-0a0b0c0d"
    assert "it has none" in (await refused(gateway, 404, model=gone, **ASK))["detail"]


async def test_a_committed_checkpoint_is_no_model_yet_and_says_how_it_becomes_one(gateway: Gateway) -> None:
    job_id = (await gateway.submit()).json()["id"]
    folder = gateway.ctx.artifacts.job(job_id).manifests(1) / "00000002-0a0b0c0d"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    found = await refused(gateway, 409, model=job_id, **ASK)
    assert f"stillhouse models add NAME {job_id}/ckpt_1-00000002-0a0b0c0d" in found["detail"]


async def test_a_finished_student_becomes_a_model_when_it_is_asked(gateway: Gateway) -> None:
    job_id = (await gateway.submit()).json()["id"]
    job = gateway.ctx.artifacts.job(job_id)
    make_model(job.export(1), size=16)
    write_json(job.final, sealed({"status": "succeeded", "epoch": 1}))
    assert gateway.ctx.models.made(f"{job_id}/ckpt_export") is None
    await refused(gateway, 503, model=job_id, **ASK)  # only a sampler is missing
    entry = generating.find(gateway.ctx.models, job_id)
    assert entry.name == f"{job_id}/ckpt_export"
    assert entry.hidden_size == 16


async def test_a_model_beyond_the_budget_is_refused(gateway: Gateway) -> None:
    entry = gateway.ctx.models.get("big").model_copy(update={"num_parameters": 2**29, "name": "wide"})
    gateway.ctx.models.add(entry)
    found = await refused(gateway, 429, model="wide", **ASK)
    assert "needs 2 GiB in float32" in found["detail"]
    await refused(gateway, 503, model="wide", dtype="bfloat16", **ASK)  # 1 GiB fits


def test_samplers_without_a_job_are_asked_first() -> None:
    def info(name: str, job_id: str = "") -> ServiceInfo:
        return ServiceInfo("sampler", name, "h:1", 1, 0.0, 0.0, job_id=job_id)

    services = [info("a", "job_1"), info("b"), info("c", "job_1"), info("d")]
    names = [one.instance for one in generating.idle_first(services, "m")]
    assert sorted(names[:2]) == ["b", "d"]
    assert sorted(names[2:]) == ["a", "c"]
    assert names == [one.instance for one in generating.idle_first(services[::-1], "m")], "always the same"


def test_few_run_at_once() -> None:
    slots = Slots(generating.MAX_RUNNING, "generate")
    with slots, slots, pytest.raises(OverloadedError, match="2 generate requests are running"), slots:
        pass
    with slots:  # they came back
        pass
