"""`stillhouse gc` as users call it: without services, and it never takes what somebody needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from stillhouse.core.blobs import JobArtifacts, sealed, write_json
from stillhouse.core.spec import JobSpec
from stillhouse.core.spill import SpillFolder
from stillhouse.trainer import manifests
from stillhouse.trainer.manifests import list_manifests, open_epoch
from tests.gateway_kit import make_spec

DONE, RUNNING = "job_00000000000000000001", "job_00000000000000000002"


def gc(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "stillhouse.cli.main", "gc", *arguments],
        env={"PATH": os.environ["PATH"], "STILLHOUSE_HOME": str(home), "COLUMNS": "140"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def commit(artifacts: JobArtifacts, epoch: int, *steps: int) -> None:
    def write(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"1" * 1000)

    for step in steps:
        manifests.commit(artifacts, epoch, step, {}, write)


def make_job(home: Path, job_id: str, **final: Any) -> JobArtifacts:
    artifacts = JobArtifacts(home / "artifacts" / "jobs" / job_id)
    spec = JobSpec.model_validate(make_spec()).model_dump(mode="json")
    spec["stages"][0]["schedule"]["steps"] = 6  # the end of a stage is kept
    write_json(artifacts.job_json, sealed({"id": job_id, "spec": spec}))
    open_epoch(artifacts, 1, "a")
    commit(artifacts, 1, 1, 2, 3, 4)
    open_epoch(artifacts, 2, "b")
    commit(artifacts, 1, 8)  # of a zombie
    commit(artifacts, 2, 5, 6)
    artifacts.export(2).mkdir()
    if final:
        write_json(artifacts.root / "final.json", sealed(final))
    return artifacts


def old(path: Path) -> Path:
    then = time.time() - 7200
    for entry in (*path.rglob("*"), path):
        os.utime(entry, (then, then))
    return path


@pytest.fixture
def home(tmp_path: Path) -> Path:
    make_job(tmp_path, DONE, status="succeeded", finished_at=time.time() - 3 * 86_400)
    make_job(tmp_path, RUNNING)
    return tmp_path


def steps(home: Path, job_id: str) -> list[tuple[int, int]]:
    return [(ref.epoch, ref.step) for ref in list_manifests(JobArtifacts(home / "artifacts" / "jobs" / job_id))]


def test_ended_jobs_lose_what_is_old_and_running_ones_only_zombies(home: Path) -> None:
    before = steps(home, DONE)
    dry = gc(home, "--dry-run")
    assert dry.returncode == 0, dry.stderr[-2000:]
    assert "would go" in dry.stdout
    assert (steps(home, DONE), steps(home, RUNNING)) == (before, before)
    answer = gc(home, "--json")
    assert answer.returncode == 0, answer.stderr[-2000:]
    document = json.loads(answer.stdout)
    assert document["size_bytes"] == sum(item["size_bytes"] for item in document["items"]) > 5000
    assert steps(home, DONE) == [(1, 4), (2, 5), (2, 6)], "the newest two, and what the epoch opened from"
    assert steps(home, RUNNING) == [(1, 1), (1, 2), (1, 3), (1, 4), (2, 5), (2, 6)]
    assert JobArtifacts(home / "artifacts" / "jobs" / DONE).export(2).is_dir()
    assert "0 things" in gc(home).stdout
    for heavy in ("torch", "transformers", "safetensors"):
        assert f" {heavy}\n" not in answer.stderr


def test_only_jobs_that_ended_long_ago_and_only_the_one_named(home: Path) -> None:
    before = steps(home, DONE)
    assert gc(home, DONE, "--older-than", "5").returncode == 0
    assert steps(home, DONE) == [pair for pair in before if pair != (1, 8)], "a zombie's goes at any age"
    assert steps(home, RUNNING) == before
    gc(home, DONE, "--older-than", "2")
    assert len(steps(home, DONE)) == 3


def test_leftovers_go_after_an_hour(home: Path) -> None:
    job = JobArtifacts(home / "artifacts" / "jobs" / RUNNING)
    for name in ("tmp.00000009.abcd", "tmp.gone.00000001-x.abcd", "tmp.fresh"):
        (job.manifests(2) / name).mkdir()
        (job.manifests(2) / name / "model.safetensors").write_bytes(bytes(10))
    for name in (".final.json.abcd.tmp", ".fresh.json.abcd.tmp"):
        (job.root / name).write_bytes(bytes(10))
    gone = [job.manifests(2) / "tmp.00000009.abcd", job.manifests(2) / "tmp.gone.00000001-x.abcd"]
    gone.append(job.root / ".final.json.abcd.tmp")
    for path in gone:
        old(path)
    assert gc(home).returncode == 0
    assert not any(path.exists() for path in gone)
    assert (job.manifests(2) / "tmp.fresh").is_dir(), "somebody may be writing it"
    assert (job.root / ".fresh.json.abcd.tmp").is_file()


def test_spills_of_living_teachers_stay(home: Path) -> None:
    dead, living = SpillFolder(home / "spill", "scores"), SpillFolder(home / "spill", "scores")
    os.close(dead._fd)  # as the kernel does for who dies
    (dead.path / "payload").write_bytes(bytes(100))
    for lock in (home / "spill").glob("*.lock"):
        os.utime(lock, (1, 1))
    assert "spill" in gc(home).stdout
    assert not dead.path.exists()
    assert living.path.is_dir()
    living.close()


def test_a_damaged_end_counts_as_an_end_and_a_damaged_spec_costs_nothing(home: Path) -> None:
    job = JobArtifacts(home / "artifacts" / "jobs" / DONE)
    (job.root / "final.json").write_text("{")
    before = steps(home, DONE)
    job.job_json.write_text("{")
    answer = gc(home, DONE)
    assert "its checkpoints stay" in answer.stdout
    assert steps(home, DONE) == before


def test_a_wrong_name_is_the_callers_mistake(home: Path) -> None:
    answer = gc(home, "job_nobody")
    assert answer.returncode == 2
    assert "--artifacts" in answer.stderr
