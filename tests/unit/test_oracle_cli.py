"""`stillhouse verify` as users call it: in a process of its own, with no service running."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.oracle_cases import JOB_ID, STEPS, Job


def stillhouse(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "stillhouse.cli.main", *arguments],
        env={"PATH": os.environ["PATH"], "STILLHOUSE_HOME": str(home), "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def job(tmp_path: Path) -> Job:
    made = Job(tmp_path / "artifacts")
    made.open()
    made.run(STEPS)
    made.finish()
    return made


def test_a_clean_job(tmp_path: Path, job: Job) -> None:
    answer = stillhouse(tmp_path, "verify", JOB_ID)
    assert answer.returncode == 0, answer.stderr
    assert f"{JOB_ID}: succeeded, 1 claims, 6 steps, 24 samples trained, 0 failed" in answer.stdout
    assert "every promise was kept" in answer.stdout
    assert "BROKEN" not in answer.stdout
    elsewhere = stillhouse(tmp_path / "other", "verify", JOB_ID, "--artifacts", str(tmp_path / "artifacts"), "--json")
    assert elsewhere.returncode == 0, elsewhere.stderr
    document = json.loads(elsewhere.stdout)
    assert document["ok"] is True
    assert document["counts"]["steps"] == STEPS


def test_violations_are_told_and_are_the_exit_code(tmp_path: Path, job: Job) -> None:
    assert job.last is not None
    weights = job.last.folder(job.artifacts) / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    answer = stillhouse(tmp_path, "verify", JOB_ID)
    assert answer.returncode == 1
    assert "violation [checkpoint]: " in answer.stdout
    assert str(weights) in answer.stdout
    assert "BROKEN" in answer.stdout
    assert "Traceback" not in answer.stderr
    shallow = stillhouse(tmp_path, "verify", JOB_ID, "--shallow")
    assert shallow.returncode == 0, "sizes agree, and nothing else was looked at"
    assert "--shallow" in shallow.stdout


def test_a_job_that_goes_on_is_not_praised_for_its_end(tmp_path: Path) -> None:
    made = Job(tmp_path / "artifacts")
    made.open()
    made.run(2)
    answer = stillhouse(tmp_path, "verify", JOB_ID)
    assert answer.returncode == 0, answer.stderr
    assert "not ended" in answer.stdout
    assert "every promise was kept" not in answer.stdout


def test_an_unknown_job_and_no_job_at_all(tmp_path: Path, job: Job) -> None:
    unknown = stillhouse(tmp_path, "verify", "job_nowhere")
    assert unknown.returncode == 2
    assert "error: no job 'job_nowhere'" in unknown.stderr
    assert JOB_ID in unknown.stderr
    empty = stillhouse(tmp_path / "other", "verify", JOB_ID)
    assert empty.returncode == 2
    assert "--artifacts" in empty.stderr
    escape = stillhouse(tmp_path, "verify", f"../jobs/{JOB_ID}")
    assert escape.returncode == 2
