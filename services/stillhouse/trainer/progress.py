"""What people see of a running job: phase, step, ETA, tokens per second, the bottleneck in a word, metrics per step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from stillhouse.core import metrics as exported
from stillhouse.core import tracing
from stillhouse.core.queue.jobs import JobStore
from stillhouse.core.queue.streams import Scope

SMOOTHING: Final = 0.3
"""Weight of the newest step in the moving average of step times: an ETA that follows within a few steps."""


class Progress:
    """Collects a step's timings and writes record, metrics and gauges."""

    def __init__(self, scope: Scope, jobs: JobStore, stop_step: int) -> None:
        self._scope = scope
        self._jobs = jobs
        self.stop_step = stop_step
        """Optimizer steps of the job; evaluations may lower it."""
        self._step_s: float | None = None
        self._step_started = time.monotonic()
        self._phases: dict[str, float] = {}
        self.on_metrics: Callable[[int, Mapping[str, Any]], None] = lambda step, values: None
        """Takes the metrics of a step, and the measures of an evaluation; never waits."""
        self.phase = "starting"
        self.stage = ""
        """Name of the stage that is on."""
        self.usage: dict[str, float] = {
            "sampled_tokens": 0,
            "scored_tokens": 0,
            "trained_tokens": 0,
            "sample_s": 0.0,
            "score_s": 0.0,
            "train_s": 0.0,
            "failed_samples": 0,
            "cached_tokens": 0,
            "model_loads": 0,
            "score_bytes": 0,
        }
        """Totals of the job; seconds are busy time of the stage, `cached_tokens` those of `scored_tokens` that a
        teacher had scored before, `model_loads` loads of teachers while scoring, `score_bytes` scores with their
        payloads. Carried over a takeover by the manifest."""

    def begin_stage(self, name: str) -> None:
        """Another stage: its steps take another time."""
        self.stage, self._step_s = name, None

    def restore(self, usage: Mapping[str, float]) -> None:
        """Continue the totals of the manifest a claim opened from."""
        self.usage.update(usage)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Time a phase of the step; what no phase covers counts as waiting for rollouts."""
        start, before, self.phase = time.monotonic(), self.phase, phase
        try:
            with tracing.span(phase):
                yield
        finally:
            self.phase = before
            self._phases[phase] = self._phases.get(phase, 0.0) + time.monotonic() - start

    def start_clock(self) -> None:
        """Forget the time so far: the loop starts now."""
        self._step_started = time.monotonic()
        self._phases.clear()

    async def show(self, phase: str) -> None:
        """Tell users which phase the job is in."""
        self.phase = phase
        progress = {"phase": phase, "stage": self.stage, "total_steps": self.stop_step}
        await self._jobs.update(self._scope, progress=progress)

    async def step_done(self, step: int, metrics: dict[str, float], busy: Mapping[str, float]) -> None:
        """Record a finished step; `busy` has tokens, seconds and processes of its sampling and scoring."""
        now = time.monotonic()
        wall_s = now - self._step_started
        timings = self._timings(wall_s)
        self._step_started = now
        self._phases.clear()
        train_s = timings["time/train_s"]
        self.usage["sampled_tokens"] += busy["sampled_tokens"]
        self.usage["scored_tokens"] += busy["scored_tokens"]
        self.usage["trained_tokens"] += metrics.get("tokens/trained", 0.0)
        self.usage["sample_s"] += busy["sample_s"]
        self.usage["score_s"] += busy["score_s"]
        self.usage["train_s"] += train_s
        for name in ("cached_tokens", "model_loads", "score_bytes"):
            self.usage[name] += busy[name]
        speeds = {
            "sample": _rate(busy["sampled_tokens"], busy["sample_s"] / max(busy["samplers"], 1)),
            "score": _rate(busy["scored_tokens"], busy["score_s"] / max(busy["teachers"], 1)),
            "train": _rate(metrics.get("tokens/trained", 0.0), train_s),
        }
        metrics.update(timings)
        metrics.update({f"{stage}/tokens_per_s": speed for stage, speed in speeds.items()})
        # evaluations and checkpoints come now and then: they would make the ETA jump
        usual_s = wall_s - timings["time/evaluate_s"] - timings["time/commit_s"]
        self._step_s = usual_s if self._step_s is None else SMOOTHING * usual_s + (1 - SMOOTHING) * self._step_s
        progress: dict[str, Any] = {
            "phase": "training",
            "stage": self.stage,
            "total_steps": self.stop_step,
            "eta_s": round(self._step_s * (self.stop_step - step), 1),
            "bottleneck": _bottleneck(timings["time/wait_s"], train_s, speeds),
            "tokens_per_s": {stage: round(speed, 1) for stage, speed in speeds.items()},
            "last_metrics": metrics,
        }
        await self._jobs.metric(self._scope, step, metrics, stage=self.stage)
        self.on_metrics(step, metrics)
        await self._jobs.update(self._scope, step=step, progress=progress, usage=self._rounded_usage())
        self._export(step, metrics, progress["bottleneck"])

    def _timings(self, wall_s: float) -> dict[str, float]:
        timings = {
            f"time/{phase}_s": self._phases.get(phase, 0.0)
            for phase in ("train", "publish", "commit", "evaluate", "journal", "judge")
        }
        timings["time/wait_s"] = max(0.0, wall_s - sum(timings.values()))
        timings["time/step_s"] = wall_s
        for name, value in timings.items():
            exported.STEP_SECONDS.labels(name.removeprefix("time/").removesuffix("_s")).observe(value)
        return timings

    def _export(self, step: int, metrics: Mapping[str, float], bottleneck: str) -> None:
        """For /metrics. A step says nothing about what it has no value of: a skipped one has no loss."""
        job_id = self._scope.job_id
        exported.STEPS.inc()
        exported.SKIPPED_STEPS.inc(metrics.get("step/skipped", 0.0))
        exported.TRAINED_TOKENS.inc(metrics.get("tokens/trained", 0.0))
        for name, gauge in exported.OF_STEP.items():
            gauge.labels(job_id).set(metrics.get(name, math.nan))
        exported.JOB_STEP.labels(job_id).set(step)
        exported.JOB_STEPS.labels(job_id).set(self.stop_step)
        exported.LAST_STEP.labels(job_id).set_to_current_time()
        for role in exported.ROLES:
            exported.BOTTLENECK.labels(job_id, role).set(role == bottleneck)

    def _rounded_usage(self) -> dict[str, float]:
        return {name: round(value, 2) for name, value in self.usage.items()}


def _rate(tokens: float, seconds: float) -> float:
    return tokens / seconds if seconds > 0 else 0.0


def _bottleneck(wait_s: float, train_s: float, speeds: Mapping[str, float]) -> str:
    """The stage that would make the job faster if it were faster."""
    if train_s >= wait_s:
        return "trainer"
    running = {"sampler": speeds["sample"], "teacher": speeds["score"]}
    running = {role: speed for role, speed in running.items() if speed > 0}
    return min(running, key=lambda role: running[role], default="sampler")
