"""What goes along with a call between services: its span, and the job and REST request that it is made for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import grpc.aio
from structlog.contextvars import bind_contextvars, get_contextvars

from stillhouse.core import tracing

ALONG: Final = {"request_id": "x-request-id", "job_id": "x-job-id"}
"""Ids that are bound to log lines -> metadata: they are in the logs of both sides."""
PLAIN_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
"""What may be one: it comes from outside and goes into logs."""
Metadata = tuple[tuple[str, str], ...]


@contextmanager
def calling(method: str) -> Iterator[Metadata]:
    """Around a call of /package.Service/Method: the metadata to send with it.

    Its span is not the current one: a stream is read in turns with other work.
    """
    span = tracing.begin(method[1:], kind="client", attributes=_about(method)) if tracing.is_on() else tracing.NO_SPAN
    failed: BaseException | None = None
    try:
        yield _metadata(span)
    except BaseException as error:
        failed = error
        raise
    finally:
        if isinstance(failed, grpc.aio.AioRpcError):
            span.set({"rpc.grpc.status_code": failed.code().value[0]})
        span.end(failed)


def _metadata(span: tracing.Span) -> Metadata:
    bound = get_contextvars()
    along = {key: str(bound[name]) for name, key in ALONG.items() if bound.get(name)}
    if traceparent := span.traceparent or tracing.traceparent():
        along[tracing.HEADER] = traceparent
    return tuple(along.items())


@contextmanager
def serving(method: str, metadata: Mapping[str, Any]) -> Iterator[None]:
    """Around the work on a call, in a task of its own: its span, and the ids in every log line."""
    given = {name: str(metadata.get(key, "")) for name, key in ALONG.items()}
    bind_contextvars(**{name: value for name, value in given.items() if PLAIN_ID.fullmatch(value)})
    parent = str(metadata.get(tracing.HEADER, ""))
    span = tracing.NO_SPAN
    if tracing.is_on():
        span = tracing.begin(method[1:], kind="server", parent=parent, attributes=_about(method))
    tracing.go_on_under(span.traceparent or parent)
    failed: BaseException | None = None
    try:
        yield
    except BaseException as error:
        failed = error
        raise
    finally:
        span.end(failed)


def _about(method: str) -> dict[str, Any]:
    """OpenTelemetry's attributes of a call."""
    _, service, name = method.split("/")
    return {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name}
