"""What bench_gateway.py sends: HTTP by hand on plain sockets, so that measuring costs little."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field

DEADLINE_S = 120.0
"""No phase takes longer."""


@dataclass
class Target:
    """Where to send and as whom."""

    port: int
    key: str

    def head(self, method: str, path: str, *headers: str) -> bytes:
        lines = [f"{method} {path} HTTP/1.1", "Host: bench", f"Authorization: Bearer {self.key}", *headers, "", ""]
        return "\r\n".join(lines).encode()


@dataclass
class Answers:
    """How a kind of request went."""

    seconds: list[float] = field(default_factory=list)
    statuses: dict[int, int] = field(default_factory=dict)

    def add(self, status: int, seconds: float) -> None:
        self.seconds.append(seconds)
        self.statuses[status] = self.statuses.get(status, 0) + 1

    def quantile(self, share: float) -> float:
        """Seconds within which this share was answered."""
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class Connection:
    """One kept-alive connection."""

    def __init__(self, target: Target) -> None:
        self._target = target

    async def __aenter__(self) -> Connection:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._target.port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """(status, body) of one request."""
        self._writer.write(request)
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        return int(head[9:12]), await self._reader.readexactly(length)


async def post_jobs(
    target: Target, make_body: Callable[[int], bytes], total: int, connections: int, keyed: bool, rate: float = 0.0
):
    """`total` jobs over so many connections, and beside them /healthz every 20 ms; (posts, probes, seconds).

    Rate 0: each connection posts as soon as it has its answer (closed loop). Else so many arrive a second, evenly, and
    the time of each counts from when it should have been sent: one that found no connection free has waited, too.
    """
    posts, probes = Answers(), Answers()
    numbers = iter(range(total))
    stamp = time.time_ns()

    async def worker() -> None:
        async with Connection(target) as connection:
            for number in numbers:
                body = make_body(number)
                extra = (f"Idempotency-Key: bench-{stamp}-{number}",) if keyed else ()
                head = target.head(
                    "POST", "/v1/jobs", "Content-Type: application/json", f"Content-Length: {len(body)}", *extra
                )
                due = began + number / rate if rate else time.perf_counter()
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                status, _ = await connection.ask(head + body)
                posts.add(status, time.perf_counter() - due)

    async def probe() -> None:
        async with Connection(target) as connection:
            while True:
                started = time.perf_counter()
                status, _ = await connection.ask(target.head("GET", "/healthz"))
                probes.add(status, time.perf_counter() - started)
                await asyncio.sleep(0.02)

    began = time.perf_counter()
    probing = asyncio.create_task(probe())
    async with asyncio.timeout(DEADLINE_S):
        await asyncio.gather(*(worker() for _ in range(connections)))
    probing.cancel()
    return posts, probes, time.perf_counter() - began


class Followers:
    """Event streams that are held open; each notes the events it got and when."""

    def __init__(self, target: Target, job_ids: list[str]) -> None:
        self.got: list[list[int]] = [[] for _ in job_ids]
        """Of each follower the numbers of its events, as they came."""
        self.delays: list[float] = []
        self._target = target
        self._tasks = [asyncio.create_task(self._follow(index, job_id)) for index, job_id in enumerate(job_ids)]
        self.all_open = asyncio.Event()
        self._open = 0

    async def _follow(self, index: int, job_id: str) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._target.port)
        writer.write(self._target.head("GET", f"/v1/jobs/{job_id}/events", "Accept: text/event-stream"))
        await reader.readuntil(b"\r\n\r\n")
        self._open += 1
        if self._open == len(self.got):
            self.all_open.set()
        while line := await reader.readline():
            if not line.startswith(b"data:"):
                continue
            data = json.loads(line[5:])["data"]
            if "number" in data:
                self.got[index].append(data["number"])
                self.delays.append(time.time() - data["sent_at"])
            if data.get("status") == "succeeded":
                break
        writer.close()

    async def done(self) -> None:
        """Every stream came to its end."""
        async with asyncio.timeout(DEADLINE_S):
            await asyncio.gather(*self._tasks)
