"""Sends calls, and sends those again that did not get through."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeVar

import httpx

from stillhouse.client import calls
from stillhouse.client.calls import Call
from stillhouse.client.errors import ApiError, read_error
from stillhouse.client.target import Target
from stillhouse.client.transport import Stream, Transport
from stillhouse.core.errors import StillhouseError, UnavailableError
from stillhouse.core.schemas import Page

T = TypeVar("T")
RETRIES: Final = 5
"""Repeats of a call that did not get through: with the pauses of calls.py about 8 s, what a restart of the gateway
takes."""
TIMEOUT_S: Final = 60.0
ASKED_MAX_S: Final = 60.0
"""Longest pause that the gateway may ask for (Retry-After); for a longer one the caller gets the error, and decides."""
OUTAGE_S: Final = 600.0
"""So long those who follow a job wait for a gateway that had answered: no restart takes ten minutes."""


@dataclass(frozen=True, slots=True)
class Options:
    """How patient a client is."""

    timeout_s: float = TIMEOUT_S
    """Longest silence of the gateway during an answer."""
    retries: int = RETRIES
    """Repeats of a call."""
    deadline_s: float | None = None
    """For a call with all its repeats; None = what timeout and repeats come to."""


@dataclass(slots=True)
class Patience:
    """Counts what is left of it."""

    retries: int
    ends_at: float | None
    """Monotonic time; None = no end."""
    attempt: int = 0

    def left_s(self, timeout_s: float) -> float:
        """The timeout of the next attempt."""
        return timeout_s if self.ends_at is None else min(timeout_s, self.ends_at - time.monotonic())

    def pause_s(self, error: StillhouseError) -> float | None:
        """Pause before the next attempt, never shorter than the gateway asks for; None = there is none."""
        asked = error.retry_after_s or 0.0 if isinstance(error, ApiError) else 0.0
        pause = max(calls.pause_s(self.attempt), asked)
        is_late = self.ends_at is not None and time.monotonic() + pause >= self.ends_at
        if self.attempt >= self.retries or asked > ASKED_MAX_S or is_late:
            return None
        self.attempt += 1
        return pause


@dataclass(frozen=True, slots=True)
class Sender:
    """The way to a gateway. Has no state that calls could disturb in each other: threads may share it."""

    transport: Transport
    target: Target
    options: Options = field(default_factory=Options)

    def with_options(self, **changes: Any) -> Sender:
        """With other patience, over the same connections."""
        return replace(self, options=replace(self.options, **changes))

    def patience(self) -> Patience:
        """For one call."""
        deadline_s = self.options.deadline_s
        return Patience(self.options.retries, None if deadline_s is None else time.monotonic() + deadline_s)

    def outage(self) -> Patience:
        """For those who wait for a gateway that had answered before."""
        return Patience(10**9 if self.options.retries else 0, time.monotonic() + OUTAGE_S)

    async def send(self, call: Call[T]) -> T:
        """The answer.

        Raises:
            ApiError: the gateway refused.
            UnavailableError: it does not answer.
        """
        patience, is_repeat = self.patience(), False
        while True:
            try:
                response = await self.transport.request(call, patience.left_s(self.timeout_s(call)))
                return self.read(call, response)
            except httpx.TransportError as error:
                problem: StillhouseError = self.target.unreachable(error)
                was_sent = not isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout))
                if was_sent and not call.may_repeat:
                    raise _uncertain(call, problem) from None
                is_repeat |= was_sent
            except ApiError as error:
                error.is_repeat = is_repeat
                if error.status not in call.retry_status:
                    raise
                problem = error
            await self.again(patience, problem)

    async def again(self, patience: Patience, problem: StillhouseError) -> None:
        """Pause before another attempt; raises the problem if there is none."""
        pause = patience.pause_s(problem)
        if pause is None:
            raise problem from None
        await self.transport.sleep(pause)

    def timeout_s(self, call: Call[Any]) -> float:
        """Longest silence during its answer."""
        return call.timeout_s or self.options.timeout_s

    def read(self, call: Call[T], response: httpx.Response) -> T:
        """What an answer says.

        Raises:
            ApiError: it is not a good one.
        """
        if response.is_success:
            try:
                return call.read(response)
            except ValueError:
                pass  # a page of some proxy
        raise read_error(response)

    async def pages(self, call: Call[Page[T]], *, limit: int | None = None) -> AsyncIterator[T]:
        """All entries of a list behind each other, page by page as they are needed, at most `limit`."""
        given = 0
        while limit is None or given < limit:
            if limit is not None:
                size = min(call.params["limit"], limit - given)
                call = replace(call, params={**call.params, "limit": size})
            page = await self.send(call)
            for item in page.data:
                yield item
            given += len(page.data)
            if not page.has_more or not page.data:
                return
            call = call.after(page.data[-1]["id"])  # type: ignore[index]

    @asynccontextmanager
    async def stream(self, call: Call[Any], patience: Patience | None = None) -> AsyncIterator[Stream]:
        """An answer that comes piece by piece, once.

        Raises:
            ApiError: the gateway refused; also UnavailableError, where it does not answer or stops in the middle.
        """
        timeout_s = self.timeout_s(call)
        try:
            async with self.transport.stream(call, patience.left_s(timeout_s) if patience else timeout_s) as stream:
                if not stream.response.is_success:
                    await stream.read()
                    raise read_error(stream.response)
                yield stream
        except httpx.TransportError as error:
            raise self.target.unreachable(error) from None


def is_passing(error: StillhouseError) -> bool:
    """Trying again may cure it."""
    return isinstance(error, UnavailableError) or (isinstance(error, ApiError) and error.status in calls.RETRY_STATUS)


def _uncertain(call: Call[Any], problem: StillhouseError) -> UnavailableError:
    what = f"{call.method} {call.path}"
    return UnavailableError(f"{problem.message} ({what} may have been carried out: look before you repeat it)")
