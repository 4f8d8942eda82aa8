"""Traces: one job from its request over the queue to its weights. OpenTelemetry's, and off unless asked for.

A *span* is a piece of work with a name, a beginning and an end. Those of one trace hang together by a W3C
`traceparent`, which goes along with whatever asks for work: the header of a request, the metadata of a call, the record
of a job, a prompt group, a rollout. Work on several of them at once has *links* to each.

    with tracing.span("score", links=[...], job_id=job_id) as span:      # a child of the span around it
        ... span.set({"stillhouse.tokens": 12})

`OTEL_EXPORTER_OTLP_ENDPOINT` switches it on (`start`); otherwise nothing of opentelemetry is imported and `span` only
binds its ids to the log lines written within, which it does in any case. Nothing here ever raises into the work: what
cannot be delivered is lost, with one warning. Never in a span: prompts, completions, credentials, texts of errors.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import re
import secrets
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.metadata import version
from typing import Any, Final

from structlog.contextvars import bind_contextvars, bound_contextvars, get_contextvars

ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
"""Either of them switches traces on."""
IDS: Final = ("job_id", "epoch", "step", "group", "sample_id", "request_id")
"""What log lines and spans are about: bound to the one, they are attributes `stillhouse.<id>` of the other."""
HEADER: Final = "traceparent"
_PROMPTS: Final = {"messaging.system": "redis", "messaging.destination.name": "prompts"}
SENT_PROMPTS: Final = {**_PROMPTS, "messaging.operation.type": "send"}
TAKEN_PROMPTS: Final = {**_PROMPTS, "messaging.operation.type": "process"}
STOP_S: Final = 2.0
"""A process that ends waits so long for its last spans to be delivered."""
_PARENT: Final = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})")


class Span:
    """A span as the code sees it; this one is not recorded, and is all that others know of a span elsewhere."""

    def __init__(self, traceparent: str = "") -> None:
        self.traceparent = traceparent
        """Names it to others; '' = there is none."""

    def set(self, attributes: Mapping[str, Any]) -> None:
        """Say more about it."""

    def rename(self, name: str) -> None:
        """Give it the name that is known only now."""

    def event(self, name: str, attributes: Mapping[str, Any] | None = None) -> None:
        """Note that something happened in it."""

    def link(self, traceparent: str) -> None:
        """It has to do with a span elsewhere."""

    def fail(self, kind: str) -> None:
        """What it is about has failed; `kind` is a class of errors, not their text."""

    def end(self, error: BaseException | None = None) -> None:
        """It is over; by an error, of which only the class is kept."""


NO_SPAN: Final = Span()
_current: ContextVar[Span] = ContextVar("span", default=NO_SPAN)
_provider: Any = None
"""OpenTelemetry's TracerProvider; None = traces are off."""
_tracer: Any = None


class _Recorded(Span):
    """A span that is delivered."""

    def __init__(self, otel: Any) -> None:
        context = otel.get_span_context()
        super().__init__(f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}")
        self._otel = otel

    def set(self, attributes: Mapping[str, Any]) -> None:
        self._otel.set_attributes(attributes)

    def rename(self, name: str) -> None:
        self._otel.update_name(name)

    def event(self, name: str, attributes: Mapping[str, Any] | None = None) -> None:
        self._otel.add_event(name, attributes)

    def link(self, traceparent: str) -> None:
        if context := _context(traceparent):
            self._otel.add_link(context)

    def fail(self, kind: str) -> None:
        from opentelemetry.trace import StatusCode

        self._otel.set_attribute("error.type", kind)
        self._otel.set_status(StatusCode.ERROR)

    def end(self, error: BaseException | None = None) -> None:
        if error is not None and not _is_a_stop(error):
            self.fail(type(error).__name__)
        self._otel.end()


def _is_a_stop(error: BaseException) -> bool:
    """Somebody asked the work to end, which is no failure of it."""
    return isinstance(error, asyncio.CancelledError | GeneratorExit) or getattr(error, "is_a_stop", False)


