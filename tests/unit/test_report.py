"""The report of a job: what it says, and that nothing of users or models gets into its page as markup."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from stillhouse.core.blobs import JobArtifacts, append_jsonl, read_json, sealed, write_json
from stillhouse.core.queue.jobs import JobRecord
from stillhouse.core.report.charts import chart
from stillhouse.core.report.facts import POINTS, make_report
from stillhouse.core.report.files import write_report
from stillhouse.core.report.page import page
from stillhouse.core.schemas import Curve, Report
from stillhouse.core.spec import JobSpec
from tests.cluster import job_spec

EVIL = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>"


class Tags(HTMLParser):
    """Tags and attributes of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.add(tag)
        self.attributes += attrs


def evaluation(step: int, kl: float, text: str) -> dict[str, Any]:
    of = {"reverse_kl": kl, "accuracy": 0.5, "pass_at_k": {"1": 0.5, "4": 0.75}, "mean_length": 9.0, "num_prompts": 2}
    shown = {"prompt": f"Why? {text}", "student": f"Because {step} {text}", "teacher": f"Since {text}"}
    return {"step": step, **of, "by_teacher": {"main": of, "other": of | {"reverse_kl": 2 * kl}}, "samples": [shown]}


@pytest.fixture
def job(tmp_path: Path) -> tuple[JobRecord, JobArtifacts]:
    artifacts = JobArtifacts(tmp_path / "jobs" / "job_0123456789")
    spec = JobSpec.model_validate(job_spec(name=EVIL)).model_dump(mode="json")
    record = JobRecord(
        id="job_0123456789",
        status="succeeded",
        spec=spec,
        created_at=1e9,
        started_at=1e9 + 1,
        finished_at=1e9 + 3700,
        step=1000,
        stop_step=1000,
        usage={"sampled_tokens": 1234567},
    )
    for step in range(1, 1001):
        values = {"loss/reverse_kl/mean": 3 / step, "loss/total": 1 / step, "time/train_s": 0.5, "time/wait_s": 1.5}
        append_jsonl(artifacts.metrics, [{"epoch": 1, "step": step, "values": {**values, "time/step_s": 2.0}}])
    for step, kl in ((0, 3.0), (500, 2.0), (1000, 1.5)):
        write_json(artifacts.evaluations / f"{step:08d}.json", evaluation(step, kl, EVIL))
    for _ in range(2):
        append_jsonl(artifacts.events, [{"type": "x", "level": "warning", "message": EVIL, "data": {}}])
    best = {"checkpoint": "ckpt_1-00001000-0123abcd", "step": 1000, "metric": "reverse_kl", "mode": "min", "value": 1.5}
    write_json(artifacts.best_checkpoint, sealed(best))
    return record, artifacts


def test_it_says_what_happened(job: tuple[JobRecord, JobArtifacts]) -> None:
    record, artifacts = job
    report = make_report(record, artifacts)
    found = {(each.measure, each.domain): (each.before, each.after) for each in report.comparisons}
    assert found["reverse_kl", ""] == (3.0, 1.5)
    assert found["reverse_kl", "other"] == (6.0, 3.0)
    assert found["pass@4", ""] == (0.75, 0.75)
    curves = {curve.name: curve for curve in report.curves}
    assert len(curves["loss/total"].steps) <= POINTS
    assert curves["loss/total"].steps[-1] == 1000
    total = sum(1 / step for step in range(1, 1001))
    width = 1000 / len(curves["loss/total"].steps)
    assert sum(v or 0 for v in curves["loss/total"].values) * width == pytest.approx(total), "means, none left out"
    assert curves["held_out/reverse_kl/other"].values == [6.0, 4.0, 3.0]
    assert report.seconds == {"train": 500.0, "wait": 1500.0}
    assert report.warnings == [f"{EVIL} (2 times)"]
    assert "3 -> 1.5" in report.summary
    assert report.spec["stages"][0]["data"]["rows"] is None


def test_the_page_needs_nothing_else_and_escapes_what_users_and_models_write(
    job: tuple[JobRecord, JobArtifacts],
) -> None:
    record, artifacts = job
    write_report(record, artifacts)
    text = (artifacts.root / "report.html").read_text()
    tags = Tags(text)
    assert not tags.found & {"script", "img", "link", "iframe", "object", "form", "a"}
    assert not [name for name, _ in tags.attributes if name.startswith("on") or name in ("src", "href")]
    assert "http" not in re.sub(r"transformers|https?-equiv", "", text.replace(EVIL, ""))
    assert text.count("&lt;script&gt;alert") >= 6, "name, prompt, three texts, warning"
    assert tags.found >= {"svg", "polyline", "table", "details"}
    assert Report.model_validate(read_json(artifacts.root / "report.json")).summary in text.replace("&gt;", ">")


def test_a_job_that_has_done_nothing_yet_has_a_report(tmp_path: Path) -> None:
    spec = JobSpec.model_validate(job_spec()).model_dump(mode="json")
    record = JobRecord(id="job_0123456789", status="queued", spec=spec, created_at=1e9, stop_step=4)
    report = make_report(record, JobArtifacts(tmp_path))
    assert report.summary == "0 of 4 steps"
    assert "What was asked" in page(report)
    assert "How to load" not in page(report)


@pytest.mark.parametrize("values", [[1.0], [2.0, 2.0], [0.0, 0.0], [-1e-9, 1e9], [None, 5.0, None]])
def test_every_curve_stays_in_its_picture(values: list[float | None]) -> None:
    drawn = chart("a", "b", {"x": Curve(name="x", steps=list(range(len(values))), values=values)})
    points = [tuple(map(float, each.split(","))) for each in re.findall(r'points="([^"]+)"', drawn)[0].split()]
    assert len(points) == sum(value is not None for value in values)
    assert all(0 <= x <= 420 and 0 <= y <= 190 for x, y in points)


def test_no_value_no_picture() -> None:
    assert chart("a", "b", {"x": Curve(name="x", steps=[1], values=[None])}) == ""
