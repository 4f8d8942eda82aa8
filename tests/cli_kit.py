"""The command against a real deployment in this process: services, gateway and queue server are real, and one tiny job
has run. A command takes milliseconds, since nothing is started for it."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import uvicorn

from stillhouse.cli.main import main
from stillhouse.core.keys import create_key
from stillhouse.gateway.__main__ import Server, listen
from stillhouse.gateway.app import create_app
from tests.cluster import Cluster, cluster
from tests.waiting import wait_until

START_S = 60.0
"""A busy machine takes that long for a sampler, a teacher and a trainer."""


@dataclass(frozen=True)
class Said:
    """What a command printed."""

    out: str
    err: str

    def json(self) -> Any:
        """The one JSON document on stdout."""
        return json.loads(self.out)

    def lines(self) -> list[Any]:
        """JSON lines."""
        return [json.loads(line) for line in self.out.splitlines()]


class _Stdout(io.TextIOWrapper):
    """What this thread prints; the services log from theirs to where they always do."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), "utf-8")
        self._owner, self._others = threading.get_ident(), sys.stdout

    def write(self, text: str) -> int:
        return super().write(text) if threading.get_ident() == self._owner else self._others.write(text)


_KEPT: list[_Stdout] = []
"""All there were: `print` of another thread borrows sys.stdout without a reference (CPython 3.11); one that is freed
under it ends the process."""


class Shell:
    """`stillhouse ...` as a user of one gateway types it, in this process."""

    def __init__(self, home: Path, url: str, key: str) -> None:
        self.home, self.url, self.key = home, url, key
        (home / "client.json").write_text(json.dumps({"url": url, "api_key": key}))

    def __call__(
        self, *arguments: str, code: int | None = 0, stdin: str = "", env: Mapping[str, str] | None = None
    ) -> Said:
        """Run a command; fails unless it ends with `code` (None = any)."""
        out, err = _Stdout(), io.StringIO()
        _KEPT.append(out)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("STILLHOUSE_")}
        environ = {**kept, "STILLHOUSE_HOME": str(self.home), "NO_COLOR": "1", "COLUMNS": "160", **(env or {})}
        with (
            mock.patch.dict(os.environ, environ, clear=True),
            mock.patch.object(sys, "argv", ["stillhouse", *arguments]),
            mock.patch.object(sys, "stdin", io.StringIO(stdin)),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            try:
                main()
                ended = 0
            except SystemExit as leave:
                ended = leave.code or 0
        out.flush()
        said = Said(out.buffer.getvalue().decode(), err.getvalue())  # type: ignore[attr-defined]
        assert code in (None, ended), f"{arguments} ended with {ended}, not {code}\n{said.out}\n{said.err}"
        assert "Traceback" not in said.err
        return said

    def from_elsewhere(self) -> dict[str, str]:
        """The environment of a user on another machine."""
        return {"STILLHOUSE_URL": self.url, "STILLHOUSE_API_KEY": self.key}


class Deployment:
    """Services in a thread of their own, with a loop of their own: tests may block."""

    def __init__(self, home: Path, redis_url: str) -> None:
        self._home, self._redis_url = home, redis_url
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="deployment")
        self._done = asyncio.Event()
        self.cluster: Cluster
        self.shell: Shell

    def run(self, work: Coroutine[Any, Any, Any], timeout_s: float = START_S) -> Any:
        """Do something in the deployment's loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout_s)

    def start(self, *roles: str, prepare: Callable[[Cluster], None]) -> None:
        self._thread.start()
        ready: asyncio.Future[None] = self._loop.create_future()
        self._serving = asyncio.run_coroutine_threadsafe(self._serve(roles, prepare, ready), self._loop)

        async def started() -> None:
            await asyncio.wait({ready, asyncio.wrap_future(self._serving)}, return_when=asyncio.FIRST_COMPLETED)
            if self._serving.done():
                self._serving.result()

        self.run(started())

    async def _serve(self, roles: Any, prepare: Callable[[Cluster], None], ready: asyncio.Future[None]) -> None:
        async with cluster(self._home, self._redis_url, *roles, port=0) as self.cluster:
            settings = self.cluster.settings
            settings.artifacts_dir().mkdir(exist_ok=True)
            prepare(self.cluster)
            listener = listen("127.0.0.1", 0)
            app = create_app(self.cluster.ctx, settings)
            server = Server(uvicorn.Config(app, log_config=None, lifespan="off", timeout_graceful_shutdown=2))
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            await wait_until(lambda: _is(server.started), timeout_s=10, what="the gateway")
            key = create_key(settings.keys_path(), "tester", scopes=["admin"])
            self.shell = Shell(self._home, f"http://127.0.0.1:{listener.getsockname()[1]}", key)
            ready.set_result(None)
            await self._done.wait()
            server.should_exit = True
            await serving

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._done.set)
        try:
            self._serving.result(START_S)
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10)


async def _is(fact: bool) -> bool:
    return fact


@contextlib.contextmanager
def deployment(
    home: Path, redis_url: str, *roles: str, prepare: Callable[[Cluster], None] = lambda _: None
) -> Iterator[Deployment]:
    """Services of `roles` and a gateway."""
    made = Deployment(home, redis_url)
    made.start(*roles, prepare=prepare)
    try:
        yield made
    finally:
        made.close()