# -- spans -------------------------------------------------------------------------------------------------------------


def begin(
    name: str,
    *,
    kind: str = "internal",
    parent: str = "",
    links: Iterable[str] = (),
    attributes: Mapping[str, Any] | None = None,
) -> Span:
    """A span that is not around anything: whoever begins it ends it. See `span`."""
    if _tracer is None:
        return NO_SPAN
    from opentelemetry.context import Context
    from opentelemetry.trace import Link, NonRecordingSpan, SpanKind, set_span_in_context

    # one link for each, in order: many samples of a batch have come from the same span
    linked = [context for link in dict.fromkeys(links) if (context := _context(link))]
    above = _context(parent) or _context(_current.get().traceparent) or (linked[0] if linked else None)
    bound = get_contextvars()
    return _Recorded(
        _tracer.start_span(
            name,
            context=set_span_in_context(NonRecordingSpan(above), Context()) if above else Context(),
            kind=SpanKind[kind.upper()],
            attributes={**{f"stillhouse.{each}": bound[each] for each in IDS if each in bound}, **(attributes or {})},
            links=[Link(context) for context in linked],
        )
    )


@contextmanager
def span(
    name: str,
    *,
    kind: str = "internal",
    parent: str = "",
    links: Iterable[str] = (),
    attributes: Mapping[str, Any] | None = None,
    **ids: Any,
) -> Iterator[Span]:
    """Work on what `ids` (see IDS) name: a span, if traces are on, and the ids in every log line within.

    Its parent is the span named by `parent`, else the one around it, else the first of `links`. `kind` is
    OpenTelemetry's: internal, server, client, producer or consumer.
    """
    if _tracer is None:
        with bound_contextvars(**ids):
            yield NO_SPAN
        return
    with bound_contextvars(**ids):
        made = begin(name, kind=kind, parent=parent, links=links, attributes=attributes)
        error: BaseException | None = None
        try:
            with _as_current(made):
                yield made
        except BaseException as raised:
            error = raised
            raise
        finally:
            made.end(error)


@contextmanager
def within(traceparent: str, **ids: Any) -> Iterator[Span]:
    """Work on what `ids` name, under a span that is elsewhere ('' = none), and without one of its own."""
    with bound_contextvars(**ids):
        if not _PARENT.fullmatch(traceparent):
            yield NO_SPAN
            return
        with _as_current(Span(traceparent)):
            yield NO_SPAN


@contextmanager
def _as_current(made: Span) -> Iterator[None]:
    token = _current.set(made)
    try:
        with bound_contextvars(**_log_ids(made)):
            yield
    finally:
        _current.reset(token)


def go_on_under(traceparent: str) -> None:
    """From here to its end the task works under that span ('' = none).

    For what may be closed from another task than it ran in, as streams are: there nothing can be put back.
    """
    if _PARENT.fullmatch(traceparent):
        made = Span(traceparent)
        _current.set(made)
        bind_contextvars(**_log_ids(made))


def _log_ids(made: Span) -> dict[str, str]:
    return {"trace_id": made.traceparent[3:35], "span_id": made.traceparent[36:52]}


def is_on() -> bool:
    """Spans are recorded."""
    return _tracer is not None


def traceparent() -> str:
    """Names the span that we are in, for whoever is asked for something; '' = there is none."""
    return _current.get().traceparent


def current() -> Span:
    """The span that we are in."""
    return _current.get()


def _context(traceparent: str) -> Any:
    """OpenTelemetry's SpanContext; None for what is no traceparent: it may come from anybody."""
    from opentelemetry.trace import SpanContext, TraceFlags

    found = _PARENT.fullmatch(traceparent)
    if found is None:
        return None
    trace_id, span_id, flags = (int(part, 16) for part in found.groups())
    return SpanContext(trace_id, span_id, is_remote=True, trace_flags=TraceFlags(flags & 1))


