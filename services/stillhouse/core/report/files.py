"""The report beside the artifacts of a job that has ended."""

from __future__ import annotations

from stillhouse.core.blobs import JobArtifacts, write_atomic, write_json
from stillhouse.core.queue.jobs import JobRecord
from stillhouse.core.report.facts import make_report
from stillhouse.core.report.page import page


def write_report(record: JobRecord, artifacts: JobArtifacts) -> None:
    """Write report.json and report.html."""
    report = make_report(record, artifacts)
    write_json(artifacts.root / "report.json", report.model_dump(mode="json"))
    write_atomic(artifacts.root / "report.html", page(report).encode())
