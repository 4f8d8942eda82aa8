"""The trackers that there are. Their packages are imported where they are used, in the tracker's thread."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Final

from stillhouse.core.spec_trackers import TrackerSpec
from stillhouse.trainer.trackers.base import TrackedRun, Tracker

JOB_TAG: Final = "stillhouse.job_id"


def open_tracker(spec: TrackerSpec, run: TrackedRun) -> Tracker:
    """The tracker of a job, going on with the run that an earlier claim began."""
    kinds = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio, "mlflow": MLflow}
    return kinds[spec.kind](spec, run)


class TensorBoard:
    """Event files in the folder `tensorboard` of the job's artifacts; each claim adds one to the same run."""

    def __init__(self, spec: TrackerSpec, run: TrackedRun) -> None:
        from tensorboard.summary import Writer  # pyright: ignore[reportMissingImports]

        self._writer = Writer(str(run.folder / "tensorboard"))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """Weights & Biases: the run's id is the job's. Offline runs lie in `wandb` beside the artifacts."""

    def __init__(self, spec: TrackerSpec, run: TrackedRun) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        self._run = wandb.init(
            project=spec.project,
            name=spec.run_name or run.name,
            id=run.job_id,
            resume="allow",
            mode=spec.mode,
            dir=str(run.folder),
            config=run.config,
        )
        self._run.define_metric("*", step_metric="step")  # its own counter never goes back, ours may

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "step": step})

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """trackio: local unless its environment names a space."""

    def __init__(self, spec: TrackerSpec, run: TrackedRun) -> None:
        import trackio  # pyright: ignore[reportMissingImports]

        self._run = trackio.init(
            project=spec.project,
            name=spec.run_name or f"{run.name}-{run.job_id[-6:]}",
            config=_flat(run.config),
            resume="allow",
            embed=False,
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """MLflow: the run is found again by a tag with the job's id. Where it goes: MLFLOW_TRACKING_URI."""

    def __init__(self, spec: TrackerSpec, run: TrackedRun) -> None:
        from mlflow.tracking import MlflowClient  # pyright: ignore[reportMissingImports]

        self._client = MlflowClient()
        found = self._client.get_experiment_by_name(spec.project)
        experiment = found.experiment_id if found else self._client.create_experiment(spec.project)
        old = self._client.search_runs([experiment], f"tags.`{JOB_TAG}` = '{run.job_id}'", max_results=1)
        if old:
            self._id = old[0].info.run_id
            return
        tags = {JOB_TAG: run.job_id}
        self._id = self._client.create_run(experiment, tags=tags, run_name=spec.run_name or run.name).info.run_id
        for name, value in _flat(run.config).items():
            self._client.log_param(self._id, name, str(value)[:500])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric  # pyright: ignore[reportMissingImports]

        now_ms = int(time.time() * 1000)
        metrics = [Metric(name.replace("@", "_at_"), value, now_ms, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self._id)


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted names."""
    found: dict[str, Any] = {}
    items = config.items() if isinstance(config, Mapping) else enumerate(config)
    for name, value in items:
        if isinstance(value, Mapping | list | tuple) and value:
            found |= _flat(value, f"{prefix}{name}.")  # type: ignore[arg-type]
        elif value not in (None, {}, [], ()):
            found[f"{prefix}{name}"] = value
    return found
