"""What the workers of sampler and teacher share: the thread that computes, the loop that outlives its queue server."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

from stillhouse.core.pulse import Pulse
from stillhouse.core.queue.claims import QUEUE_ERRORS
from stillhouse.core.tasks import cancel_all

T = TypeVar("T")

BACKOFF_S: Final = 0.1
"""First pause after an error of the queue server; doubles."""
BACKOFF_MAX_S: Final = 2.0
"""Longest pause: a restarted server is found again within it."""


class ComputeThread:
    """The one thread that touches models. Calls run one after the other in the order they came, so nobody starves."""

    def __init__(self, name: str, pulse: Pulse | None = None) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name)
        self.pulse = pulse or Pulse()

    async def run(self, function: Callable[..., T], *args: Any, patience: int = 1) -> T:
        """`function(*args)` in the thread. It beats `pulse`, or ends, within `patience` times the setting hang_s."""

        def call() -> T:
            with self.pulse.work(patience):
                return function(*args)

        return await asyncio.get_running_loop().run_in_executor(self._pool, call)

    def close(self) -> None:
        """Drop calls that have not started."""
        self._pool.shutdown(wait=False, cancel_futures=True)


async def pause(stop: asyncio.Event, seconds: float) -> bool:
    """Wait until `stop` is set, at most `seconds`; True if it is set."""
    try:
        await asyncio.wait_for(stop.wait(), seconds)
    except TimeoutError:
        return False
    return True


async def unless(stopped: asyncio.Event, work: Coroutine[Any, Any, None]) -> bool:
    """Do `work`, but give it up when `stopped` is set first; True if it was done."""
    task, stop = asyncio.ensure_future(work), asyncio.ensure_future(stopped.wait())
    try:
        await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            return False
        task.result()
        return True
    finally:
        stop.cancel()
        await cancel_all([task])


async def run_turns(turn: Callable[[], Awaitable[None]], stop: asyncio.Event, log: Any) -> None:
    """Take turns until `stop`; errors of the queue server are logged and waited out, all others end the worker."""
    delay_s = BACKOFF_S
    while not stop.is_set():
        try:
            await turn()
            delay_s = BACKOFF_S
        except QUEUE_ERRORS as error:
            log.warning("queue server does not answer", error=str(error), retry_in_s=delay_s)
            await pause(stop, delay_s)
            delay_s = min(2 * delay_s, BACKOFF_MAX_S)
