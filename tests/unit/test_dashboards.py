"""Dashboards and alerts name what is exported, are what Grafana reads, and their copies are current."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.metrics import MetricWrapperBase

from stillhouse.core import metrics
from tests.promtool import promtool

ROOT = Path(__file__).resolve().parents[2]
GRAFANA = ROOT / "docker" / "grafana"
DASHBOARDS = sorted((GRAFANA / "dashboards").glob("*.json"))
UNITS = {"short", "s", "bytes", "percentunit", "reqps"}
"""Of Grafana's, those in use."""
OF_TARGETS = {"instance", "job"}
"""Labels that Prometheus puts on every series."""
SUFFIXES = {"histogram": ("_bucket", "_count", "_sum"), "counter": ("_total",)}
WORDS = {"by", "on", "ignoring", "group_left", "without", "and", "or", "unless", "offset", "bool"}
STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
SELECTOR = re.compile(r"([a-zA-Z_:][\w:]*)?\s*\{([^}]*)\}")
GROUPING = re.compile(r"\b(by|on|ignoring|without|group_left)\s*\(([^)]*)\)")
NAME = re.compile(r"(?<![\w.:])[a-zA-Z_:][\w:]*(?!\s*\()(?![\w:])")


def exported() -> dict[str, set[str]]:
    """Every series that some service has -> its labels."""
    found: dict[str, set[str]] = {}
    for role in metrics.BY_ROLE:
        for metric in (m for part in (metrics.COMMON, metrics.BY_ROLE[role]) for m in part._collector_to_names):
            labels = set(getattr(metric, "_labelnames", ()))
            for family in metric.describe() if isinstance(metric, MetricWrapperBase) else metric.collect():
                for suffix in {"histogram": ("_bucket", "_count", "_sum"), "counter": ("_total",)}.get(
                    family.type, ("",)
                ):
                    name = family.name + suffix
                    found[name] = labels | ({"le"} if suffix == "_bucket" else set())
    return found


