"""What is found out about a job before it trains: collected check by check, told to people, kept beside the artifacts.

A job's first claim makes the report; later ones find it and say nothing twice.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from stillhouse.core.blobs import sealed, unsealed, write_json
from stillhouse.core.errors import NotFoundError, PreflightError, SpecError, StillhouseError
from stillhouse.core.explain import Finding
from stillhouse.core.schemas import Check, Estimate, Preflight
from stillhouse.core.schemas.preflight import worst

T = TypeVar("T")
REFUSALS = (PreflightError, SpecError, NotFoundError)
"""What a check raises about the job."""
Tell = Callable[..., Awaitable[None]]
"""Takes (kind of event, message) and its level and data."""


class Report:
    """The checks of one job. Of a live pre-flight an error is one line of many; of any other job it is the end."""

    def __init__(self, path: Path, tell: Tell, *, is_live: bool) -> None:
        self.is_live = is_live
        self._path = path
        self._tell = tell
        self.checks: list[Check] = []
        self.estimate: Estimate | None = None
        self._known: set[str] = set()
        """Names of checks that an earlier claim has made."""

    def load(self) -> None:
        """Go on from the report of an earlier claim, if there is one. Blocks."""
        try:
            earlier = Preflight.model_validate(unsealed(self._path))
        except (NotFoundError, StillhouseError):  # a damaged one is made anew
            return
        if earlier.verdict != "error" and not self.is_live:
            self.checks, self.estimate = earlier.checks, earlier.estimate
            self._known = {check.name for check in earlier.checks}

    @property
    def is_known(self) -> bool:
        """An earlier claim has made the report."""
        return bool(self._known)

    def knows(self, name: str) -> bool:
        """An earlier claim has made this check."""
        return name in self._known

    async def look(self, name: str, proves: str, work: Callable[..., Awaitable[T] | T], *args: Any) -> T | None:
        """Make a check that raises what is wrong; gives what it gives. A plain function runs in a thread.

        Raises:
            PreflightError: it failed, and the job is no live pre-flight.
        """
        try:
            made: Any = work(*args) if inspect.iscoroutinefunction(work) else asyncio.to_thread(work, *args)
            result = await made
        except REFUSALS as error:
            await self.add(Check(name=name, verdict="error", message=error.message, param=error.param))
            if not self.is_live:
                raise
            return None
        if not any(check.name == name for check in self.checks):
            self.checks.append(Check(name=name, verdict="ok", message=proves))
        return result

    async def add(self, check: Check, *, event: str = "preflight.warning") -> None:
        """Take a check in; a warning is told, under the kind `event`."""
        if self.knows(check.name):
            return
        self.checks.append(check)
        if check.verdict == "warning":
            message = check.message + (f"; {check.fix}" if check.fix else "")
            await self._tell(event, message, level="warning", check=check.name)

    async def add_found(self, name: str, proves: str, findings: Iterable[Finding]) -> None:
        """A check that yields findings."""
        found = list(findings)
        for finding in found:
            verdict = "warning" if finding.is_warning else "error"
            facts = {"message": finding.message, "fix": finding.fix, "param": finding.param}
            await self.add(Check(name=name, verdict=verdict, evidence=dict(finding.evidence), **facts))
        if not found:
            await self.add(Check(name=name, verdict="ok", message=proves))

    def refuse(self) -> None:
        """End a job with an error in its report.

        Raises:
            PreflightError: says the first.
        """
        if not self.is_live and (wrong := next((c for c in self.checks if c.verdict == "error"), None)):
            raise PreflightError(f"{wrong.message}; {wrong.fix}" if wrong.fix else wrong.message, param=wrong.param)

    @property
    def has_errors(self) -> bool:
        return any(check.verdict == "error" for check in self.checks)

    def answer(self) -> Preflight:
        """As people get it."""
        return Preflight(is_live=self.is_live, verdict=worst(self.checks), checks=self.checks, estimate=self.estimate)

    def write(self) -> None:
        """Keep it beside the artifacts. Blocks."""
        write_json(self._path, sealed(self.answer().model_dump(mode="json")))
