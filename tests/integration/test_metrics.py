"""Metrics of a job that runs, read as Prometheus reads them, and by Prometheus itself."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from stillhouse.core import metrics
from stillhouse.gateway import gauges
from stillhouse.gateway.sweeper import Sweeper
from tests.cluster import Cluster, job_spec
from tests.promtool import promtool
from tests.unit.test_dashboards import ROOT, named, queries
from tests.waiting import wait_until

ROLES = ("sampler", "teacher", "trainer")
ONLY_IN_TROUBLE = {
    "stillhouse_sampler_dropped_total", "stillhouse_teacher_dropped_total", "stillhouse_redis_errors_total",
    "stillhouse_gateway_problems_total", "stillhouse_trainer_claims_ended_total",
}  # fmt: skip
"""Counters by reason: without series until something goes wrong, or ends."""
OF_REQUESTS = {f"stillhouse_gateway_request_seconds_{part}" for part in ("bucket", "count", "sum")}
"""tests/integration/test_gateway.py reads those from a gateway."""


async def addresses(cluster: Cluster) -> dict[str, str]:
    """Role -> where its metrics are."""
    await Sweeper(cluster.ctx).sweep()
    found = {info.role: info.metrics_address for info in await cluster.ctx.registry.services()}
    return found | {"gateway": metrics.serve_metrics(cluster.settings, "gateway")}


def read(address: str) -> dict[str, list[dict[str, str]]]:
    """Series -> the labels of each."""
    text = httpx.get(f"http://{address}/metrics", trust_env=False).raise_for_status().text
    promtool("check", "metrics", text=text)
    found: dict[str, list[dict[str, str]]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample.labels)
    return found


async def running(cluster: Cluster) -> str:
    """A job that makes its steps for as long as it is let."""
    job_id = await cluster.submit(
        job_spec(stages__0__schedule={"steps": 5000, "prompts_per_step": 2, "group_size": 2, "max_staleness": 1})
    )

    async def has_steps() -> bool:
        return (await cluster.ctx.jobs.get(job_id)).step >= 2

    await wait_until(has_steps, timeout_s=60, what="two steps")
    return job_id


async def test_a_running_job_shows_every_series_that_dashboards_name(deployment: Cluster, tmp_path: Path) -> None:
    job_id = await running(deployment)
    where = await addresses(deployment)
    series = {role: read(address) for role, address in where.items()}
    there = set().union(*series.values())
    wanted = {name for _, expr in queries() for name in named(expr)[0]}
    assert wanted - there - ONLY_IN_TROUBLE - OF_REQUESTS == set()
    assert {labels["job_id"] for labels in series["trainer"]["stillhouse_train_step"]} == {job_id}
    with prometheus(tmp_path, where) as ask:
        up = await wait_until(lambda: ask("query", query="up == 1"), timeout_s=30, what="four targets that are up")
        assert {each["metric"]["instance"] for each in up["result"]} <= set(where.values())
        await wait_until(
            lambda: ask("query", query="max by (role) (stillhouse_build_info)") and four(ask), timeout_s=30, what="4 up"
        )
        firing = ask("query", query='ALERTS{alertstate="firing"}')
        assert firing is None, "a healthy deployment fires nothing"
        [bottleneck] = ask("query", query="stillhouse_train_bottleneck == 1")["result"]
        assert bottleneck["metric"]["role"] in metrics.ROLES
        rules = [rule for group in ask("rules")["groups"] for rule in group["rules"]]
        assert {rule["health"] for rule in rules} <= {"ok", "unknown"}, rules
    await deployment.ctx.jobs.request(job_id, allowed=("running",), status="cancelling")
    await deployment.ended(job_id)
    await wait_until(
        lambda: "stillhouse_train_step" not in read(where["trainer"]), timeout_s=20, what="the job's series to go"
    )
    gauges.forget()
    assert "stillhouse_jobs" not in read(where["gateway"])


def four(ask: Any) -> bool:
    return len(ask("query", query="up == 1")["result"]) == 4


@contextmanager
def prometheus(folder: Path, where: dict[str, str]) -> Iterator[Any]:
    """Prometheus with the configuration of compose, but for addresses; gives a way to ask it (None = no result)."""
    if (program := shutil.which("prometheus")) is None:
        pytest.fail("prometheus is missing: apt-get install prometheus")
    config = yaml.safe_load((ROOT / "docker/prometheus/prometheus.yml").read_text())
    config["global"] |= {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(ROOT / "docker/prometheus" / name) for name in config["rule_files"]]
    for scrape in config["scrape_configs"]:
        del scrape["dns_sd_configs"]
        mine = [address for role, address in where.items() if (role == "gateway") == (scrape["job_name"] == "gateway")]
        scrape["static_configs"] = [{"targets": mine}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    options = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/tsdb"]
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen([program, *options, f"--web.listen-address={address}"], stdout=log, stderr=log)

        def ask(what: str, **params: str) -> Any:
            try:
                answer = httpx.get(f"http://{address}/api/v1/{what}", params=params, trust_env=False, timeout=5)
            except httpx.TransportError:
                assert process.poll() is None, (folder / "prometheus.log").read_text()
                return None
            data = answer.json().get("data", {}) if answer.status_code == 200 else {}
            return data if data.get("result", data.get("groups")) else None

        try:
            yield ask
        finally:
            process.terminate()
            process.wait(20)
