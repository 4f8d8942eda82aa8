"""The Python client for asyncio.

    async with AsyncClient() as client:
        job = await client.jobs.create(spec)
        async for event in client.jobs.stream_events(job.id):
            print(event.message)

It has the methods of `Client` (client.py), which runs these here. One client belongs to one event loop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import httpx

from stillhouse.client import calls
from stillhouse.client.calls import Call
from stillhouse.client.catalog import AsyncModels, AsyncRecipes, AsyncServices, AsyncVerifiers
from stillhouse.client.checkpoints import JobCheckpoints
from stillhouse.client.files import AsyncFiles
from stillhouse.client.jobs import JobVerbs
from stillhouse.client.keys import AsyncKeys
from stillhouse.client.sender import RETRIES, TIMEOUT_S, Options, Sender
from stillhouse.client.target import find_target
from stillhouse.client.transport import AsyncTransport
from stillhouse.core.schemas import Generation, Health, Scores

THINKING_S = 120.0
"""Longest silence while models work: the gateway gives them 85 s to be loaded and to answer."""


class AsyncJobs(JobVerbs, JobCheckpoints):
    """Distillation jobs."""


class AsyncClient:
    """A gateway."""

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        timeout_s: float = TIMEOUT_S,
        retries: int = RETRIES,
        deadline_s: float | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """See `Client`."""
        target = find_target(url, api_key)
        self._use(Sender(AsyncTransport(target, transport), target, Options(timeout_s, retries, deadline_s)))

    def _use(self, sender: Sender) -> Self:
        self._sender = sender
        self.url = sender.target.url
        self.jobs = AsyncJobs(sender)
        self.files = AsyncFiles(sender)
        self.models = AsyncModels(sender)
        self.verifiers = AsyncVerifiers(sender)
        self.recipes = AsyncRecipes(sender)
        self.services = AsyncServices(sender)
        self.keys = AsyncKeys(sender)
        return self

    def with_options(
        self, *, timeout_s: float | None = None, retries: int | None = None, deadline_s: float | None = None
    ) -> Self:
        """The same gateway over the same connections, with other patience: `client.with_options(retries=0)`."""
        given = {"timeout_s": timeout_s, "retries": retries, "deadline_s": deadline_s}
        changes = {name: value for name, value in given.items() if value is not None}
        return type(self).__new__(type(self))._use(self._sender.with_options(**changes))

    async def health(self) -> Health:
        """status and version of a gateway that can serve requests."""
        return await self._sender.send(Call("GET", "/readyz", Health))

    async def score(
        self,
        model: str,
        texts: Sequence[str | Mapping[str, Any]],
        *,
        prompt: str = "",
        top_k: int = 0,
        temperature: float = 1.0,
        dtype: str = "float32",
    ) -> Scores:
        """How likely a registered model finds every token of some texts, each read after `prompt`.

        A text may also be an item: {"prompt": ..., "text": ...} or {"prompt_ids": [...], "token_ids": [...]}.

        >>> scores = client.score("teacher", ["one", "two"], prompt="say ")
        >>> likeliest = max(scores.data, key=lambda text: text.logprob)
        """
        items = [{"prompt": prompt, "text": text} if isinstance(text, str) else dict(text) for text in texts]
        body = {"model": model, "items": items, "top_k": top_k, "temperature": temperature, "dtype": dtype}
        return await self._sender.send(_thinking("/v1/score", Scores, body))

    async def generate(
        self,
        model: str,
        prompt: str | None = None,
        *,
        messages: Sequence[Mapping[str, str]] | None = None,
        max_tokens: int = 256,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int | None = None,
        n: int = 1,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        dtype: str = "float32",
    ) -> Generation:
        """What a model writes: a registered one, a checkpoint (`job_ID/ckpt_...`), or the newest of a job (`job_ID`).

        Args:
            prompt: read as it is; either this or `messages`.
            messages: a conversation, read through the chat template with `chat_template_kwargs`.
            temperature: 0 = the likeliest token each time.
            seed: the same seed gives the same texts.
            n: completions of `max_tokens` at most.
        """
        given = {"model": model, "prompt": prompt, "messages": messages, "max_tokens": max_tokens, "n": n}
        given |= {"temperature": temperature, "top_p": top_p, "seed": seed, "dtype": dtype}
        given |= {"chat_template_kwargs": chat_template_kwargs}
        body = {name: value for name, value in given.items() if value is not None}
        return await self._sender.send(_thinking("/v1/generate", Generation, body))

    async def close(self) -> None:
        """Close the connections."""
        await self._sender.transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def _thinking(path: str, answer: type[Any], body: dict[str, Any]) -> Call[Any]:
    # too much for the time that there is (504) is too much the next time
    return Call("POST", path, answer, json=body, retry_status=calls.RETRY_STATUS - {504}, timeout_s=THINKING_S)
