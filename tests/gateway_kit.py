"""A gateway on a real queue server, with hand-made models: no torch needed."""

from __future__ import annotations

import json
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import structlog
from tokenizers import Tokenizer, models, pre_tokenizers

from stillhouse.core.config import Settings
from stillhouse.core.keys import create_key
from stillhouse.core.models import ModelRegistry, inspect_model
from stillhouse.core.service import Context, open_context
from stillhouse.gateway.app import create_app


def make_model(
    folder: Path,
    *,
    max_length: int = 256,
    extra_token: str = "",
    has_template: bool = True,
    size: int = 4,
    template: str = "{{ messages }}",
    eos_token_id: int | None = 0,
    vocab_pad: int = 0,
    architecture: str = "LlamaForCausalLM",
) -> Path:
    """A folder that passes intake: one token per byte, one tensor. `extra_token` makes another tokenizer of it."""
    folder.mkdir(parents=True)
    vocabulary = {byte: index for index, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    if extra_token:
        vocabulary[extra_token] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {"vocab_size": len(vocabulary), "hidden_size": size, "num_hidden_layers": 1}
    config |= {"max_position_embeddings": max_length, "architectures": [architecture]}
    config |= {"eos_token_id": eos_token_id} if eos_token_id is not None else {}
    config["vocab_size"] += vocab_pad
    (folder / "config.json").write_text(json.dumps(config))
    if has_template:
        (folder / "chat_template.jinja").write_text(template)
    header = json.dumps({"w": {"dtype": "F32", "shape": [size], "data_offsets": [0, 4 * size]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4 * size))
    return folder


def add_model(home: Path, name: str, **options: Any) -> None:
    """Make and register a model."""
    registry = ModelRegistry(home / "models.yaml")
    registry.add(inspect_model(name, make_model(home / "models" / name, **options)))


def make_spec(**changes: Any) -> dict[str, Any]:
    """A small job that is valid for models `small` and `big`; `changes` replace top-level keys."""
    spec: dict[str, Any] = {
        "name": "test",
        "student": {"model": "small"},
        "teachers": {"main": {"model": "big"}},
        "stages": [
            {
                "data": {"rows": [{"prompt": "one"}, {"prompt": "two"}]},
                "sampling": {"max_tokens": 8},
                "loss": {"objective": "policy_gradient"},
                "schedule": {"steps": 3, "prompts_per_step": 2},
            }
        ],
    }
    return {**spec, **changes}


class Gateway:
    """What a test needs: the context, an authorised client, and the key."""

    def __init__(self, ctx: Context, http: httpx.AsyncClient, key: str) -> None:
        self.ctx = ctx
        self.http = http
        self.key = key
        self.home = ctx.settings.home

    async def submit(self, spec: dict[str, Any] | None = None, *, key: str = "") -> httpx.Response:
        """POST /v1/jobs, with an Idempotency-Key if given."""
        body = json.dumps(spec or make_spec())  # ASCII: also carries what UTF-8 cannot
        headers = {"Content-Type": "application/json"} | ({"Idempotency-Key": key} if key else {})
        return await self.http.post("/v1/jobs", content=body, headers=headers)

    async def refused(self, spec: dict[str, Any], status: int = 422) -> dict[str, Any]:
        """The problem that answers a wrong job."""
        return problem(await self.submit(spec), status)


def problem(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The problem in an answer, after checking what every problem must have."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert body["status"] == status
    assert body["detail"]
    assert body["title"]
    assert body["type"] == f"urn:stillhouse:error:{body['code']}"
    assert body["request_id"] == answer.headers["x-request-id"]
    assert "Traceback" not in answer.text
    return body


@asynccontextmanager
async def open_gateway(redis_url: str, home: Path, **changes: Any) -> AsyncIterator[Gateway]:
    """The application, reached in process; models `small` and `big` are registered."""
    add_model(home, "small")
    add_model(home, "big", size=8)
    settings = Settings(home=home, redis_url=redis_url, lease_s=0.2, **changes).resolved()
    settings.artifacts_dir().mkdir()
    key = create_key(settings.keys_path(), "tester")
    ctx = open_context(settings, "gateway", structlog.get_logger(), instance="gateway-test")
    transport = httpx.ASGITransport(app=create_app(ctx, settings), raise_app_exceptions=False)
    headers = {"Authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway", headers=headers) as http:
        yield Gateway(ctx, http, key)
    ctx.stop.set()
    await ctx.close()
