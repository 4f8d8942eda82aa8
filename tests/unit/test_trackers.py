"""Experiment trackers: none can stop or slow training; real ones get the metrics; a takeover goes on with its run."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from stillhouse.core.spec import JobSpec
from stillhouse.core.spec_trackers import TrackerSpec
from stillhouse.trainer.trackers import base
from stillhouse.trainer.trackers.base import QUEUE_POINTS, TrackedRun, Tracker, Trackers
from stillhouse.trainer.trackers.kinds import JOB_TAG, open_tracker
from tests.cluster import job_spec

JOB = "job_0123456789abcdef"
VALUES = {"loss/total": 0.5, "held_out/pass@4": 0.25, "broken": float("nan")}


class Told:
    """A tracker that keeps what it gets, and can fail, or hang until it is let go."""

    def __init__(self, fails_at: int | None = None, hangs: bool = False) -> None:
        self.points: list[tuple[int, dict[str, float]]] = []
        self.is_closed = False
        self.fails_at = fails_at
        self.go = threading.Event()
        if not hangs:
            self.go.set()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        assert self.go.wait(30)
        if step == self.fails_at:
            raise ConnectionError("no route to the tracker")
        self.points.append((step, dict(values)))

    def close(self) -> None:
        self.is_closed = True


def run_of(folder: Path) -> TrackedRun:
    return TrackedRun(JOB, "a job", {"student": {"model": "small"}, "stages": [{"name": "main"}]}, folder)


def started(tmp_path: Path, *trackers: Tracker) -> tuple[Trackers, list[str]]:
    left, warnings = list(trackers), list[str]()
    specs = [TrackerSpec(kind="wandb")] * len(left)
    return Trackers(specs, run_of(tmp_path), lambda *_: left.pop(0), warnings.append), warnings


def test_every_point_comes_in_order_and_what_is_no_number_does_not(tmp_path: Path) -> None:
    tracker = Told()
    trackers, warnings = started(tmp_path, tracker)
    for step in range(50):
        trackers.log(step, VALUES)
    trackers.close()
    assert tracker.points == [(step, {"loss/total": 0.5, "held_out/pass@4": 0.25}) for step in range(50)]
    assert tracker.is_closed
    assert not warnings


def test_one_that_raises_is_told_of_once_and_the_others_go_on(tmp_path: Path) -> None:
    bad, good = Told(fails_at=2), Told()
    trackers, warnings = started(tmp_path, bad, good)
    for step in range(QUEUE_POINTS // 2):
        trackers.log(step, VALUES)
    trackers.close()
    assert len(bad.points) == 2
    assert len(good.points) == QUEUE_POINTS // 2
    assert warnings == ["tracker wandb failed and gets no more: ConnectionError: no route to the tracker"]


def test_one_that_hangs_slows_nobody_and_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "CLOSE_S", 0.2)
    bad = Told(hangs=True)
    trackers, warnings = started(tmp_path, bad)
    began = time.monotonic()
    for step in range(3 * QUEUE_POINTS):
        trackers.log(step, {"loss/total": 1.0})
    trackers.close()
    assert time.monotonic() - began < 5
    bad.go.set()
    assert [warning.split(":")[0] for warning in warnings] == [
        "tracker wandb does not keep up",
        "tracker wandb did not finish in 0.2 s and is left behind",
    ]


def test_one_that_is_not_installed_says_what_to_install(tmp_path: Path) -> None:
    warnings: list[str] = []

    def opens(*_: Any) -> Tracker:
        raise ModuleNotFoundError("No module named 'wandb'")

    trackers = Trackers([TrackerSpec(kind="wandb")], run_of(tmp_path), opens, warnings.append)
    trackers.log(1, VALUES)
    trackers.close()
    assert len(warnings) == 1
    assert "stillhouse[wandb]" in warnings[0]


def test_jobs_name_trackers_in_a_word_or_with_options_and_never_secrets() -> None:
    spec = JobSpec.model_validate(job_spec(trackers=["tensorboard", {"kind": "wandb", "project": "mine"}]))
    assert [(each.kind, each.project) for each in spec.trackers] == [("tensorboard", "stillhouse"), ("wandb", "mine")]
    for bad in (["neptune"], [{"kind": "wandb", "api_key": "secret"}]):
        with pytest.raises(ValidationError):
            JobSpec.model_validate(job_spec(trackers=bad))


def twice(kind: str, folder: Path, **options: Any) -> None:
    """Two claims of a job; the second goes back a step, as after a takeover."""
    warnings: list[str] = []
    for steps in ((1, 2), (2, 3)):
        spec = TrackerSpec.model_validate({"kind": kind, **options})
        trackers = Trackers([spec], run_of(folder), open_tracker, warnings.append)
        for step in steps:
            trackers.log(step, VALUES)
        trackers._feeds[0]._queue.put(None)
        trackers._feeds[0]._thread.join(90)
        assert not trackers._feeds[0]._thread.is_alive()
    assert not warnings


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is not installed")


@needs("tensorboard")
def test_tensorboard(tmp_path: Path) -> None:
    twice("tensorboard", tmp_path)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    tensors = found.Tensors("loss/total") if "loss/total" in found.Tags()["tensors"] else found.Scalars("loss/total")
    assert {each.step for each in tensors} == {1, 2, 3}


@needs("mlflow")
def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path / 'mlruns'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    twice("mlflow", tmp_path)
    from mlflow.tracking import MlflowClient  # pyright: ignore[reportMissingImports]

    client = MlflowClient(f"file://{tmp_path / 'mlruns'}")
    experiment = client.get_experiment_by_name("stillhouse")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`{JOB_TAG}` = '{JOB}'")
    assert [each.step for each in client.get_metric_history(run.info.run_id, "loss/total")] == [1, 2, 2, 3]
    assert run.data.params["stages.0.name"] == "main"


@needs("trackio")
@pytest.mark.full
@pytest.mark.timeout(120)
def test_trackio(tmp_path: Path) -> None:
    """In a process of its own: it reads its folder from the environment when it is imported."""
    code = "from tests.unit.test_trackers import Path, sys, twice; twice('trackio', Path(sys.argv[1]))"
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path)}
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, cwd=root, check=True, timeout=100)
    with sqlite3.connect(tmp_path / "stillhouse.db") as found:
        rows = found.execute("select distinct run_name, step from metrics order by step").fetchall()
    assert [step for _, step in rows] == [1, 2, 3]
    assert len({name for name, _ in rows}) == 1, "a takeover goes on with the run"


@needs("wandb")
@pytest.mark.full
@pytest.mark.timeout(120)
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    twice("wandb", tmp_path, mode="offline")
    runs = list((tmp_path / "wandb").glob(f"offline-run-*-{JOB}"))
    assert runs, "the id of the run is the job's"
    assert all(list(run.glob("*.wandb")) for run in runs)
