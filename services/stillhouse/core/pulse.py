"""The pulse of a process: since when the work that runs now has made no progress.

A process beats once per unit of work: a sampler per token, a teacher per batch, a trainer per micro-batch. The
heartbeat tells others (`silent_s`), and a process whose work stands still for `hang_s` ends, so that it is started
again. A slow machine is no frozen one: what counts is time without progress, not the length of a call.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from stillhouse.core.errors import DeadlineError

LOOK_S: Final = 1.0
"""Time between looks of the watchdog."""
BULK: Final = 10
"""Calls that load or save whole models have so many times `hang_s`: 20 GiB on a slow disk beat once."""


class Pulse:
    """Progress of what a process computes, in its compute thread or in an engine process. Read by the event loop."""

    def __init__(self) -> None:
        self._since = 0.0
        self._running: dict[object, int] = {}
        """The patience of each piece of work that runs; usually there is one."""

    @contextmanager
    def work(self, patience: int = 1) -> Iterator[None]:
        """Work that runs; it may be silent for `patience` times `hang_s`."""
        me = object()
        self._since = time.monotonic()
        self._running[me] = patience
        try:
            yield
        finally:
            del self._running[me]
            self._since = time.monotonic()

    def beat(self) -> None:
        """What runs has made progress."""
        self._since = time.monotonic()

    def silent_s(self) -> float:
        """Seconds without progress of what runs; 0 when nothing runs."""
        return time.monotonic() - self._since if self._running else 0.0

    def is_hung(self, hang_s: float) -> bool:
        """What runs has been silent for longer than it may."""
        return self.silent_s() > hang_s * max([*self._running.values()], default=1)

    async def watch(self, what: str, hang_s: float) -> None:
        """Look until cancelled.

        Raises:
            DeadlineError: what runs is hung. A thread cannot be ended from outside, so the process has to.
        """
        while True:
            if self.is_hung(hang_s):
                raise DeadlineError(
                    f"the computation of {what} made no progress for {self.silent_s():.0f} s (setting hang_s "
                    f"{hang_s:g} s); the process ends, to be started again"
                )
            await asyncio.sleep(min(LOOK_S, hang_s / 4))
