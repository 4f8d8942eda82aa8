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


async def to_its_end(work: Coroutine[Any, Any, T]) -> T:
    """Do `work`, which must not stop half-way: a cancellation, or several, waits for its end and is raised then.

    An error of `work` is raised, cancelled or not. The deadline is that of `work`.
    """
    task, is_cancelled = asyncio.create_task(work), False
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            is_cancelled = True
    result = task.result()
    if is_cancelled:
        raise asyncio.CancelledError
    return result
