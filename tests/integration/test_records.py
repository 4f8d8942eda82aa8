"""What a real job leaves behind, read over REST: samples by token, log lines, and another try at what failed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import structlog

from stillhouse.core import telemetry
from stillhouse.core.oracle.verify import verify_job
from stillhouse.core.service import open_context
from stillhouse.gateway.app import create_app
from stillhouse.sampler.shift import Shift
from stillhouse.trainer.exchange import Exchange
from tests.cluster import Cluster, job_spec
from tests.waiting import wait_until


@asynccontextmanager
async def rest(deployment: Cluster) -> AsyncIterator[httpx.AsyncClient]:
    settings = deployment.settings.model_copy(update={"auth": "none"})
    ctx = open_context(settings, "gateway", structlog.get_logger(), instance="gateway-0")
    transport = httpx.ASGITransport(app=create_app(ctx, settings))
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as http:
            yield http
    finally:
        await ctx.close()


async def read(http: httpx.AsyncClient, path: str, **query: Any) -> list[dict[str, Any]]:
    answer = await http.get(f"/v1/jobs/{path}", params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()["data"]


@pytest.fixture
def logged(deployment: Cluster) -> Iterator[None]:
    """Logs as a service process has them."""
    root = logging.getLogger()
    handlers, level, before = root.handlers, root.level, structlog.get_config()
    telemetry.setup_logging(deployment.settings, "all", "all-0")
    yield
    telemetry.flush_logs()
    root.handlers, root.level = handlers, level
    structlog.configure(**before)
    structlog.contextvars.clear_contextvars()


@pytest.mark.usefixtures("logged")
@pytest.mark.parametrize("kind", ["full_vocabulary", "top_k"])
async def test_samples_say_what_the_metrics_say(deployment: Cluster, kind: str) -> None:
    loss = {"objective": kind} | ({"k": 8, "support": "union"} if kind == "top_k" else {})
    job_id = await deployment.submit(job_spec(stages__0__loss=loss, stages__0__schedule__steps=2))
    async with rest(deployment) as http:
        record = await deployment.ended(job_id)
        assert record.status == "succeeded", record.error
        samples = await read(http, f"{job_id}/samples")
        assert [(sample["step"], sample["id"]) for sample in samples] == [
            *((2, f"{group}/0") for group in (3, 4, 5)),
            *((1, f"{group}/0") for group in (0, 1, 2)),
        ]
        for sample in samples:
            assert sample["prompt"].startswith("<|im_start|>user\nsay ")
            assert "".join(token["text"] for token in sample["tokens"]) == sample["completion"]
            assert len(sample["tokens"]) == sample["num_tokens"] > 0
            for token in sample["tokens"]:
                assert token["kl"] == pytest.approx(token["student_logprob"] - token["teacher_logprob"], abs=1e-5)
                if kind == "top_k":
                    assert len(token["top"]) == len(token["student_top"]) == 5
                    assert token["top"][0]["logprob"] >= token["teacher_logprob"] - 1e-4, "the likeliest comes first"
        lengths = [sum(s["num_tokens"] for s in samples if s["step"] == step) for step in (1, 2)]
        assert await deployment.metric(job_id, "tokens/trained") == lengths

        async def whole() -> list[dict[str, Any]] | None:  # the trainer says that it ended just after the record does
            found = await read(http, f"{job_id}/logs")
            return found if any(line["message"] == "job ended" for line in found) else None

        lines = await wait_until(whole, timeout_s=20, what="the last line")
        said = [line["message"] for line in lines]
        assert {"job claimed", "serving", "student loaded", "model loaded", "job ended"} <= set(said)
        assert said.index("job claimed") < said.index("student loaded") < said.index("job ended")
        assert all("say " not in str(line) for line in lines), "no prompts"


async def test_a_sample_that_failed_is_written_again(deployment: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one of step 1 fails; it is asked for again while a slow one holds up the step."""
    real_end, real_settled, is_retried = Shift._end, Exchange.settled, asyncio.Event()

    async def end(self: Shift, work: Any, index: int, completion: Any, source: Any) -> None:
        if completion.key == "1/0" and work.group.attempt == 0:
            await self._fail(work, index, "bad_luck", "made to fail")
            return
        await real_end(self, work, index, completion, source)

    async def settled(self: Exchange, groups: Any) -> None:
        await is_retried.wait()
        await real_settled(self, groups)

    monkeypatch.setattr(Shift, "_end", end)
    monkeypatch.setattr(Exchange, "settled", settled)
    job_id = await deployment.submit(job_spec(stages__0__schedule__steps=2, max_failed_fraction=0.0))
    async with rest(deployment) as http:

        async def letters() -> list[dict[str, Any]]:
            return await read(http, f"{job_id}/dead_letters")

        (letter,) = await wait_until(letters, timeout_s=60, what="the sample to fail")
        assert (letter["id"], letter["step"], letter["reason"]) == ("1/0", 1, "bad_luck")

        async def retried() -> dict[str, Any] | None:  # its failure may be on its way to the trainer yet
            body = {"ids": ["1/0", "99/0"]}
            answer = await http.post(f"/v1/jobs/{job_id}/dead_letters/retry", json=body)
            assert answer.status_code == 200, answer.text
            first, second = answer.json()["data"]
            assert (second["id"], second["is_retried"]) == ("99/0", False)
            return first if first["is_retried"] else None

        assert await wait_until(retried, timeout_s=60, what="the retry") == {
            "id": "1/0",
            "is_retried": True,
            "message": "",
        }
        assert await letters() == []
        is_retried.set()
        record = await deployment.ended(job_id)
        assert record.status == "succeeded", record.error
        samples = await read(http, f"{job_id}/samples", step=1)
        assert [(sample["id"], sample["failure"]) for sample in samples] == [(f"{n}/0", None) for n in range(3)]
        late = await http.post(f"/v1/jobs/{job_id}/dead_letters/retry", json={"ids": ["1/0"]})
        assert late.status_code == 409
    assert verify_job(deployment.ctx.artifacts.job(job_id), record).violations == []
