"""Ending asyncio tasks for certain."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any, Final

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
