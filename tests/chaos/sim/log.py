"""What simulated processes log, and which errors are no surprise in a run with faults."""

from __future__ import annotations

import asyncio
import sys
import traceback
from collections.abc import Callable
from typing import Any

from stillhouse.core.blobs import is_no_space
from stillhouse.core.errors import DeadlineError, UnavailableError
from stillhouse.core.failpoints import InjectedError
from stillhouse.core.queue.claims import QUEUE_ERRORS
from tests.chaos.sim.process import SimulatedKill


def is_expected(error: BaseException | None) -> bool:
    """Errors that faults may end a process with."""
    if isinstance(error, BaseExceptionGroup):
        return all(is_expected(part) for part in error.exceptions)
    if isinstance(error, InjectedError | SimulatedKill | UnavailableError | DeadlineError | asyncio.CancelledError):
        return True
    return isinstance(error, QUEUE_ERRORS) or is_no_space(error)


class SimLog:
    """A logger of a process; what crashed for no injected reason is a violation."""

    def __init__(self, name: str, say: Callable[[str], None], violate: Callable[[str], None]) -> None:
        self._name = name
        self._write = say
        self._violate = violate

    def bind(self, **_: Any) -> SimLog:
        return self

    def _say(self, level: str, message: str, /, **values: Any) -> None:
        self._write(f"{self._name} {level} {message} {values}")

    def debug(self, message: str, /, **values: Any) -> None:
        return

    def info(self, message: str, /, **values: Any) -> None:
        self._say("info", message, **values)

    def warning(self, message: str, /, **values: Any) -> None:
        self._say("warning", message, **values)

    def error(self, message: str, /, **values: Any) -> None:
        self._say("error", message, **values)

    def exception(self, message: str, /, **values: Any) -> None:
        error = sys.exc_info()[1]
        self._say("exception", message, error=repr(error))
        if not is_expected(error):
            text = "".join(traceback.format_exception(error)[-6:])
            self._violate(f"crash: {self._name}: {message}: {error!r}\n{text}")