# -- delivery ----------------------------------------------------------------------------------------------------------


def start(service: str, instance: str, log: Any) -> None:
    """Deliver this process's spans by OTLP over HTTP, if the environment asks for it. Once per process."""
    env = os.environ
    is_wanted = any(env.get(name) for name in ENDPOINTS) and env.get("OTEL_TRACES_EXPORTER", "otlp") != "none"
    if not is_wanted or env.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return
    try:
        use(_otlp_provider(service, instance, log))
    except ImportError as error:
        log.warning("traces are off: install the extra stillhouse[otel]", missing=error.name)
    except Exception as error:  # whatever is wrong with them, jobs run; a wrong setting may quote a credential
        log.warning(
            "traces are off: opentelemetry did not start; check the OTEL_* variables", error=type(error).__name__
        )
    else:
        atexit.register(stop)


def _otlp_provider(service: str, instance: str, log: Any) -> Any:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    protocols = [os.environ.get(f"OTEL_EXPORTER_OTLP_{kind}PROTOCOL") for kind in ("TRACES_", "")]
    protocol = next((each for each in protocols if each), "http/protobuf")
    if protocol != "http/protobuf":
        log.warning("traces are sent by OTLP over HTTP: OTEL_EXPORTER_OTLP_PROTOCOL is ignored", protocol=protocol)
    # the library complains at every batch; _Told says it once
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL + 1)
    about = {
        "service.namespace": "stillhouse",
        "service.instance.id": instance,
        "service.version": version("stillhouse"),
    }
    if not os.environ.get("OTEL_SERVICE_NAME"):
        about["service.name"] = service
    provider = make_provider(Resource.create(about))
    provider.add_span_processor(BatchSpanProcessor(_Told(OTLPSpanExporter(), log)))  # pyright: ignore[reportArgumentType]
    return provider


def make_provider(resource: Any = None) -> Any:
    """A TracerProvider whose ids come from the system.

    OpenTelemetry's own draws them from `random`, which jobs seed: every claim of a job would give its spans the same
    ids, and a deterministic job would draw other numbers with traces than without.
    """
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.id_generator import RandomIdGenerator

    class SystemIds(RandomIdGenerator):
        def generate_span_id(self) -> int:
            return secrets.randbits(64) or 1

        def generate_trace_id(self) -> int:
            return secrets.randbits(128) or 1

    return TracerProvider(resource=resource, id_generator=SystemIds(), shutdown_on_exit=False)


class _Told:
    """A span exporter that says once that spans are lost, and once that they are delivered again."""

    def __init__(self, exporter: Any, log: Any) -> None:
        self._exporter = exporter
        self._log = log
        self._is_failing = False

    def export(self, spans: Any) -> Any:
        from opentelemetry.sdk.trace.export import SpanExportResult

        try:
            result = self._exporter.export(spans)
        except Exception:  # a thread of its own: nobody above it would learn of it
            result = SpanExportResult.FAILURE
        is_failing = result is not SpanExportResult.SUCCESS
        if is_failing and not self._is_failing:
            self._log.warning("traces are lost: no collector takes them at OTEL_EXPORTER_OTLP_ENDPOINT; jobs go on")
        elif self._is_failing and not is_failing:
            self._log.info("traces are delivered again")
        self._is_failing = is_failing
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return bool(self._exporter.force_flush(timeout_millis))


def use(provider: Any) -> None:
    """Give spans to a TracerProvider from now on; None = to nobody."""
    global _provider, _tracer
    _provider = provider
    _tracer = None if provider is None else provider.get_tracer("stillhouse", version("stillhouse"))


def stop() -> None:
    """Deliver what is left, at most for STOP_S, and be off."""
    provider = _provider
    use(None)
    if provider is not None:
        last = threading.Thread(target=provider.shutdown, name="last spans", daemon=True)
        last.start()
        last.join(STOP_S)
