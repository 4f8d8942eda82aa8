"""POST /v1/score with a real teacher: every number against a plain forward pass of the model."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stillhouse.client.aio import AsyncClient
from stillhouse.client.errors import ApiError
from stillhouse.core.errors import EngineStartError
from stillhouse.core.queue.registry import ServiceInfo
from stillhouse.gateway.app import create_app
from stillhouse.gateway.scoring import in_turn
from stillhouse.teacher import app as teacher_app
from stillhouse.teacher.engines.base import Abilities
from tests.cluster import Cluster, cluster

PROMPT, TEXT = "<|im_start|>user\ncafé?<|im_end|>\n", "yes, a thé"


@pytest.fixture
async def deployment(tmp_path: Path, redis_url: str) -> AsyncIterator[Cluster]:
    """A teacher and nothing else; the gateway's application is called in this process."""
    async with cluster(tmp_path, redis_url, "teacher", auth="none") as made:
        made.settings.artifacts_dir().mkdir(exist_ok=True)
        made.add_model("judge", seed=2)
        yield made


@pytest.fixture
async def client(deployment: Cluster) -> AsyncIterator[AsyncClient]:
    transport = httpx.ASGITransport(app=create_app(deployment.ctx, deployment.settings))
    async with AsyncClient("http://gateway", "", retries=0, transport=transport) as made:
        yield made


def plain_forward(deployment: Cluster, ids: list[int], temperature: float = 1.0) -> torch.Tensor:
    """[T - 1, V] log-probabilities of the tokens after the first, each given all before it."""
    model: Any = AutoModelForCausalLM.from_pretrained(deployment.settings.home / "models" / "judge")
    with torch.no_grad():
        return (model(torch.tensor([ids])).logits[0, :-1].double() / temperature).log_softmax(-1)


async def test_every_number_is_that_of_a_plain_forward_pass(deployment: Cluster, client: AsyncClient) -> None:
    tokenizer = AutoTokenizer.from_pretrained(deployment.settings.home / "models" / "judge")
    prompt_ids, text_ids = tokenizer(PROMPT)["input_ids"], tokenizer(TEXT)["input_ids"]
    answer = await client.score("judge", [TEXT], prompt=PROMPT, top_k=3, temperature=0.7)
    assert answer["usage"].to_dict() == {"prompt_tokens": len(prompt_ids), "scored_tokens": len(text_ids)}
    assert answer["model_sha256"] == deployment.models.get("judge").sha256
    (found,) = answer["data"]
    assert found["token_ids"] == text_ids
    assert "".join(found["tokens"][:7]) == "yes, a "
    expected = plain_forward(deployment, prompt_ids + text_ids, 0.7)[-len(text_ids) :]
    logprobs = expected[torch.arange(len(text_ids)), torch.tensor(text_ids)]
    assert found["logprobs"] == pytest.approx(logprobs.tolist(), abs=1e-5)
    assert found["logprob"] == pytest.approx(float(logprobs.sum()), abs=1e-4)
    assert found["perplexity"] == pytest.approx(math.exp(-float(logprobs.mean())), rel=1e-5)
    best = expected.topk(3)
    assert found["top_token_ids"] == best.indices.tolist()
    assert [value for row in found["top_logprobs"] for value in row] == pytest.approx(
        best.values.flatten().tolist(), abs=1e-5
    )
    rest = torch.log1p(-best.values.exp().sum(-1))
    assert found["rest_logprobs"] == pytest.approx(rest.tolist(), abs=1e-4)


async def test_texts_and_their_ids_in_one_request_or_alone_are_the_same(
    deployment: Cluster, client: AsyncClient
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(deployment.settings.home / "models" / "judge")
    ids = tokenizer(TEXT)["input_ids"]
    split = [{"prompt_ids": ids[:1], "token_ids": ids[1:]}, {"token_ids": ids}, {"text": TEXT}, "a longer text, padded"]
    together = (await client.score("judge", split))["data"]
    assert [found["index"] for found in together] == [0, 1, 2, 3]
    assert [found["num_prompt_tokens"] for found in together] == [1, 1, 1, 1]
    alone = (await client.score("judge", [TEXT]))["data"][0]
    assert alone["top_tokens"] is None
    for found in together[:3]:
        assert found["token_ids"] == ids[1:]
        assert found["logprobs"] == pytest.approx(alone["logprobs"], abs=1e-5)


async def test_a_long_answer_with_many_alternatives_comes_whole(client: AsyncClient) -> None:
    (found,) = (await client.score("judge", ["x" * 256], top_k=50))["data"]
    assert [len(row) for row in found["top_logprobs"]] == [50] * 255
    assert all(a >= b for row in found["top_logprobs"] for a, b in pairwise(row))


async def test_a_model_that_fits_nowhere_says_what_it_needs(deployment: Cluster, client: AsyncClient) -> None:
    deployment.add_model("wide", seed=3, hidden_size=512, num_layers=1)
    await deployment.stop("teacher-0")
    async with cluster(
        deployment.settings.home, deployment.settings.redis_url, "teacher", teacher_memory_gib=0.001
    ) as small:
        with pytest.raises(ApiError, match=r"needs .* GiB") as caught:
            await client.score("wide", ["a text"])
        assert caught.value.status == 429
        assert (await client.score("judge", ["a text"]))["teacher"] == "teacher-0"
        await small.stop("teacher-0")
    with pytest.raises(ApiError, match="no teacher service"):
        await client.score("judge", ["a text"])


def asked_first(deployment: Cluster) -> str:
    """Name of a teacher that is asked before teacher-0."""
    asked = deployment.models.get("judge").sha256
    both = [
        [ServiceInfo("teacher", name, "h:1", 1, 0.0, 0.0) for name in ("teacher-0", f"first-{n}")] for n in range(99)
    ]
    return next(info.instance for info in (in_turn(pair, asked)[0] for pair in both) if info.instance != "teacher-0")


async def test_where_the_engine_of_one_teacher_does_not_start_another_scores(
    deployment: Cluster, client: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any) -> Any:
        raise EngineStartError("it has no room")

    monkeypatch.setattr(teacher_app, "_transformers", lambda settings: load)
    await deployment.start("teacher", asked_first(deployment))
    assert (await client.score("judge", [TEXT]))["teacher"] == "teacher-0"
    await deployment.stop("teacher-0")
    with pytest.raises(ApiError, match="it has no room") as caught:
        await client.score("judge", [TEXT])
    assert caught.value.status == 503


async def test_what_one_teacher_cannot_do_another_does(
    deployment: Cluster, client: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = deployment.models.get("judge").sha256
    both = [
        [ServiceInfo("teacher", name, "h:1", 1, 0.0, 0.0) for name in ("teacher-0", f"half-{n}")] for n in range(99)
    ]
    half = next(first.instance for first in (in_turn(pair, asked)[0] for pair in both) if first.instance != "teacher-0")
    monkeypatch.setattr(teacher_app, "TRANSFORMERS", Abilities("half", temperatures=False))
    await deployment.start("teacher", half)
    assert (await client.score("judge", [TEXT]))["teacher"] == half, "it is asked first"
    assert (await client.score("judge", [TEXT], temperature=0.7))["teacher"] == "teacher-0"
    await deployment.stop("teacher-0")
    with pytest.raises(ApiError, match=r"no teacher that runs gives such scores: .* at temperature 1 only") as caught:
        await client.score("judge", [TEXT], temperature=0.7)
    assert caught.value.status == 422
