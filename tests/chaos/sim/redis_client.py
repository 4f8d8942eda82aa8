"""redis-py over a simulated server: latency, lost answers, outages, retries as the real clients do them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

from redis.exceptions import ConnectionError as RedisConnectionError

from stillhouse.core.queue.client import RETRIES
from tests.chaos.sim.process import check_alive, current, pass_gate
from tests.chaos.sim.redis_server import RedisServer, raw

LATENCY_S = (0.0001, 0.002)


class Line:
    """The network to the server, and how bad it is at the moment."""

    def __init__(self, server: RedisServer, draw: random.Random, trace: Callable[..., None]) -> None:
        self.server = server
        self._draw = draw
        self._trace = trace
        self.is_down = False
        self.lost_answers = 0.0
        """Probability that a command is done and its answer lost."""
        self.refused = 0.0
        """Probability that a command does not arrive."""
        self.slow_s = 0.0
        """Added to every command."""
        self.num_commands = 0
        self._waiting: dict[bytes, list[asyncio.Future[bool]]] = {}
        server.on_change = self._wake

    async def call(self, what: str, run: Callable[[], Any]) -> Any:
        """Send a command."""
        await pass_gate()
        await asyncio.sleep(self._draw.uniform(*LATENCY_S) + self.slow_s)
        await pass_gate()
        if self.is_down or (self.refused and self._draw.random() < self.refused):
            raise RedisConnectionError("connection refused by the simulation")
        self.num_commands += 1
        process = current()
        self._trace("redis", process.name if process else "", what)
        answer = run()
        if self.lost_answers and self._draw.random() < self.lost_answers:
            self._trace("lost", what)
            await asyncio.sleep(self._draw.uniform(*LATENCY_S))
            raise RedisConnectionError("answer lost by the simulation")
        return answer

    def go_down(self) -> None:
        """Every connection breaks."""
        self.is_down = True
        for waiting in self._waiting.values():
            for future in waiting:
                if not future.done():
                    future.set_exception(RedisConnectionError("connection closed by the simulation"))
        self._waiting.clear()

    def _wake(self, key: bytes) -> None:
        for future in self._waiting.pop(key, ()):
            _settle(future, True)

    async def changed(self, keys: list[bytes], timeout_s: float) -> bool:
        """Wait until one of the streams changes; False if none did."""
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        for key in keys:
            self._waiting.setdefault(key, []).append(future)
        timer = asyncio.get_running_loop().call_later(timeout_s, _settle, future, False)
        try:
            return await future
        finally:
            timer.cancel()
            for key in keys:
                if future in self._waiting.get(key, ()):
                    self._waiting[key].remove(future)


class SimRedis:
    """What Stillhouse uses of `redis.asyncio.Redis`."""

    def __init__(self, line: Line, *, retries: int = RETRIES) -> None:
        self._line = line
        self._retries = retries

    async def _do(self, *parts: Any) -> Any:
        return await self._retrying(parts[0], lambda: self._line.server.call(*parts))

    async def _retrying(self, what: str, run: Callable[[], Any]) -> Any:
        pause_s = 0.05
        for attempt in range(self._retries + 1):
            try:
                return await self._line.call(what, run)
            except RedisConnectionError:
                if attempt == self._retries:
                    raise
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, 1.0)

    def register_script(self, text: str) -> Any:
        async def script(keys: Any = (), args: Any = ()) -> Any:
            what = f"script {raw(keys[0]).decode()}" if keys else "script"
            return await self._retrying(what, lambda: self._line.server.run_script(text, keys, args))

        return script

    def pipeline(self, *, transaction: bool) -> SimPipeline:
        return SimPipeline(
            lambda batch: self._retrying("pipeline", lambda: [self._line.server.call(*c) for c in batch])
        )

    async def aclose(self) -> None:
        return

    async def info(self, section: str) -> Any:
        await self._do("PING")
        return {"used_memory": 0, "maxmemory": 0}

    async def ping(self) -> Any:
        return await self._do("PING")

    async def get(self, key: Any) -> Any:
        return await self._do("GET", key)

    async def delete(self, *keys: Any) -> Any:
        return await self._do("DEL", *keys)

    async def exists(self, *keys: Any) -> Any:
        return await self._do("EXISTS", *keys)

    async def hset(self, key: Any, name: Any, value: Any) -> Any:
        return await self._do("HSET", key, name, value)

    async def hget(self, key: Any, name: Any) -> Any:
        return await self._do("HGET", key, name)

    async def hmget(self, key: Any, names: Any) -> Any:
        return await self._do("HMGET", key, *names)

    async def hgetall(self, key: Any) -> Any:
        return await self._do("HGETALL", key)

    async def hkeys(self, key: Any) -> Any:
        return await self._do("HKEYS", key)

    async def hdel(self, key: Any, *names: Any) -> Any:
        return await self._do("HDEL", key, *names)

    async def sadd(self, key: Any, *members: Any) -> Any:
        return await self._do("SADD", key, *members)

    async def smembers(self, key: Any) -> Any:
        return await self._do("SMEMBERS", key)

    async def lrange(self, key: Any, first: int, last: int) -> Any:
        return await self._do("LRANGE", key, first, last)

    async def zrem(self, key: Any, *members: Any) -> Any:
        return await self._do("ZREM", key, *members)

    async def zrange(self, key: Any, low: int, high: int, *, desc: bool = False, withscores: bool = False) -> Any:
        found = await self._do("ZRANGE", key, low, high)
        found = found[::-1] if desc else found
        return found if withscores else [member for member, _ in found]

    async def xlen(self, key: Any) -> Any:
        return await self._do("XLEN", key)

    async def xrange(self, key: Any, min: Any = "-", max: Any = "+", count: int = 1_000_000) -> Any:
        return await self._do("XRANGE", key, min, max, "COUNT", count)

    async def xpending_range(self, key: Any, group: Any, min: Any, max: Any, count: int) -> Any:
        found = await self._do("XPENDING", key, group, min, max, count)
        return [{"message_id": i, "consumer": c, "times_delivered": n} for i, c, _, n in found]

    async def xautoclaim(
        self, key: Any, group: Any, consumer: Any, min_idle_ms: int, *, start_id: Any = "0-0", count: int = 100
    ) -> Any:
        answer = await self._do("XAUTOCLAIM", key, group, consumer, min_idle_ms, start_id, "COUNT", count)
        return [answer[0], [(entry_id, _fields(flat)) for entry_id, flat in answer[1]]]

    async def xreadgroup(self, group: Any, consumer: Any, streams: Any, *, count: int, block: int) -> Any:
        """Blocks as a real server does: what is delivered to a frozen reader is the reader's."""
        keys = [raw(key) for key in streams]
        loop = asyncio.get_running_loop()
        until = loop.time() + block / 1000
        parts = ("XREADGROUP", group, consumer, count, *keys)
        found = await self._line.call("XREADGROUP", lambda: self._line.server.call(*parts))
        while not found and loop.time() < until:
            if not await self._line.changed(keys, until - loop.time()):
                break
            check_alive()
            found = self._line.server.call(*parts)
        await pass_gate()
        return [[key, [(entry_id, _fields(flat)) for entry_id, flat in entries]] for key, entries in found]


class SimPipeline:
    """Reads that go over the line together."""

    def __init__(self, run: Callable[[list[tuple[Any, ...]]], Awaitable[list[Any]]]) -> None:
        self._run = run
        self._batch: list[tuple[Any, ...]] = []

    async def __aenter__(self) -> SimPipeline:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._batch = []

    def hgetall(self, key: Any) -> None:
        self._batch.append(("HGETALL", key))

    def hmget(self, key: Any, names: Any) -> None:
        self._batch.append(("HMGET", key, *names))

    async def execute(self) -> list[Any]:
        return await self._run(self._batch)


def _fields(flat: list[bytes]) -> dict[bytes, bytes]:
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _settle(future: asyncio.Future[bool], has_changed: bool) -> None:
    if not future.done():
        future.set_result(has_changed)