def named(expr: str) -> tuple[dict[str, set[str]], set[str]]:
    """(metrics that a query names -> labels that it asks of each, labels that it groups by)."""
    plain = STRING.sub('""', expr)
    found: dict[str, set[str]] = {}
    for name, inner in SELECTOR.findall(plain):
        found.setdefault(name, set()).update(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", inner))
    grouped = {label for _, inner in GROUPING.findall(plain) for label in re.findall(r"\w+", inner)}
    bare = re.sub(r"\[[^]]*\]", "", GROUPING.sub("", re.sub(r"\{[^}]*\}", "", plain)))
    for name in NAME.findall(re.sub(r"offset\s+\w+", "", bare)):
        if name not in WORDS:
            found.setdefault(name, set())
    return found, grouped


def wrong(expr: str) -> list[str]:
    """What a query names and nobody exports."""
    there, (asked, grouped) = exported(), named(expr)
    problems = [f"no metric '{name}'" for name in asked if name not in there]
    for name, labels in asked.items():
        problems += [f"{name} has no label '{each}'" for each in labels - there.get(name, labels) - OF_TARGETS]
    known = set().union(*(there.get(name, set()) for name in asked)) | OF_TARGETS
    return problems + [f"no label '{each}' to group by" for each in grouped - known]


def panels() -> Iterator[tuple[str, dict[str, Any]]]:
    for path in DASHBOARDS:
        for panel in json.loads(path.read_text())["panels"]:
            if panel["type"] != "row":
                yield f"{path.stem}: {panel['title']}", panel


def queries() -> Iterator[tuple[str, str]]:
    for name, panel in panels():
        for target in panel["targets"]:
            yield name, target["expr"].replace("$job", ".*")
    for group in yaml.safe_load((ROOT / "docker/prometheus/alerts.yaml").read_text())["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]


def test_every_metric_and_label_that_a_query_names_is_exported() -> None:
    found = [(name, problem) for name, expr in queries() for problem in wrong(expr)]
    assert found == []
    assert len({name for _, expr in queries() for name in named(expr)[0]}) > 60


@pytest.mark.parametrize(
    "expr",
    [
        "stillhouse_train_losses",
        'rate(stillhouse_sampler_tokens_total{job_id="x"}[5m])',
        "sum by (stage) (stillhouse_jobs)",
        "stillhouse_trainer_step_seconds",
        'stillhouse_jobs{status="running"} / on() stillhouse_gone_total',
        "max(process_resident_memory) > 3",
        'sum by (le) (rate(stillhouse_rpc_seconds_count{method="a{b}"}[5m]))',
    ],
)
def test_what_is_not_exported_is_found(expr: str) -> None:
    assert wrong(expr)


def test_every_metric_is_on_a_dashboard_or_in_an_alert() -> None:
    used = {name for _, expr in queries() for name in named(expr)[0]}
    families = {re.sub("_(bucket|count|sum)$", "", name) for name in exported() if name.startswith("stillhouse_")}
    assert families - {re.sub("_(bucket|count|sum)$", "", name) for name in used} == set()


def test_promtool_can_read_every_query(tmp_path: Path) -> None:
    rules = [{"record": f"q{index}", "expr": expr} for index, (_, expr) in enumerate(queries())]
    (tmp_path / "queries.yaml").write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    promtool("check", "rules", str(tmp_path / "queries.yaml"))


def test_what_is_made_is_current() -> None:
    run = subprocess.run([sys.executable, ROOT / "scripts/dashboards", "--check"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_is_what_grafana_reads(path: Path) -> None:
    board = json.loads(path.read_text())
    source = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yaml").read_text())["datasources"][0]
    assert board["uid"] == f"stillhouse-{path.stem}"
    assert board["schemaVersion"] > 36
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {(x + place["x"], y + place["y"]) for x in range(place["w"]) for y in range(place["h"])}
        assert cells.isdisjoint(taken), f"{panel['title']} lies over another panel"
        assert place["x"] + place["w"] <= 24
        taken |= cells
    for panel in (each for each in board["panels"] if each["type"] != "row"):
        assert panel["type"] in ("stat", "timeseries", "table")
        assert panel["datasource"] == {"type": source["type"], "uid": source["uid"]}
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS, panel["title"]
        assert panel["description"]
        names = [target["refId"] for target in panel["targets"]]
        assert names
        assert len(names) == len(set(names))
        assert all(target["datasource"] == panel["datasource"] for target in panel["targets"])
    variables = {each["name"] for each in board["templating"]["list"]}
    assert set(re.findall(r"\$(\w+)", json.dumps([each.get("targets") for each in board["panels"]]))) == variables


def test_compose_mounts_what_the_configurations_name() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    mounts = {
        inside: ROOT / outside
        for name in ("prometheus", "grafana")
        for outside, inside in (each.split(":")[:2] for each in services[name]["volumes"] if each.startswith("./"))
    }
    [provider] = yaml.safe_load((GRAFANA / "provisioning/dashboards/stillhouse.yaml").read_text())["providers"]
    assert mounts[provider["options"]["path"]] == GRAFANA / "dashboards"
    assert mounts["/etc/grafana/provisioning"] == GRAFANA / "provisioning"
    config = next(each for each in services["prometheus"]["command"] if each.startswith("--config.file="))
    folder = mounts[str(Path(config.partition("=")[2]).parent)]
    for name in yaml.safe_load((folder / "prometheus.yml").read_text())["rule_files"]:
        assert (folder / name).is_file()
    # the pages of Prometheus' targets and of `up` name processes of the stack: all that serve metrics are there
    targets = (folder / "prometheus.yml").read_text()
    serving = [name for name in services if name.partition("-")[0] in metrics.BY_ROLE]
    assert all(re.search(rf"[\[ ]{name}[,\]]", targets) for name in serving)
