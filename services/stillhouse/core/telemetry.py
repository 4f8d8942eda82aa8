"""Logs and metrics of a process: structlog (JSON in containers, text on a terminal) and Prometheus.

Never logged: prompts, completions, credentials. Keys used everywhere: job_id, epoch, step, sample_id, service,
instance.
"""

from __future__ import annotations

import atexit
import logging
import sys
from typing import Any, Final
from urllib.parse import urlsplit

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from stillhouse.core.blobs import Artifacts
from stillhouse.core.config import Settings
from stillhouse.core.job_logs import JobLogs

METRICS: Final = CollectorRegistry()
"""All metrics of this process."""

BUILD_INFO = Gauge("stillhouse_build_info", "Version of the running service", ["service", "version"], registry=METRICS)
RPC_SECONDS = Histogram("stillhouse_rpc_seconds", "Time of internal calls served", ["method", "code"], registry=METRICS)
SAMPLED_TOKENS = Counter("stillhouse_sampler_tokens_total", "Completion tokens sampled", registry=METRICS)
SAMPLED_ROLLOUTS = Counter("stillhouse_sampler_rollouts_total", "Rollouts handed over", ["outcome"], registry=METRICS)
WEIGHT_PULLS = Counter("stillhouse_sampler_weight_pulls_total", "Weights pulled from a trainer", registry=METRICS)
WEIGHT_PULL_SECONDS = Histogram("stillhouse_sampler_weight_pull_seconds", "Time of a weight pull", registry=METRICS)
SCORED_TOKENS = Counter("stillhouse_teacher_tokens_total", "Completion tokens scored", registry=METRICS)
SCORED_ROLLOUTS = Counter("stillhouse_teacher_rollouts_total", "Scores handed over", ["outcome"], registry=METRICS)
SCORE_SECONDS = Histogram("stillhouse_teacher_score_seconds", "Time of a scoring batch", registry=METRICS)
MODEL_LOADS = Counter("stillhouse_teacher_model_loads_total", "Models loaded", ["model"], registry=METRICS)
MODEL_LOAD_SECONDS = Histogram("stillhouse_teacher_model_load_seconds", "Time of a model's load", registry=METRICS)
JOB_LOADS = Counter("stillhouse_teacher_job_loads_total", "Models loaded for a job", ["job_id"], registry=METRICS)
JOB_TOKENS = Counter(
    "stillhouse_teacher_job_tokens_total",
    "Completion tokens of a job: scored, or found in the cache",
    ["job_id", "source"],
    registry=METRICS,
)
JOB_SCORE_SECONDS = Counter(
    "stillhouse_teacher_job_score_seconds_total", "Time of a job's forward passes", ["job_id"], registry=METRICS
)
CACHE_HITS = Counter("stillhouse_teacher_cache_hits_total", "Scores found in the cache", registry=METRICS)
CACHE_BYTES = Gauge("stillhouse_teacher_cache_bytes", "Scores kept in the cache", registry=METRICS)
BLOB_BYTES = Gauge("stillhouse_teacher_blob_bytes", "Score payloads held", registry=METRICS)
STEP_SECONDS = Histogram("stillhouse_trainer_step_seconds", "Time of a step by phase", ["phase"], registry=METRICS)
TRAIN_LOSS = Gauge("stillhouse_train_loss", "Loss of the last step", ["job_id"], registry=METRICS)
REVERSE_KL = Gauge(
    "stillhouse_train_reverse_kl_nats", "Mean reverse KL of the last step, nats per token", ["job_id"], registry=METRICS
)
STALENESS = Gauge(
    "stillhouse_rollout_staleness_steps", "Largest staleness in the last step", ["job_id"], registry=METRICS
)
POLICY_VERSION = Gauge("stillhouse_policy_version", "Policy version at this service", ["service"], registry=METRICS)
LAST_STEP = Gauge("stillhouse_last_step_timestamp_seconds", "When the last step ended", registry=METRICS)
QUEUE_ENTRIES = Gauge("stillhouse_queue_entries", "Entries outstanding", ["stage"], registry=METRICS)
DROPPED = Counter("stillhouse_dropped_total", "Work dropped on purpose", ["service", "reason"], registry=METRICS)
HTTP_SECONDS = Histogram(
    "stillhouse_gateway_request_seconds", "Time of REST requests", ["method", "route", "status"], registry=METRICS
)


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


def serve_metrics(settings: Settings) -> str:
    """Start the Prometheus endpoint in a thread; returns its address."""
    server, _ = start_http_server(settings.metrics_port, addr=settings.host, registry=METRICS)
    return f"{settings.advertise_host}:{server.server_port}"
