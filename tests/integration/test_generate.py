"""POST /v1/generate with a real sampler: texts against transformers' own, and what becomes of a caller who leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stillhouse.gateway import generating
from stillhouse.gateway.app import create_app
from tests.cluster import Cluster, cluster
from tests.gateway_kit import problem
from tests.waiting import wait_until

TALK = [{"role": "user", "content": "café?"}]


@pytest.fixture
async def deployment(tmp_path: Path, redis_url: str) -> AsyncIterator[Cluster]:
    async with cluster(tmp_path, redis_url, "sampler", auth="none") as made:
        made.settings.artifacts_dir().mkdir(exist_ok=True)
        made.add_model("writer", seed=2)
        yield made


@pytest.fixture
async def http(deployment: Cluster) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=create_app(deployment.ctx, deployment.settings), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as made:
        yield made


async def ask(http: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    answer = await http.post("/v1/generate", json={"model": "writer", "max_tokens": 12, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_greedy_texts_are_those_of_transformers(deployment: Cluster, http: httpx.AsyncClient) -> None:
    folder = deployment.settings.home / "models" / "writer"
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    found = await ask(http, messages=TALK, temperature=0)
    inputs = tokenizer.apply_chat_template(TALK, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert found["usage"]["prompt_tokens"] == inputs["input_ids"].shape[1]
    assert found["prompt"] == tokenizer.apply_chat_template(TALK, add_generation_prompt=True, tokenize=False)
    assert found["model_sha256"] == deployment.models.get("writer").sha256
    written = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    (text,) = found["data"]
    assert text["token_ids"] == written
    assert text["text"] == tokenizer.decode(written, skip_special_tokens=True)
    assert text["finish_reason"] == ("stop" if written[-1] == tokenizer.eos_token_id else "length")
    with torch.no_grad():
        logits = model(torch.tensor([inputs["input_ids"][0].tolist() + written])).logits[0, -len(written) - 1 : -1]
    expected = logits.log_softmax(-1)[range(len(written)), written].sum()
    assert text["logprob"] == pytest.approx(float(expected), abs=1e-3)


async def test_a_seed_gives_the_same_texts_again_and_each_its_own(http: httpx.AsyncClient) -> None:
    first = await ask(http, prompt="a raw text", n=3)
    assert len({tuple(one["token_ids"]) for one in first["data"]}) == 3
    assert [one["index"] for one in first["data"]] == [0, 1, 2]
    again = await ask(http, prompt="a raw text", n=3, seed=first["seed"])
    assert again["data"] == first["data"]
    assert first["usage"]["prompt_tokens"] == len("a raw text"), "read as it is"
    second = await ask(http, prompt="a raw text", seed=first["seed"] + 1)
    assert second["data"][0]["token_ids"] == first["data"][1]["token_ids"]


async def test_who_runs_out_of_patience_finds_the_model_loaded_the_next_time(
    deployment: Cluster, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stillhouse.sampler.student import Student

    may_load, loads = asyncio.Event(), 0
    load = Student._load

    async def slowly(self: Student, entry: Any, dtype: str) -> Any:
        nonlocal loads
        loads += 1
        await may_load.wait()
        return await load(self, entry, dtype)

    monkeypatch.setattr(Student, "_load", slowly)
    with monkeypatch.context() as hurry:
        hurry.setattr(generating, "GENERATE_S", 0.3)
        answer = await http.post("/v1/generate", json={"model": "writer", "prompt": "a", "max_tokens": 2})
    assert "did not load 'writer' and write 1 x 2 tokens within 0.3 s" in problem(answer, 504)["detail"]
    may_load.set()
    await ask(http, prompt="a", max_tokens=2)
    assert loads == 1


async def test_a_sampler_that_is_gone_is_replaced_by_the_next(deployment: Cluster, http: httpx.AsyncClient) -> None:
    ctx = await deployment.start("sampler", "sampler-1")
    asked = [(await ask(http, prompt="a", max_tokens=1))["sampler"] for _ in range(3)]
    assert len(set(asked)) == 1, "one has it loaded"
    assert ctx.settings.home == deployment.settings.home
    await deployment.crash(asked[0])

    async def answered() -> str:
        return (await ask(http, prompt="a", max_tokens=1))["sampler"]

    assert await wait_until(answered, timeout_s=20, what="the other sampler") != asked[0]
