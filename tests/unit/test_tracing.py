"""Spans without services: off costs nothing, a collector over HTTP gets them, one that is down is told of once."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
import structlog
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from structlog.contextvars import get_contextvars
from structlog.testing import capture_logs

from stillhouse.core import tracing

PARENT = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"


class Collector(HTTPServer):
    """Takes spans by OTLP over HTTP, as a collector or Jaeger does."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def spans(self) -> dict[str, Any]:
        return {
            span.name: (span, {a.key: a.value.string_value for a in resource.resource.attributes})
            for request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        }


class _Handler(BaseHTTPRequestHandler):
    server: Collector  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            import gzip

            body = gzip.decompress(body)
        assert self.path == "/v1/traces"
        self.server.requests.append(ExportTraceServiceRequest.FromString(body))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    server = Collector()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("NO_PROXY", "*")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def off_again() -> Iterator[None]:
    yield
    tracing.stop()


def test_a_collector_gets_the_spans_of_a_process(collector: Collector) -> None:
    tracing.start("trainer", "trainer-7", structlog.get_logger())
    with tracing.span("step", parent=PARENT, job_id="job_1", step=3) as step, tracing.span("train"):
        pass
    with pytest.raises(ValueError, match="quoted"), tracing.span("bad"):
        raise ValueError("the prompt, quoted")
    tracing.stop()
    (span, resource), (child, _), (bad, _) = (collector.spans[name] for name in ("step", "train", "bad"))
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (PARENT[3:35], PARENT[36:52])
    assert child.parent_span_id == span.span_id
    assert step.traceparent == f"00-{span.trace_id.hex()}-{span.span_id.hex()}-01"
    assert {a.key: a.value.string_value or a.value.int_value for a in child.attributes} == {
        "stillhouse.job_id": "job_1",
        "stillhouse.step": 3,
    }
    assert (resource["service.name"], resource["service.instance.id"]) == ("trainer", "trainer-7")
    assert {a.key: a.value.string_value for a in bad.attributes} == {"error.type": "ValueError"}
    assert b"quoted" not in b"".join(request.SerializeToString() for request in collector.requests)


def test_a_collector_that_is_down_is_told_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    monkeypatch.setenv("NO_PROXY", "*")
    with capture_logs() as lines:
        tracing.start("trainer", "trainer-0", structlog.get_logger())
        for _ in range(3):
            with tracing.span("step"):
                pass
            tracing._provider.force_flush()
        tracing.stop()
    (line,) = lines
    assert line["log_level"] == "warning"
    assert "jobs go on" in line["event"]


def test_a_missing_package_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with capture_logs() as lines:
        tracing.start("trainer", "trainer-0", structlog.get_logger())
    assert "stillhouse[otel]" in lines[0]["event"]
    assert not tracing.is_on()


@pytest.mark.parametrize("is_set", [False, True])
def test_off_a_span_only_names_what_lines_are_about(monkeypatch: pytest.MonkeyPatch, is_set: bool) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    if is_set:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
        monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    tracing.start("trainer", "trainer-0", structlog.get_logger())
    with tracing.span("step", step=3) as span:
        assert get_contextvars()["step"] == 3
        assert span is tracing.NO_SPAN
        assert tracing.traceparent() == ""
    assert "step" not in get_contextvars()


NO_PARENTS = ("", "00-1", PARENT[:-1], PARENT + "0", "ff" + PARENT[2:], PARENT.upper(), f"00-{'0' * 32}-{'1' * 16}-01")


@pytest.mark.parametrize("header", NO_PARENTS)
def test_what_is_no_traceparent_begins_a_trace_of_its_own(header: str) -> None:
    tracing.use(tracing.make_provider())
    with tracing.span("request", parent=header, links=[header]) as span:
        assert span.traceparent[3:35] != PARENT[3:35]
    with tracing.within(header):
        assert tracing.traceparent() == ""
