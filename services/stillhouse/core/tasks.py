"""Ending asyncio tasks for certain."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, Final, TypeVar

T = TypeVar("T")

AGAIN_S: Final = 0.5
"""Time between cancellations of the same task."""


async def cancel_all(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel the tasks and wait until they have ended; their exceptions are dropped.

    Cancels again until it works: `asyncio.wait_for` of Python 3.11 swallows a cancellation that arrives together with
    its result (python/cpython#86296), and redis-py awaits every command in one. A loop around it would go on for ever.
    """
    pending = {task for task in tasks if not task.done()}
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=AGAIN_S)


END_S = 10.0
"""What was cancelled and should go to its end is given up after so long: who it waits for hangs."""


async def to_its_end(work: Coroutine[Any, Any, T]) -> T:
    """Do `work`, which must not stop half-way: a cancellation, or several, waits for its end, at most END_S, and is
    raised then.

    An error of `work` is raised, cancelled or not. The deadline is that of `work`.
    """
    loop = asyncio.get_running_loop()
    task, give_up_at = asyncio.create_task(work), None
    while not task.done():
        try:
            await asyncio.wait([task], timeout=None if give_up_at is None else max(0.0, give_up_at - loop.time()))
        except asyncio.CancelledError:
            give_up_at = give_up_at or loop.time() + END_S
        if give_up_at is not None and loop.time() >= give_up_at and not task.done():
            task.cancel()
            raise asyncio.CancelledError
    result = task.result()
    if give_up_at is not None:
        raise asyncio.CancelledError
    return result
