"""The gateway as a process, on a real socket, with both clients."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog

from stillhouse.client.aio import AsyncClient
from stillhouse.client.client import Client
from stillhouse.core.blobs import write_json
from stillhouse.core.config import Settings
from stillhouse.core.keys import create_key
from stillhouse.core.queue.streams import Scope
from stillhouse.core.service import Context, open_context
from tests.conftest import free_port
from tests.gateway_kit import add_model, make_spec, problem
from tests.waiting import wait_until


@dataclass
class Process:
    """A gateway that can be killed and started again on the same port."""

    home: Path
    redis_url: str
    port: int
    key: str
    popen: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        env = {name: value for name, value in os.environ.items() if not name.startswith("STILLHOUSE_")}
        env |= {"STILLHOUSE_HOME": str(self.home), "STILLHOUSE_REDIS_URL": self.redis_url}
        env |= {"STILLHOUSE_PORT": str(self.port), "STILLHOUSE_LOG_FORMAT": "json", "STILLHOUSE_DRAIN_S": "5"}
        log = (self.home / "gateway.log").open("ab")
        self.popen = subprocess.Popen([sys.executable, "-m", "stillhouse.gateway"], env=env, stderr=log)
        log.close()

    async def ready(self) -> None:
        async with httpx.AsyncClient() as http:

            async def answers() -> bool:
                assert self.popen is not None
                assert self.popen.poll() is None, self.log()
                with contextlib.suppress(httpx.TransportError):
                    return (await http.get(f"{self.url}/readyz")).status_code == 200
                return False

            await wait_until(answers, timeout_s=30, what="the gateway to be ready")

    def end(self, number: int = signal.SIGTERM) -> int:
        assert self.popen is not None
        self.popen.send_signal(number)
        return self.popen.wait(timeout=20)

    def log(self) -> str:
        return (self.home / "gateway.log").read_text()


@pytest.fixture
async def gateway(redis_url: str, tmp_path: Path) -> AsyncIterator[Process]:
    add_model(tmp_path, "small")
    add_model(tmp_path, "big", size=8)
    process = Process(tmp_path, redis_url, free_port(), create_key(tmp_path / "api-keys.json", "tester"))
    process.start()
    await process.ready()
    yield process
    if process.popen is not None and process.popen.poll() is None:
        process.end(signal.SIGKILL)


@pytest.fixture
async def ctx(redis_url: str, tmp_path: Path) -> AsyncIterator[Context]:
    """The trainer's side of the queue server."""
    settings = Settings(home=tmp_path, redis_url=redis_url).resolved()
    opened = open_context(settings, "trainer", structlog.get_logger(), instance="trainer-test")
    yield opened
    await opened.close()


async def led(ctx: Context, job_id: str) -> Scope:
    scope = Scope(job_id, await ctx.jobs.claim(job_id, "trainer-test", 60.0, 0))
    await ctx.jobs.update(scope, status="running")
    return scope


async def succeed(ctx: Context, scope: Scope) -> None:
    await ctx.jobs.update(scope, status="succeeded", release=True)
    await ctx.jobs.event(scope.job_id, "job.status", "succeeded", status="succeeded")


