"""What happens around every request, as plain ASGI: identity, authentication, limits, metrics, log, last-resort errors.

Plain ASGI and not Starlette's BaseHTTPMiddleware, because that one buffers streams and hides disconnects.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from contextlib import AbstractContextManager
from typing import Any, Final

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stillhouse.core import tracing
from stillhouse.core.calls import PLAIN_ID
from stillhouse.core.config import Settings
from stillhouse.core.errors import MediaTypeError, StillhouseError, TooLargeError
from stillhouse.core.metrics import HTTP_SECONDS
from stillhouse.gateway.auth import OPEN_PATHS, Authenticator, Caller
from stillhouse.gateway.limits import RateLimiter
from stillhouse.gateway.problems import problem_response

BODY_TIMEOUT_S: Final = 20.0
"""Time to send a JSON body: 1 MiB in 20 s is a slow phone; longer is somebody holding connections open."""
DRAIN_BYTES: Final = 8 << 20
"""Bytes read and dropped after a refused body, so that the client gets to read the answer instead of a reset."""
UPLOAD_PATH: Final = "/v1/files"
"""Streams its body to disk under a limit of its own."""
KEYS_PATH: Final = "/v1/keys"
"""Below it only administrators change anything."""
SAFE_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS"})
"""Methods that change nothing: the scope `read` is enough for them, all others need `write`."""
METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
"""Methods with a label of their own in the metrics; a client can send any word."""


class Edge:
    """Outermost layer: request id, authentication, rates, access log, metrics; only problem+json leaves on errors."""

    def __init__(self, app: ASGIApp, authenticator: Authenticator, rates: RateLimiter, log: Any) -> None:
        self._app = app
        self._authenticator = authenticator
        self._rates = rates
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        given = request.headers.get("x-request-id", "")
        request_id = given if PLAIN_ID.fullmatch(given) else f"req_{secrets.token_hex(8)}"
        scope.setdefault("state", {}).update(request_id=request_id, caller=Caller(""))
        status = 0

        async def send_tagged(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message.setdefault("headers", []).append((b"x-request-id", request_id.encode()))
                if span.traceparent:
                    message["headers"].append((tracing.HEADER.encode(), span.traceparent.encode()))
            await send(message)

        started = time.monotonic()
        with _span(scope, request, request_id) as span:
            try:
                authorization = request.headers.get("authorization", "")
                caller = self._authenticator.caller(scope["path"], authorization)
                scope["state"]["caller"] = caller
                is_write = scope["method"] not in SAFE_METHODS
                await self._rates.count(caller, is_write=is_write)
                caller.require(needed_scope(scope["path"]) if is_write else "read")
                await self._app(scope, receive, send_tagged)
            except (StillhouseError, HTTPException) as error:
                if status:
                    raise
                response = problem_response(error, scope["path"], request_id)
                if response.status_code == 500:
                    self._log.error("request failed", path=scope["path"], exc_info=error)
                await response(scope, receive, send_tagged)
            except Exception as error:  # the outermost task of a request
                self._log.exception("request crashed", path=scope["path"])
                if status:
                    raise
                await problem_response(error, scope["path"], request_id)(scope, receive, send_tagged)
            finally:
                self._record(scope, status, time.monotonic() - started, span)

    def _record(self, scope: Scope, status: int, seconds: float, span: tracing.Span) -> None:
        # the route's template, not the path: ids in a label would make one time series per job
        route = getattr(scope.get("route"), "path", "none")
        method = scope["method"] if scope["method"] in METHODS else "other"
        HTTP_SECONDS.labels(method, route, str(status)).observe(seconds)
        span.rename(f"{method} {route}" if route != "none" else method)
        span.set({"http.route": route, "http.response.status_code": status})
        if status >= 500:
            span.fail(str(status))
        if scope["path"] not in OPEN_PATHS or status >= 500:
            self._log.info(
                "request",
                method=scope["method"],
                path=scope["path"],
                status=status,
                seconds=round(seconds, 4),
                owner=scope["state"]["caller"].owner,
                key=scope["state"]["caller"].key,
            )


def needed_scope(path: str) -> str:
    """What changing something at a path takes. Said before the route is looked for: a key with less is told at once
    what it needs in the end."""
    return "admin" if path.startswith(KEYS_PATH) else "write"


def _span(scope: Scope, request: Request, request_id: str) -> AbstractContextManager[tracing.Span]:
    """The span of a request, and its id in every log line; probes have none."""
    parent = request.headers.get(tracing.HEADER, "")
    if scope["path"] in OPEN_PATHS or not tracing.is_on():
        return tracing.within(parent, request_id=request_id)
    method = scope["method"] if scope["method"] in METHODS else "_OTHER"
    about = {"http.request.method": method, "url.scheme": scope["scheme"], "url.path": scope["path"]}
    return tracing.span(method, kind="server", parent=parent, attributes=about, request_id=request_id)


class JsonBody:
    """Reads bodies before anything parses them: limited in size and time, JSON only. Uploads pass through."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._limit = int(settings.max_body_mib * (1 << 20))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_upload = scope["type"] == "http" and scope["path"] == UPLOAD_PATH
        if scope["type"] != "http" or is_upload or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        body = await read_limited(scope, receive, self._limit, "body", "max_body_mib")
        content_type = Request(scope).headers.get("content-type", "").partition(";")[0].strip().lower()
        if body and content_type != "application/json" and not content_type.endswith("+json"):
            raise MediaTypeError(
                f"the content type is '{content_type or 'not given'}'; send JSON with 'Content-Type: application/json'"
            )
        is_read = False

        async def replay() -> Message:
            nonlocal is_read
            if is_read:
                return await receive()
            is_read = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, send)


async def read_limited(scope: Scope, receive: Receive, limit: int, what: str, setting: str) -> bytes:
    """The whole body, at most `limit` bytes, chunked or not.

    Raises:
        TooLargeError: it is longer; names the limit and the setting.
        HTTPException: 408, it did not arrive within BODY_TIMEOUT_S.
    """
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            parts, size = [], 0
            await check_declared_length(scope, receive, limit, what, setting)
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return b""
                part = message.get("body", b"")
                size += len(part)
                if size > limit:
                    await drain(receive)
                    raise too_large(size, limit, what, setting)
                parts.append(part)
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError:
        raise HTTPException(408, f"the body did not arrive within {BODY_TIMEOUT_S:g} s") from None


async def check_declared_length(scope: Scope, receive: Receive, limit: int, what: str, setting: str) -> None:
    """Refuse by the Content-Length, before keeping anything.

    Raises:
        TooLargeError: names the limit and the setting.
    """
    headers = Request(scope).headers
    declared = headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        if "expect" not in headers:  # with "Expect: 100-continue" the client waits for our word and sends nothing
            await drain(receive)
        raise too_large(int(declared), limit, what, setting)


def too_large(size: int, limit: int, what: str, setting: str) -> TooLargeError:
    """The error for a body of `size` bytes or more."""
    hint = ""
    if what == "body":
        hint = "; upload prompts with POST /v1/files and name the file in data.file"
    return TooLargeError(
        f"the {what} has {size} bytes or more, the limit is {limit} (setting STILLHOUSE_{setting.upper()}){hint}"
    )


async def drain(receive: Receive) -> None:
    """Read and drop the rest of a body, up to DRAIN_BYTES."""
    dropped = 0
    while dropped < DRAIN_BYTES:
        message = await receive()
        dropped += len(message.get("body", b""))
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            return
