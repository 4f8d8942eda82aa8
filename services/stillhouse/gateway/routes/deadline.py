"""Routes that answer in time or say that they cannot."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Final

from fastapi import HTTPException, Request, Response
from fastapi.routing import APIRoute

REQUEST_TIMEOUT_S: Final = 20.0
"""Time to make an answer: twice what the queue server's restart may take. Sending a stream does not count."""

HINT: Final = "what was asked for may be done all the same: try again, to create a job with the same Idempotency-Key"


class DeadlineRoute(APIRoute):
    """A route whose handler has REQUEST_TIMEOUT_S; then the caller gets a 503 instead of silence."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def limited(request: Request) -> Response:
            deadline = asyncio.timeout(REQUEST_TIMEOUT_S)
            try:
                async with deadline:
                    return await handler(request)
            except TimeoutError:
                if not deadline.expired():
                    raise
                raise HTTPException(503, f"the answer took longer than {REQUEST_TIMEOUT_S:g} s; {HINT}") from None

        return limited