async def test_a_job_from_upload_to_download(gateway: Process, ctx: Context, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    async with AsyncClient(gateway.url, gateway.key) as client:
        assert (await client.health())["status"] == "ready"
        assert [model["id"] for model in await client.models.list()] == ["big", "small"]
        file = await client.files.upload(prompts)
        spec = make_spec()
        spec["stages"][0]["data"] = {"file": file["id"]}
        job = await client.jobs.create(spec, idempotency_key="mine")
        assert (await client.jobs.create(spec, idempotency_key="mine"))["id"] == job["id"]
        scope = await led(ctx, job["id"])
        await ctx.jobs.metric(scope, 1, {"loss": 0.5})
        artifacts = ctx.artifacts.job(job["id"])
        write_json(artifacts.evaluations / "0.json", {"step": 0})
        artifacts.export(scope.epoch).mkdir(parents=True)
        content = os.urandom(9 << 20)
        (artifacts.export(scope.epoch) / "model.safetensors").write_bytes(content)
        await succeed(ctx, scope)
        seen: list[str] = []
        done = await client.jobs.wait(job["id"], on_event=lambda event: seen.append(event["message"]), timeout_s=20)
        assert done["status"] == "succeeded"
        assert seen == ["queued", "succeeded"]
        assert (await client.jobs.metrics(job["id"], names=("loss",)))[0]["values"] == {"loss": 0.5}
        assert await client.jobs.evaluations(job["id"]) == [{"step": 0}]
        assert [item["id"] for item in await client.jobs.checkpoints(job["id"])] == ["ckpt_export"]
        assert [item["id"] for item in await client.jobs.list(status="succeeded")] == [job["id"]]
        folder = await client.jobs.download(job["id"], tmp_path / "async")
        assert (folder / "model.safetensors").read_bytes() == content

        async def gateway_is_listed() -> bool:
            return [service["role"] for service in await client.services.list()] == ["gateway"]

        await wait_until(gateway_is_listed, timeout_s=10, what="the gateway in the registry")

    def with_sync_client() -> Path:
        with Client(gateway.url, gateway.key) as sync:
            assert sync.jobs.get(job["id"]) == done
            assert [event["message"] for event in sync.jobs.events(job["id"])] == seen
            assert sync.files.upload(prompts) == file
            return sync.jobs.download(job["id"], tmp_path / "sync", checkpoint="ckpt_export")

    assert ((await asyncio.to_thread(with_sync_client)) / "model.safetensors").read_bytes() == content
    assert sorted(path.name for path in tmp_path.glob(".*")) == [], "nothing temporary is left"


async def test_an_event_stream_survives_the_gateway(gateway: Process, ctx: Context) -> None:
    """kill -9 and SIGTERM in the middle of a stream: every event comes once, in order."""
    async with AsyncClient(gateway.url, gateway.key, retries=60) as client:
        job = await client.jobs.create(make_spec())
        scope = await led(ctx, job["id"])
        seen: list[str] = []

        async def follow() -> None:
            async for event in client.jobs.stream_events(job["id"]):
                seen.append(event["message"])

        task = asyncio.create_task(follow())
        for number, kill in enumerate((signal.SIGKILL, signal.SIGTERM)):
            await ctx.jobs.event(job["id"], "log", f"before {number}")
            await wait_until(lambda n=number: f"before {n}" in seen, timeout_s=20, what="the event")
            code = await asyncio.to_thread(gateway.end, kill)
            assert code == (0 if kill == signal.SIGTERM else -kill), gateway.log()
            await ctx.jobs.event(job["id"], "log", f"while down {number}")
            gateway.start()
        await gateway.ready()
        await succeed(ctx, scope)
        await asyncio.wait_for(task, 30)
        assert seen == ["queued", "before 0", "while down 0", "before 1", "while down 1", "succeeded"]


async def test_sigterm_leaves_at_once_and_cleanly(gateway: Process, ctx: Context) -> None:
    async with httpx.AsyncClient() as http:
        assert (await http.get(f"{gateway.url}/healthz")).status_code == 200  # a connection that stays open
        assert await asyncio.to_thread(gateway.end) == 0
    assert await ctx.registry.services("gateway") == []
    assert await ctx.redis.get("sh:sweeper") is None
    assert "Traceback" not in gateway.log()
    assert '"event": "stopped"' in gateway.log()


async def test_a_busy_port_is_said_plainly(gateway: Process) -> None:
    second = Process(gateway.home, gateway.redis_url, gateway.port, gateway.key)
    before = len(gateway.log())
    second.start()
    assert second.popen is not None
    assert await asyncio.to_thread(second.popen.wait, 20) == 1
    said = gateway.log()[before:]
    assert f"port {gateway.port} on 127.0.0.1 is in use" in said
    assert "STILLHOUSE_PORT" in said
    assert "Traceback" not in said


async def test_bodies_over_the_limit_get_their_answer_on_a_real_socket(gateway: Process) -> None:
    headers = {"Authorization": f"Bearer {gateway.key}", "Content-Type": "application/json"}

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b" " * (1 << 15)

    async with httpx.AsyncClient() as http:
        url = f"{gateway.url}/v1/jobs"
        problem(await http.post(url, content=b" " * (3 << 20), headers=headers), 413)
        problem(await http.post(url, content=chunks(), headers=headers), 413)
        bad = b'{"prompt": 1}\n' + b'{"prompt": "x"}\n' * 200_000
        upload = {**headers, "Content-Type": "application/jsonl"}
        answer = await http.post(f"{gateway.url}/v1/files", content=bad, headers=upload)
        assert "line 1" in problem(answer, 422)["detail"]


async def test_metrics_are_exported_with_routes_and_not_ids(gateway: Process) -> None:
    async with httpx.AsyncClient(headers={"Authorization": f"Bearer {gateway.key}"}) as http:
        await http.get(f"{gateway.url}/v1/jobs/job_0123456789")
        text = (await http.get(f"{gateway.url}/metrics")).text
    label = 'method="GET",route="/v1/jobs/{job_id}",status="404"'
    assert f"stillhouse_gateway_request_seconds_count{{{label}}} 1.0" in text
    assert "job_0123456789" not in text
    assert "stillhouse_build_info" in text


async def test_the_log_names_requests_and_no_secrets(gateway: Process) -> None:
    async with httpx.AsyncClient(headers={"Authorization": f"Bearer {gateway.key}"}) as http:
        spec: dict[str, Any] = make_spec()
        spec["stages"][0]["data"]["rows"][0]["prompt"] = "very private words"
        answer = await http.post(f"{gateway.url}/v1/jobs", json=spec, headers={"X-Request-Id": "my-request"})
    assert answer.headers["x-request-id"] == "my-request"
    named = '"request_id": "my-request"'  # logged after the answer was sent
    await wait_until(lambda: named in gateway.log(), timeout_s=10, what="the request in the log")
    log = gateway.log()
    assert gateway.key not in log
    assert "private words" not in log


class DeafProxy(threading.Thread):
    """Accepts connections and never answers."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]

    def run(self) -> None:
        held = []
        with contextlib.suppress(OSError):
            while True:
                held.append(self.listener.accept())


@pytest.fixture
def deaf_redis() -> Iterator[str]:
    proxy = DeafProxy()
    proxy.start()
    yield f"redis://127.0.0.1:{proxy.port}/0"
    proxy.listener.close()


async def test_it_starts_and_is_alive_without_a_queue_server(deaf_redis: str, tmp_path: Path) -> None:
    process = Process(tmp_path, deaf_redis, free_port(), "")
    process.start()
    async with httpx.AsyncClient(timeout=10) as http:

        async def is_alive() -> bool:
            with contextlib.suppress(httpx.TransportError):
                return (await http.get(f"{process.url}/healthz")).status_code == 200
            return False

        await wait_until(is_alive, timeout_s=30, what="the gateway to be alive")
        problem(await http.get(f"{process.url}/readyz"), 503)
    assert await asyncio.to_thread(process.end) == 0, process.log()
