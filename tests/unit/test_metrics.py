"""Metrics by the rules of Prometheus: names, types, units, help texts, labels, and nothing left of a job that ended."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics import MetricWrapperBase
from redis.asyncio.retry import Retry
from redis.exceptions import ConnectionError as RedisConnectionError

from stillhouse.core import metrics
from stillhouse.core.config import Settings
from stillhouse.core.queue.client import connect
from tests.promtool import promtool

ROLES = tuple(metrics.BY_ROLE)
LABELS = {"role", "version", "method", "code", "kind", "route", "status", "stage", "health", "outcome", "reason"}
LABELS |= {"model", "source", "phase", "end", "job_id"}
"""What a label may be called: each has few values, but for job_id."""
UNITS = ("seconds", "bytes", "tokens", "nats", "ratio", "steps", "info", "samples")
COUNTED = {
    "stillhouse_gateway_sse_followers", "stillhouse_queue_entries", "stillhouse_work_waiting", "stillhouse_train_step",
    "stillhouse_work_in_progress", "stillhouse_jobs", "stillhouse_services", "stillhouse_sampler_running_sequences",
    "stillhouse_train_steps_planned", "stillhouse_policy_version", "stillhouse_train_loss",
    "stillhouse_train_grad_norm", "stillhouse_train_bottleneck",
}  # fmt: skip
"""Gauges that are numbers of what they name, or have no unit."""


def of(registry: CollectorRegistry) -> Iterator[MetricWrapperBase]:
    return (metric for metric in registry._collector_to_names if isinstance(metric, MetricWrapperBase))


def every() -> list[MetricWrapperBase]:
    return [metric for registry in (metrics.COMMON, *metrics.BY_ROLE.values()) for metric in of(registry)]


def problems(metric: MetricWrapperBase) -> list[str]:
    """What is wrong with it by the rules."""
    name, found = metric._name, []
    if not re.fullmatch(r"stillhouse_[a-z0-9]+(_[a-z0-9]+)*", name):
        found.append("prefix stillhouse_, lower case, underscores")
    if len(metric._documentation) < 10 or metric._documentation.endswith("."):
        found.append("a help text, without a full stop")
    if isinstance(metric, Gauge) and not name.endswith(UNITS) and name not in COUNTED:
        found.append("a gauge ends with its unit")
    if isinstance(metric, Histogram) and not name.endswith(UNITS):
        found.append("a histogram ends with its unit")
    if re.search(r"_(ms|milliseconds|minutes|mib|gib|kb|percent|count|per_second)(_|$)", name):
        found.append("base units; no rates, no counts of counts")
    if set(metric._labelnames) - LABELS:
        found.append("a label that is not known to have few values")
    if "job_id" in metric._labelnames and not isinstance(metric, Gauge) and "_job_" not in name:
        found.append("job_id only on gauges, and on what is counted by job")
    return found


@pytest.mark.parametrize("metric", every(), ids=lambda metric: metric._name)
def test_names_units_help_and_labels(metric: MetricWrapperBase) -> None:
    assert problems(metric) == []


def test_the_rules_find_what_breaks_them() -> None:
    wrong = [
        Gauge("stillhouse_wait_ms", "Time of waiting", registry=None),
        Gauge("trainer_loss", "Loss of a step", registry=None),
        Counter("stillhouse_things", "Things", ["sample_id"], registry=None),
        Histogram("stillhouse_speed", "How fast it is", registry=None),
        Counter("stillhouse_steps", "Steps of a job", ["job_id"], registry=None),
    ]
    assert all(problems(metric) for metric in wrong)


@pytest.mark.parametrize("role", ROLES)
def test_promtool_finds_nothing_to_say(role: str) -> None:
    every_one = (*of(metrics.COMMON), *of(metrics.BY_ROLE[role]))
    empty = [metric for metric in every_one if metric._labelnames and not metric._metrics]
    for metric in empty:
        metric.labels(*["x"] * len(metric._labelnames))  # families without series are not looked at
    try:
        promtool("check", "metrics", text=generate_latest(metrics.exported(role)).decode())
    finally:
        for metric in empty:
            metric.clear()  # other tests of this process look at all series there are


def test_a_role_exports_its_own_metrics_and_no_other_ones() -> None:
    names = {role: {family.name for family in metrics.exported(role).collect()} for role in ROLES}
    common = set.intersection(*names.values())
    assert "stillhouse_build_info" in common
    assert "process_resident_memory_bytes" in common
    own = [name for role in ROLES for name in names[role] - common]
    assert len(own) == len(set(own))
    assert "stillhouse_sampler_tokens" in names["sampler"] - common


def test_series_of_a_job_go_with_its_claim() -> None:
    def series(job_id: str) -> list[Any]:
        families = metrics.exported("trainer").collect()
        return [sample for family in families for sample in family.samples if sample.labels.get("job_id") == job_id]

    for job_id in ("job_claimed", "job_of_another"):
        for gauge in metrics.OF_JOB:
            gauge.labels(job_id).set(1)
        metrics.BOTTLENECK.labels(job_id, "teacher").set(1)
        metrics.POLICY_VERSION.labels("trainer", job_id).set(1)
    with_job = [metric for metric in of(metrics.TRAINER) if "job_id" in metric._labelnames]
    assert len(series("job_claimed")) == len(with_job) + 1, "a new gauge by job belongs into forget_job, too"
    metrics.forget_job("job_claimed")
    assert series("job_claimed") == []
    assert len(series("job_of_another")) == len(with_job) + 1
    metrics.forget_job("job_of_another")


def test_the_endpoint_of_a_worker_serves_them() -> None:
    address = metrics.serve_metrics(Settings(host="127.0.0.1", advertise_host="127.0.0.1", metrics_port=0), "teacher")
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    promtool("check", "metrics", text=text)
    assert "stillhouse_teacher_tokens_total" in text
    assert "stillhouse_trainer_" not in text


async def test_failed_attempts_at_the_queue_server_are_counted() -> None:
    def counted() -> float:
        return metrics.COMMON.get_sample_value("stillhouse_redis_errors_total", {"kind": "connection"}) or 0.0

    before, redis = counted(), connect("redis://127.0.0.1:1/0")
    retry: Retry = redis.get_retry() or redis.connection_pool.connection_kwargs["retry"]
    retry.update_retries(2)
    with pytest.raises(RedisConnectionError):
        await redis.ping()
    assert counted() - before == 3
    await redis.aclose()
