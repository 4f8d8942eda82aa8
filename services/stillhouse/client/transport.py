"""HTTP, blocking or with asyncio, behind one interface; and how a blocking client runs asynchronous code.

Every method of the client is written once, as a coroutine over a `Transport`. `AsyncClient` awaits it over
`AsyncTransport`. `Client` runs it over `BlockingTransport`, whose coroutines block instead of suspending themselves, so
that one step of a coroutine is all of it: no event loop, no threads.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, Concatenate, Final, ParamSpec, Protocol, TypeVar

import httpx

from stillhouse.client.calls import Call
from stillhouse.client.target import Target

P = ParamSpec("P")
T = TypeVar("T")
BLOCK_BYTES: Final = 1 << 18
"""Bytes read at once from a file that is uploaded."""


class Stream(Protocol):
    """An answer that comes piece by piece."""

    response: httpx.Response

    async def read(self) -> None:
        """All of it, into `response`."""
        ...

    def lines(self) -> AsyncIterator[str]:
        """Its lines."""
        ...

    def blocks(self) -> AsyncIterator[bytes]:
        """Its bytes."""
        ...


class Transport(Protocol):
    """What the client needs of the world."""

    async def request(self, call: Call[Any], timeout_s: float) -> httpx.Response:
        """Send a call and take its answer whole."""
        ...

    def stream(self, call: Call[Any], timeout_s: float) -> AbstractAsyncContextManager[Stream]:
        """Send a call and take its answer as it comes."""
        ...

    async def sleep(self, seconds: float) -> None: ...

    async def work(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run what reads or writes disks, where it stops nobody else."""
        ...

    async def close(self) -> None: ...


class _AsyncStream:
    def __init__(self, response: httpx.Response) -> None:
        self.response = response

    async def read(self) -> None:
        await self.response.aread()

    def lines(self) -> AsyncIterator[str]:
        return self.response.aiter_lines()

    def blocks(self) -> AsyncIterator[bytes]:
        return self.response.aiter_bytes()


class AsyncTransport:
    """With asyncio."""

    def __init__(self, target: Target, transport: httpx.AsyncBaseTransport | None) -> None:
        self._http = httpx.AsyncClient(transport=transport, **target.options())

    async def request(self, call: Call[Any], timeout_s: float) -> httpx.Response:
        body = {} if call.file is None else {"content": self._file(call.file)}
        return await self._http.request(call.method, call.path, **body, **call.options(timeout_s))

    @asynccontextmanager
    async def stream(self, call: Call[Any], timeout_s: float) -> AsyncIterator[Stream]:
        async with self._http.stream(call.method, call.path, **call.options(timeout_s)) as response:
            yield _AsyncStream(response)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def work(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.to_thread(function, *args, **kwargs)

    async def close(self) -> None:
        await self._http.aclose()

    async def _file(self, path: Path) -> AsyncIterator[bytes]:
        with path.open("rb") as stream:
            while block := await asyncio.to_thread(stream.read, BLOCK_BYTES):
                yield block


class _BlockingStream:
    def __init__(self, response: httpx.Response) -> None:
        self.response = response

    async def read(self) -> None:
        self.response.read()

    async def lines(self) -> AsyncIterator[str]:
        for line in self.response.iter_lines():
            yield line

    async def blocks(self) -> AsyncIterator[bytes]:
        for block in self.response.iter_bytes():
            yield block


class BlockingTransport:
    """Without an event loop: nothing here ever suspends."""

    def __init__(self, target: Target, transport: httpx.BaseTransport | None) -> None:
        self._http = httpx.Client(transport=transport, **target.options())

    async def request(self, call: Call[Any], timeout_s: float) -> httpx.Response:
        if call.file is None:
            return self._http.request(call.method, call.path, **call.options(timeout_s))
        with call.file.open("rb") as body:
            return self._http.request(call.method, call.path, content=body, **call.options(timeout_s))

    @asynccontextmanager
    async def stream(self, call: Call[Any], timeout_s: float) -> AsyncIterator[Stream]:
        with self._http.stream(call.method, call.path, **call.options(timeout_s)) as response:
            yield _BlockingStream(response)

    async def sleep(self, seconds: float) -> None:
        time.sleep(seconds)  # noqa: ASYNC251 - see the top of the file

    async def work(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return function(*args, **kwargs)

    async def close(self) -> None:
        self._http.close()


def run(step: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that never suspends."""
    try:
        step.send(None)
    except StopIteration as done:
        return done.value
    step.close()
    raise RuntimeError("a callback of the blocking client awaits something; use AsyncClient for that")


class Blocking:
    """Base of what a blocking client consists of: it wraps its asynchronous twin."""

    def __init__(self, twin: Any) -> None:
        self._twin = twin


def blocking(method: Callable[Concatenate[Any, P], Coroutine[Any, Any, T]]) -> Callable[Concatenate[Any, P], T]:
    """A method of the asynchronous twin, blocking; with its parameters and its documentation."""

    @functools.wraps(method)
    def call(self: Blocking, *args: P.args, **kwargs: P.kwargs) -> T:
        return run(method(self._twin, *args, **kwargs))

    return call


def blocking_iterator(
    method: Callable[Concatenate[Any, P], AsyncIterator[T]],
) -> Callable[Concatenate[Any, P], Iterator[T]]:
    """The same of a method that gives one thing after the other."""

    @functools.wraps(method)
    def iterate(self: Blocking, *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        source: Any = method(self._twin, *args, **kwargs)
        try:
            while True:
                try:
                    item = run(source.__anext__())
                except StopAsyncIteration:
                    return
                yield item
        finally:
            run(source.aclose())

    signature = inspect.signature(method)
    given = str(signature.return_annotation).replace("AsyncIterator", "Iterator")
    iterate.__signature__ = signature.replace(return_annotation=given)  # type: ignore[attr-defined]
    return iterate
