"""Waiting on conditions: in place of sleeping."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable
from typing import Any


async def wait_until(condition: Callable[[], Any], *, timeout_s: float, what: str) -> Any:
    """Poll `condition` (sync or async) until it is true; its value is returned.

    Raises:
        AssertionError: says what never happened.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if inspect.isawaitable(value):
            value = await value
        if value:
            return value
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s for {what}"
        await asyncio.sleep(0.02)
