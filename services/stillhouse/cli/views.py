"""Two ways to show a followed job to logs and programs: a line per step, JSON lines. screen.py has that for people."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any, Final

from stillhouse.cli.console import count, duration, number, say
from stillhouse.cli.follow import Picture

KL: Final = "loss/reverse_kl/mean"
REWARD: Final = "reward/mean"
HISTORY_LINES: Final = 20
"""Steps printed when a watch begins in the middle of a job."""
STAGES: Final = ("sample", "score", "train")


class LineView:
    """A line per change of status and per step, for logs and pipes."""

    def __init__(self, write: Callable[[str], None] = say) -> None:
        self._write = write
        self._status = ""
        self._steps: set[int] | None = None
        self._evaluations: dict[int, str] = {}
        self._warnings: list[str] = []
        self._was_offline = False

    def show(self, picture: Picture) -> None:
        if (picture.offline_since is not None) != self._was_offline:
            self._was_offline = not self._was_offline
            self._write("the gateway does not answer; trying again" if self._was_offline else "the gateway is back")
        if not picture.job:
            return
        parts = (picture.status, str(picture.progress.get("phase", "")), stage_of(picture))
        status = " ".join(part for part in parts if part)
        if status != self._status and not picture.is_terminal:
            self._write(f"{picture.job.get('id', '')} {status}")
            self._status = status
        self._steps_of(picture)
        for step, found in picture.evaluations.items():
            if self._evaluations.get(step) != found["message"]:
                self._evaluations[step] = found["message"]
                self._write(found["message"])
        for warning in picture.warnings:
            if warning not in self._warnings:
                self._write(f"warning: {warning}")
        self._warnings = list(picture.warnings)
        if picture.is_terminal:
            self._write(outcome(picture))

    def _steps_of(self, picture: Picture) -> None:
        if self._steps is None:
            self._steps = set(sorted(picture.points)[:-HISTORY_LINES])
            if self._steps:
                self._write(f"... {len(self._steps)} earlier steps")
        for step in sorted(set(picture.points) - self._steps):
            self._steps.add(step)
            self._write(step_line(picture, step))


class JsonView:
    """One JSON object per line: {"type": "status" | "step" | "evaluation", ...}."""

    def __init__(self, write: Callable[[str], None] = say) -> None:
        self._write = write
        self._status: tuple[str, str] | None = None
        self._steps: dict[int, dict[str, float]] = {}
        self._evaluations: dict[int, dict[str, Any]] = {}

    def show(self, picture: Picture) -> None:
        for step in sorted(picture.points):
            values = picture.points[step]
            if self._steps.get(step) != values:
                self._steps[step] = values
                finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
                self._write(json.dumps({"type": "step", "step": step, "values": finite}))
        for step, found in picture.evaluations.items():
            if self._evaluations.get(step) != found:
                self._evaluations[step] = found
                self._write(json.dumps({"type": "evaluation", **found}))
        status = (picture.status, str(picture.progress.get("phase", "")))
        if picture.job and status != self._status:
            self._status = status
            line: dict[str, Any] = {"type": "status", "id": picture.job.get("id"), "status": status[0]}
            line |= {"phase": status[1], "stage": picture.progress.get("stage", "")}
            line |= {"step": picture.step, "total_steps": picture.total_steps}
            self._write(json.dumps(line | {"error": picture.job.get("error")}))


def step_line(picture: Picture, step: int) -> str:
    """`step 12/40  kl 0.123  loss 0.12  tok/s sample 230 score 800 train 400  eta 1m02s`."""
    values = picture.points[step]
    speeds = " ".join(f"{stage} {count(values.get(f'{stage}/tokens_per_s'))}" for stage in STAGES)
    parts = [
        f"step {step}/{picture.total_steps or '?'}",
        f"kl {number(values.get(KL))}",
        *([f"reward {number(values[REWARD])}"] if REWARD in values else []),
        f"loss {number(values.get('loss/total'))}",
        f"tok/s {speeds}",
        f"{number(values.get('time/step_s'), 3)} s",
    ]
    if step == picture.step and not picture.is_terminal:
        parts.append(f"eta {duration(picture.progress.get('eta_s'))}")
    return "  ".join(parts)


def outcome(picture: Picture) -> str:
    """The last line: how it ended, and what can be done now."""
    job_id, error = picture.job.get("id", ""), picture.job.get("error") or {}
    if picture.status == "succeeded":
        evaluation = (picture.job.get("result") or {}).get("evaluation") or {}
        kl = evaluation.get("reverse_kl")
        measured = f"; held-out reverse KL {number(kl['before'])} -> {number(kl['after'])} nats" if kl else ""
        if right := evaluation.get("accuracy"):
            measured += f", accuracy {number(right['before'], 3)} -> {number(right['after'], 3)}"
        return f"succeeded after {picture.step} steps{measured}\n  next: stillhouse download {job_id} -o student"
    if picture.status == "failed":
        reason = error.get("message") or picture.job.get("status_message") or "no reason given"
        code = f" ({error['code']})" if error.get("code") else ""
        return f"failed at step {picture.step}{code}: {reason}\n  more: stillhouse events {job_id}"
    return f"{picture.status} at step {picture.step}"


def stage_of(picture: Picture) -> str:
    """Which of several stages is on; "" where there is one."""
    names = [str(stage.get("name", "")) for stage in (picture.job.get("spec") or {}).get("stages", [])]
    name = str(picture.progress.get("stage") or "")
    if len(names) < 2 or name not in names:
        return ""
    return f"stage {name} ({names.index(name) + 1}/{len(names)})"
