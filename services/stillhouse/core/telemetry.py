"""Logs of a process: structlog, JSON in containers, text on a terminal.

Never logged: prompts, completions, credentials; what an error quotes of the last is replaced. Keys used everywhere:
service, instance, job_id, epoch, step, group, sample_id, request_id, trace_id, span_id. They are bound where the work
begins (core/tracing.py), so every line within has them, those of libraries, too. Whatever else would write to stderr
by itself (warnings, uncaught exceptions, gRPC's core) becomes such a line, or is silent.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any, Final
from urllib.parse import urlsplit

import structlog

from stillhouse.core.blobs import Artifacts
from stillhouse.core.config import Settings
from stillhouse.core.job_logs import JobLogs

job_logs: JobLogs | None = None
"""Of this process, once its logging is set up."""


_API_KEY: Final = re.compile(r"stillhouse_[A-Za-z0-9_-]{20,}")


def _secrets(settings: Settings) -> list[str]:
    """What must not get into a line, should an error quote it."""
    headers = (
        os.environ.get("OTEL_EXPORTER_OTLP_HEADERS", "") + "," + os.environ.get("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "")
    )
    given = [header.partition("=")[2].strip() for header in headers.split(",")]
    found = [settings.internal_token, urlsplit(settings.redis_url).password or "", *given]
    return sorted({secret for secret in found if secret}, key=len, reverse=True)


def _masker(secrets: Iterable[str]) -> Callable[[Any, str, Any], str]:
    """The last processor of a line: replaces credentials, also as JSON writes them."""
    written = [form for secret in secrets for form in {secret, json.dumps(secret)[1:-1]}]

    def mask(_logger: Any, _method: str, line: Any) -> str:
        for secret in written:
            line = line.replace(secret, "***")
        return _API_KEY.sub("stillhouse_***", line)

    return mask


def _route_strays(log: Any) -> None:
    """What would go to stderr as bare text becomes a line of the log."""
    logging.captureWarnings(True)
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its errors are raised to us, too

    def uncaught(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if issubclass(kind, KeyboardInterrupt):
            return
        log.error("uncaught exception", exc_info=(kind, error, trace))

    sys.excepthook = uncaught
    threading.excepthook = lambda args: uncaught(args.exc_type, args.exc_value or args.exc_type(), args.exc_traceback)


def flush_logs() -> None:
    """Wait a moment for the disk, before a process ends at once."""
    sys.stdout.flush()
    sys.stderr.flush()
    if job_logs is not None:
        job_logs.flush()


def setup_logging(settings: Settings, service: str, instance: str) -> Any:
    """Configure structlog and the standard library's loggers; returns the process's logger."""
    global job_logs
    job_logs = JobLogs(Artifacts(settings.artifacts_dir()), service, instance, _secrets(settings))
    atexit.register(job_logs.flush)
    as_json = settings.log_format == "json" or (settings.log_format == "auto" and not sys.stderr.isatty())
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    # plain tracebacks: rich ones print local variables, which hold prompts and credentials
    renderer: Any = (
        structlog.processors.JSONRenderer()
        if as_json
        else structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    )
    mask = _masker(_secrets(settings))
    level = logging.getLevelNamesMapping()[settings.log_level]
    structlog.configure(
        processors=[
            *shared,
            structlog.processors.StackInfoRenderer(),
            structlog.processors.format_exc_info,
            job_logs,
            renderer,
            mask,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                renderer,
                mask,
            ],
            foreign_pre_chain=shared,
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(max(level, logging.WARNING))
    structlog.contextvars.bind_contextvars(service=service, instance=instance)
    log = structlog.get_logger()
    _route_strays(log)
    return log
