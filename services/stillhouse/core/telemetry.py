"""Logs of a process: structlog, JSON in containers, text on a terminal.

Never logged: prompts, completions, credentials. Keys used everywhere: job_id, epoch, step, sample_id, service,
instance.
"""

from __future__ import annotations

import atexit
import logging
import sys
from typing import Any
from urllib.parse import urlsplit

import structlog

from stillhouse.core.blobs import Artifacts
from stillhouse.core.config import Settings
from stillhouse.core.job_logs import JobLogs

job_logs: JobLogs | None = None
"""Of this process, once its logging is set up."""


def _secrets(settings: Settings) -> list[str]:
    """What must not get into a file that users read, should an error quote it."""
    return [settings.internal_token, urlsplit(settings.redis_url).password or ""]


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
    level = logging.getLevelNamesMapping()[settings.log_level]
    structlog.configure(
        processors=[
            *shared,
            structlog.processors.StackInfoRenderer(),
            structlog.processors.format_exc_info,
            job_logs,
            renderer,
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
            ],
            foreign_pre_chain=shared,
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(max(level, logging.WARNING))
    structlog.contextvars.bind_contextvars(service=service, instance=instance)
    return structlog.get_logger()
