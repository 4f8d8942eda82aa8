"""Alerts: for each one a case in which it fires and one, close by, in which it does not; promtool runs them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tests.promtool import promtool
from tests.unit.test_docs import slug

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docker" / "prometheus"
ALERTS: dict[str, Any] = {
    rule["alert"].removeprefix("Stillhouse"): rule
    for group in yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"]
    for rule in group["rules"]
}
Series = dict[str, str]
"""Series -> its values, one a minute, as promtool writes them: `0+2x10` is 0, 2, 4 ... 20."""


def services(role: str, number: int) -> Series:
    return {f'stillhouse_services{{role="{role}",health="ok"}}': f"{number}x60"}


def jobs(status: str, number: int = 1) -> Series:
    return {f'stillhouse_jobs{{status="{status}"}}': f"{number}x60"}


def age(stage: str, seconds: int) -> Series:
    return {f'stillhouse_queue_oldest_age_seconds{{stage="{stage}"}}': f"{seconds}x60"}


def disk(free: int) -> Series:
    return {"stillhouse_storage_free_bytes": f"{free}x60", "stillhouse_storage_size_bytes": "100x60"}


def steps(seconds: int, before: int = 10) -> Series:
    """A step a minute; those after two hours take `seconds`."""
    name = "stillhouse_trainer_step_seconds"
    return {
        f'{name}_sum{{phase="step",instance="t"}}': f"0+{before}x120 {before * 120}+{seconds}x60",
        f'{name}_count{{phase="step",instance="t"}}': "0+1x180",
    }


def buckets(name: str, fast: int, labels: str = "") -> Series:
    """Observations a minute: `fast` of ten are below 1 s, all below 100 s."""
    return {
        f'{name}_bucket{{le="1.0"{labels}}}': f"0+{fast}x60",
        f'{name}_bucket{{le="100.0"{labels}}}': "0+10x60",
        f'{name}_bucket{{le="+Inf"{labels}}}': "0+10x60",
    }


def versions(sampler: int) -> Series:
    name = "stillhouse_policy_version"
    return {
        f'{name}{{role="trainer",job_id="j"}}': "40x60",
        f'{name}{{role="sampler",job_id="j",instance="a"}}': f"{sampler}x60",
        f'{name}{{role="sampler",job_id="j",instance="b"}}': "40x60",
        f'{name}{{role="sampler",job_id="of-another-trainer"}}': "1x60",
    }


def counted(name: str, now: str) -> Series:
    return {name: f"0x30 {now}"}


LOSS = "stillhouse_train_reverse_kl_nats"
REDIS = 'stillhouse_redis_errors_total{kind="%s"}'
REQUESTS = 'stillhouse_gateway_request_seconds_count{status="%s"}'
CLAIMS = 'stillhouse_trainer_claims_ended_total{end="%s"}'
STOPPED = 'stillhouse_last_step_timestamp_seconds{job_id="j"}'
CASES: dict[str, tuple[int, Series, Series]] = {
    "GatewayMissing": (5, {}, {'stillhouse_build_info{role="gateway",version="1"}': "1x60"}),
    "NoTrainer": (10, jobs("queued") | services("trainer", 0), jobs("queued") | services("trainer", 1)),
    "NoSampler": (10, jobs("running") | services("sampler", 0), jobs("queued") | services("sampler", 0)),
    "NoTeacher": (10, jobs("running") | services("teacher", 0), jobs("running") | services("teacher", 2)),
    "ServiceInTrouble": (
        10,
        {'stillhouse_services{role="teacher",health="problem"}': "1x60"},
        {'stillhouse_services{role="teacher",health="draining"}': "1x60"},
    ),
    "JobsNotLookedAfter": (
        10,
        {"stillhouse_gateway_last_sweep_timestamp_seconds": "0x60"},
        {"stillhouse_gateway_last_sweep_timestamp_seconds": "0+60x60"},
    ),
    "MixedVersions": (
        90,
        {f'stillhouse_build_info{{role="teacher",version="{each}"}}': "1x100" for each in "12"},
        {f'stillhouse_build_info{{role="{each}",version="1"}}': "1x100" for each in ("teacher", "sampler")},
    ),
    "InternalCallsRefused": (
        35,
        counted('stillhouse_rpc_seconds_count{method="/m",code="UNAUTHENTICATED"}', "3x10"),
        counted('stillhouse_rpc_seconds_count{method="/m",code="UNAVAILABLE"}', "3x10"),
    ),
    "QueueServerAway": (35, counted(REDIS % "connection", "0+10x10"), counted(REDIS % "connection", "2x10")),
    "QueueServerRefusesWrites": (35, counted(REDIS % "full", "1x10"), counted(REDIS % "timeout", "1x10")),
    "DiskNearlyFull": (10, disk(9), disk(11)),
    "DiskFull": (10, disk(1), disk(3)),
    "PromptsWait": (20, age("prompts", 1000), age("prompts", 800)),
    "RolloutsWait": (20, age("rollouts", 1000), age("dead", 100000)),
    "JobsWait": (
        70,
        {'stillhouse_work_waiting{role="trainer"}': "2x80", **dict.fromkeys(services("trainer", 1), "1x80")},
        {'stillhouse_work_waiting{role="trainer"}': "0x80", **dict.fromkeys(services("trainer", 1), "1x80")},
    ),
    "JobStalled": (5, jobs("stalled"), jobs("running")),
    "JobStandsStill": (60, {STOPPED: "60x60"}, {STOPPED: "0+60x60"}),
    "StepsSlower": (145, steps(30), steps(15)),
    "TrainersDie": (
        40,
        counted("stillhouse_trainer_rewinds_total", "5x10"),
        counted("stillhouse_trainer_rewinds_total", "2x10"),
    ),
    "ClaimsFail": (35, counted(CLAIMS % "failed", "1x10"), counted(CLAIMS % "handed_on", "1x10")),
    "DeadLetters": (
        35,
        counted("stillhouse_trainer_failed_samples_total", "2x10"),
        {"stillhouse_trainer_failed_samples_total": "2x60"},
    ),
    "StepsSkipped": (
        35,
        counted("stillhouse_trainer_skipped_steps_total", "1x10"),
        {"stillhouse_trainer_skipped_steps_total": "1x60"},
    ),
    "KLExplodes": (66, {LOSS: "0.2x60 2x10"}, {LOSS: "0.01x60 0.2x10"}),
    "SamplerAndTrainerDisagree": (
        10,
        {'stillhouse_train_mismatch_nats{job_id="j"}': "0.4x60"},
        {'stillhouse_train_mismatch_nats{job_id="j"}': "0.02x60"},
    ),
    "VersionLag": (10, versions(30), versions(38)),
    "TeacherSlow": (
        30,
        buckets("stillhouse_teacher_score_seconds", 1),
        buckets("stillhouse_teacher_score_seconds", 10),
    ),
    "TeachersLoadAgainAndAgain": (
        35,
        {'stillhouse_teacher_model_loads_total{model="m"}': "0+1x60"},
        {'stillhouse_teacher_model_loads_total{model="m"}': "0x30 3x30"},
    ),
    "GatewayErrors": (
        10,
        {REQUESTS % "503": "0+1x60", REQUESTS % "200": "0+9x60"},
        {REQUESTS % "404": "0+1x60", REQUESTS % "200": "0+9x60"},
    ),
    "GatewaySlow": (
        30,
        buckets("stillhouse_gateway_request_seconds", 1, ',route="/v1/jobs"'),
        buckets("stillhouse_gateway_request_seconds", 1, ',route="/v1/jobs/{job_id}/events"'),
    ),
    "KeysRefused": (
        10,
        {'stillhouse_gateway_problems_total{code="unauthorized"}': "0+120x60"},
        {'stillhouse_gateway_problems_total{code="unauthorized"}': "0+6x60"},
    ),
}


def case(alert: str, minute: int, series: Series, *, fires: bool) -> dict[str, Any]:
    """A test of promtool that asks for the number of alerts alone: their texts are not what is tested."""
    expr = f'count(ALERTS{{alertname="Stillhouse{alert}",alertstate="firing"}}) or vector(0)'
    return {
        "name": f"{alert} {'fires' if fires else 'is quiet'}",
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {"expr": expr, "eval_time": f"{minute}m", "exp_samples": [{"labels": "{}", "value": int(fires)}]}
        ],
    }


def test_every_alert_fires_when_it_should_and_not_when_it_should_not(tmp_path: Path) -> None:
    assert CASES.keys() == ALERTS.keys()
    tests = [
        case(name, minute, series, fires=fires)
        for name, (minute, firing, quiet) in CASES.items()
        for series, fires in ((firing, True), (quiet, False))
    ]
    document = {"rule_files": [str(FOLDER / "alerts.yaml")], "evaluation_interval": "1m", "tests": tests}
    (tmp_path / "cases.yaml").write_text(yaml.safe_dump(document))
    promtool("test", "rules", str(tmp_path / "cases.yaml"))


def test_promtool_accepts_the_configuration_of_compose() -> None:
    promtool("check", "config", str(FOLDER / "prometheus.yml"))


def test_alerts_say_what_to_do() -> None:
    lines = (ROOT / "docs/runbook.md").read_text().splitlines()
    anchors = {slug(line.lstrip("#")) for line in lines if line.startswith("#")}
    for name, rule in ALERTS.items():
        said = rule["annotations"]
        page, _, anchor = said["runbook_url"].partition("#")
        assert rule["labels"]["severity"] in ("critical", "warning", "info"), name
        assert page == "docs/runbook.md", name
        assert anchor in anchors, f"{name}: docs/runbook.md has no chapter '{anchor}'"
        assert len(said["summary"]) < 60 < len(said["description"]), name
