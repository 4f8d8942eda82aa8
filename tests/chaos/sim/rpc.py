"""Calls between simulated processes: the real servicers, called over a network that may fail.

As core/rpc.py: typed errors cross, a dead process is UNAVAILABLE, a frozen one lets the deadline pass.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from typing import Any

from stillhouse.core.errors import DeadlineError, StillhouseError, UnavailableError
from tests.chaos.sim.process import Process, pass_gate

LATENCY_S = (0.0002, 0.003)


class Network:
    """Who can be called."""

    def __init__(self, draw: random.Random, trace: Callable[..., None]) -> None:
        self.draw = draw
        self.trace = trace
        self.processes: dict[str, Process] = {}
        """By address."""
        self.lost = 0.0
        """Probability that a call finds nobody."""
        self.num_calls = 0

    def find(self, address: str, what: str) -> Process:
        process = self.processes.get(address)
        if process is None or process.is_dead:
            raise UnavailableError(f"{what}: connection refused by the simulation")
        if self.lost and self.draw.random() < self.lost:
            raise UnavailableError(f"{what}: call lost by the simulation")
        return process


class SimServer:
    """`core.rpc.Server` without a network: keeps the servicers of its process."""

    def __init__(self, process: Process) -> None:
        self._process = process

    def add(self, register: Any, servicer: Any, full_name: str) -> None:
        self._process.services[full_name.rpartition(".")[2]] = servicer

    async def start(self) -> str:
        return self._process.address

    async def set_ready(self, is_ready: bool) -> None:
        return

    async def stop(self, grace_s: float) -> None:
        self._process.services.clear()


class SimPeers:
    """`core.rpc.Peers`."""

    def __init__(self, network: Network) -> None:
        self._network = network

    def get(self, address: str, stub_class: type, what: str) -> SimPeer:
        return SimPeer(self._network, address, stub_class.__name__.removesuffix("Stub"), what)

    async def close(self) -> None:
        return


class SimPeer:
    """`core.rpc.Peer`."""

    def __init__(self, network: Network, address: str, service: str, what: str) -> None:
        self._network = network
        self._address = address
        self._service = service
        self.what = what

    async def unary(self, method: str, request: Any, *, timeout_s: float, retry_s: float = 0.0) -> Any:
        assert retry_s == 0.0, "nobody asks for it"
        return await anext(aiter(self.stream(method, request, timeout_s=timeout_s)))

    async def stream(self, method: str, request: Any, *, timeout_s: float) -> AsyncIterator[Any]:
        what = f"{self.what} {method}"
        await self._delay()
        callee = self._network.find(self._address, what)
        self._network.num_calls += 1
        self._network.trace("rpc", what)
        parts: asyncio.Queue[Any] = asyncio.Queue()
        serving = callee.run(_serve(callee, self._service, method, _copy(request), parts))
        serving.add_done_callback(lambda _: parts.put_nowait(UnavailableError(f"{what}: broken off")))
        until = asyncio.get_running_loop().time() + timeout_s
        try:
            while True:
                try:
                    async with asyncio.timeout_at(until):
                        part = await parts.get()
                except TimeoutError:
                    raise DeadlineError(f"{what}: no answer within {timeout_s:g} s") from None
                await self._delay()
                if part is None:
                    return
                if isinstance(part, StillhouseError):
                    raise part
                yield part
        finally:
            serving.cancel()

    async def _delay(self) -> None:
        await pass_gate()
        await asyncio.sleep(self._network.draw.uniform(*LATENCY_S))
        await pass_gate()


async def _serve(callee: Process, service: str, method: str, request: Any, parts: asyncio.Queue[Any]) -> None:
    """Runs in the callee: answers, then None, or the error."""
    try:
        await callee.gate()
        servicer = callee.services.get(service)
        if servicer is None:
            raise UnavailableError(f"{service} {method}: connection refused by the simulation")
        answer = getattr(servicer, method)(request, None)
        if hasattr(answer, "__aiter__"):
            async for part in answer:
                await callee.gate()
                parts.put_nowait(_copy(part))
        else:
            part = await answer
            await callee.gate()
            parts.put_nowait(_copy(part))
        parts.put_nowait(None)
    except StillhouseError as error:
        parts.put_nowait(type(error)(error.message))
    except Exception as error:
        parts.put_nowait(StillhouseError(f"{method} failed: {type(error).__name__}"))


def _copy(message: Any) -> Any:
    return type(message).FromString(message.SerializeToString())
