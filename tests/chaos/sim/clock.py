"""Virtual time: an event loop that jumps to its next timer, and one order of events per seed.

Nothing in it waits, so an hour of leases and time-outs takes milliseconds. What other threads would do runs inline
(`run_in_executor`), after a drawn delay, so that there is one thread and one order.
"""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import random
import secrets
import selectors
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, Final

START_S: Final = 4_000_000_000.0
"""time.time() at the start: later than any real date, so that whatever the end finds on disk is older than the end."""
COMPUTE_S: Final = (0.0005, 0.02)
"""Shortest and longest time that work in a thread takes."""


class Clock:
    """Seconds since the start of the run."""

    def __init__(self) -> None:
        self.now = 0.0

    def time(self) -> float:
        return START_S + self.now

    def monotonic(self) -> float:
        return 1000.0 + self.now


class _Jump(selectors.BaseSelector):
    """Waits for nothing: where a loop would sleep, the clock jumps."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise RuntimeError("the simulation waits for something that nobody does")
        if timeout > 0:
            self._clock.now += timeout
        return []

    def register(self, fileobj: Any, events: int, data: Any = None) -> Any:
        return None

    def unregister(self, fileobj: Any) -> Any:
        return None

    def get_map(self) -> Any:
        return {}

    def close(self) -> None:
        return


class SimTask(asyncio.Task[Any]):
    """A task whose hash is a number, so that sets of tasks have the same order in every run."""

    def __init__(self, number: int, coro: Any, *, loop: Any, context: Any, name: Any = None) -> None:
        self._number = number
        super().__init__(coro, loop=loop, context=context, name=name)

    def __hash__(self) -> int:
        return self._number


class SimLoop(asyncio.SelectorEventLoop):
    """An event loop in virtual time. `on_task` sees every task and its context."""

    def __init__(self, clock: Clock, draw: random.Random) -> None:
        self._clock = clock
        self._draw = draw
        self._numbers = itertools.count(1)
        super().__init__(_Jump(clock))
        self.on_task: Callable[[SimTask, contextvars.Context], None] = lambda task, context: None
        make: Any = self._make_task
        self.set_task_factory(make)
        self.set_exception_handler(lambda loop, context: None)

    def time(self) -> float:
        return self._clock.now

    def _write_to_self(self) -> None:
        return  # nobody sleeps

    def _make_task(self, loop: Any, coro: Coroutine[Any, Any, Any], context: Any = None, **_: Any) -> SimTask:
        context = context if context is not None else contextvars.copy_context()
        task = SimTask(next(self._numbers), coro, loop=loop, context=context)
        self.on_task(task, context)
        return task

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        """`func(*args)` as one step at a drawn moment; its result arrives at another."""
        future: asyncio.Future[Any] = self.create_future()
        self.call_later(self._draw.uniform(*COMPUTE_S), self._compute, future, func, args)
        return future

    def _compute(self, future: asyncio.Future[Any], func: Callable[..., Any], args: tuple[Any, ...]) -> None:
        if future.cancelled():
            return
        try:
            outcome: tuple[bool, Any] = (True, func(*args))
        except BaseException as error:
            outcome = (False, error)
        self.call_later(self._draw.uniform(*COMPUTE_S), _arrive, future, outcome)


def _arrive(future: asyncio.Future[Any], outcome: tuple[bool, Any]) -> None:
    if future.done():
        return
    is_good, value = outcome
    if is_good:
        future.set_result(value)
    else:
        future.set_exception(value)


@contextmanager
def virtual_time(clock: Clock, draw: random.Random) -> Iterator[SimLoop]:
    """Time and chance of this process are those of the simulation; put back at the end."""
    real = time.time, time.monotonic, secrets.token_hex, random.getstate()
    time.time, time.monotonic = clock.time, clock.monotonic
    secrets.token_hex = lambda nbytes=None: f"{draw.getrandbits(8 * (nbytes or 32)):0{2 * (nbytes or 32)}x}"
    random.seed(draw.getrandbits(64))
    loop = SimLoop(clock, draw)
    try:
        yield loop
    finally:
        time.time, time.monotonic, secrets.token_hex = real[:3]
        random.setstate(real[3])
        loop.close()
