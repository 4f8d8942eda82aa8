"""Simulated processes: each has a gate that all of its effects pass.

    running -> frozen -> running        effects wait
       |         |
       +---------+-> dead               effects raise SimulatedKill and do nothing: not even `finally` blocks tidy up

What a process is, is a context variable: tasks and callbacks inherit it.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Coroutine
from typing import Any, Final

PROCESS: Final[contextvars.ContextVar[Process | None]] = contextvars.ContextVar("process", default=None)


class SimulatedKill(BaseException):
    """The process is dead: nothing that it still tries happens."""


class Process:
    """One process of the deployment, one life long."""

    def __init__(self, name: str, role: str, trace: Callable[..., None]) -> None:
        self.name = name
        self.role = role
        self.is_dead = False
        self.tasks: set[asyncio.Task[Any]] = set()
        self.services: dict[str, Any] = {}
        """gRPC services by short name."""
        self.address = f"sim:{name}"
        self.ctx: Any = None
        self.main: asyncio.Task[Any] | None = None
        self.log: Any = None
        self._trace = trace
        self._thaw = asyncio.Event()
        self._thaw.set()
        self.died = asyncio.Event()

    @property
    def is_frozen(self) -> bool:
        return not self._thaw.is_set()

    def run(self, coro: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Start a task of this process."""
        return asyncio.get_running_loop().create_task(coro, context=self.context())  # type: ignore[call-arg]

    def context(self) -> contextvars.Context:
        context = contextvars.copy_context()
        context.run(PROCESS.set, self)
        return context

    async def gate(self) -> None:
        """Before and after every effect that may take time."""
        if self.is_dead:
            raise SimulatedKill(self.name)
        while self.is_frozen:
            await self._thaw.wait()
            if self.is_dead:
                raise SimulatedKill(self.name)

    def check(self) -> None:
        """Before every effect that is done at once."""
        if self.is_dead:
            raise SimulatedKill(self.name)

    def kill(self) -> None:
        """As SIGKILL does."""
        if self.is_dead:
            return
        self._trace("kill", self.name)
        self.is_dead = True
        self._thaw.set()
        self.died.set()
        asyncio.get_running_loop().create_task(self._reap(), context=contextvars.Context())  # type: ignore[call-arg]

    def freeze(self, seconds: float) -> None:
        """As SIGSTOP does, and SIGCONT after a while."""
        if self.is_dead or self.is_frozen:
            return
        self._trace("freeze", self.name, round(seconds, 3))
        self._thaw.clear()
        asyncio.get_running_loop().call_later(seconds, self.thaw, context=contextvars.Context())

    def thaw(self) -> None:
        if self.is_frozen:
            self._trace("thaw", self.name)
            self._thaw.set()

    async def _reap(self) -> None:
        """Cancel what is left until nothing is."""
        while left := {task for task in self.tasks if not task.done()}:
            for task in left:
                task.cancel()
            await asyncio.wait(left, timeout=0.5)


def current() -> Process | None:
    """The process that runs now; None = the simulation itself."""
    return PROCESS.get()


async def pass_gate() -> None:
    """The gate of the process that runs now."""
    process = PROCESS.get()
    if process is not None:
        await process.gate()


def check_alive() -> None:
    """As `pass_gate`, for effects that are done at once."""
    process = PROCESS.get()
    if process is not None:
        process.check()
