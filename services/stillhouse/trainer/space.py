"""Waiting for room: a full disk or a full queue server stalls a job with a reason, and it goes on by itself.

    working -> no room: tried again after 1 s, 2 s, .. 10 s, the job says `stalled` and why -> working
                   |
                   +-> asked to cancel or drain: `Interrupted`; what is not durable yet was not trained either

What is tried again must be whole or not at all: journals, checkpoints, exports and evaluations are.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, TypeVar

from redis.exceptions import OutOfMemoryError

from stillhouse.core.blobs import is_no_space
from stillhouse.trainer.loop import Interrupt, Interrupted

T = TypeVar("T")

FIRST_PAUSE_S: Final = 1.0
"""Pause before the second try; doubles."""
LONGEST_PAUSE_S: Final = 10.0
"""A job goes on at the latest so long after there is room again."""
NO_SPACE: Final = "no_space"
QUEUE_FULL: Final = "queue_full"


class Space:
    """Room on the artifacts' disk and on the queue server, as one claim of a job finds it."""

    def __init__(self, folder: Path, interrupt: Interrupt, log: Any, *, first_pause_s: float = FIRST_PAUSE_S) -> None:
        self._folder = folder
        self.interrupt = interrupt
        self._log = log
        self._first_pause_s = first_pause_s
        self._trouble: tuple[str, str] | None = None

    def trouble(self) -> tuple[str, str] | None:
        """(reason, message) of what the job waits for; None if it waits for no room."""
        return self._trouble

    async def insist(
        self, what: str, work: Callable[[], Awaitable[T]], needed: Callable[[], int | None] = lambda: None
    ) -> T:
        """Do `work`, again and again while there is no room for it; `needed` estimates its bytes.

        Raises:
            Interrupted: asked to stop while waiting.
            OSError: asked to stop already, and there is no room.
        """
        pause_s, started = self._first_pause_s, time.monotonic()
        while True:
            try:
                result = await work()
            except Exception as error:
                reason = _reason(error)
                if reason is None or self.interrupt.reason:
                    raise
                self._say(reason, what, needed)
                self._log.error("no room", what=what, reason=reason, error=str(error), retry_in_s=pause_s)
            else:
                if self._trouble is not None:
                    self._log.info("there is room again", what=what, waited_s=round(time.monotonic() - started, 1))
                self._trouble = None
                return result
            try:
                await self.interrupt.race(asyncio.sleep(pause_s))
            except Interrupted:
                self._trouble = None
                raise
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _say(self, reason: str, what: str, needed: Callable[[], int | None]) -> None:
        if reason == QUEUE_FULL:
            message = f"the queue server has no memory for {what}: raise its maxmemory, or finish or cancel other jobs"
        else:
            num_bytes = needed()
            wants = "" if num_bytes is None else f", {num_bytes} needed"
            message = f"no space for {what} in {self._folder}: {_free_bytes(self._folder)} bytes free{wants}; free some"
        self._trouble = (reason, f"{message}; the job goes on by itself")


def _reason(error: BaseException) -> str | None:
    if isinstance(error, OutOfMemoryError):
        return QUEUE_FULL
    return NO_SPACE if is_no_space(error) else None


def _free_bytes(folder: Path) -> int:
    """Bytes that are free for this user; a quota may allow less."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free
