"""The job of a run and what goes wrong in it: drawn from its seed before it starts."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, Final

from stillhouse.core.failpoints import POINTS
from stillhouse.core.spec import JobSpec

NEVER: Final = {"gateway.job_json_written", "gateway.record_written", "gateway.cancel_requested"}
"""Points where a process is not frozen: its one caller would only wait."""
PAUSING: Final = ("gateway.pause_requested", "gateway.resume_requested", "trainer.paused", "trainer.stopping")
"""Points that are reached in runs with a pause only, or almost."""
FULL_DISK: Final = ("disk.written", "disk.synced", "trainer.committing", "trainer.planned")
LEASE_S: Final = 2.0


@dataclass
class Fault:
    """One thing that goes wrong, at a named point or at a moment."""

    action: str
    point: str = ""
    """Name of a failpoint; empty = at `at_s`."""
    skip: int = 0
    """Visits of the point that pass before."""
    role: str = ""
    """Kind of process it happens to; empty = any."""
    at_s: float = 0.0
    seconds: float = 0.0
    """How long it lasts."""
    amount: float = 0.0
    """How bad it is."""
    is_done: bool = False

    def __str__(self) -> str:
        where = f"{self.point} after {self.skip} visits" if self.point else f"{self.at_s:.2f} s"
        size = f" for {self.seconds:.1f} s" if self.seconds else ""
        return f"{self.action} {self.role} at {where}{size}".replace("  ", " ")


POINT_ACTIONS: Final = ("kill", "kill", "kill", "freeze", "freeze", "raise", "term", "power", "full")
MOMENT_ACTIONS: Final = (
    "kill",
    "freeze",
    "term",
    "down",
    "flush",
    "lost",
    "lost",
    "refused",
    "slow",
    "rpc",
    "full",
    "power",
)
ROLES: Final = ("trainer", "trainer", "sampler", "teacher", "gateway")


def draw_faults(draw: random.Random, *, cancels: bool) -> list[Fault]:
    """Up to five faults."""
    faults = [_at_point(draw) if draw.random() < 0.6 else _at_moment(draw) for _ in range(draw.randint(0, 5))]
    if cancels:
        faults.append(Fault("cancel", at_s=draw.uniform(0.3, 4.0)))
    return faults


def draw_pauses(draw: random.Random) -> list[Fault]:
    """In every third run somebody pauses a job and resumes it, and who has to do it may die over it."""
    if draw.random() > 1 / 3:
        return []
    faults = [
        Fault("pause", at_s=draw.uniform(0.2, 5.0), seconds=draw.uniform(0.0, 8.0))
        for _ in range(draw.choice((1, 1, 2)))
    ]
    if draw.random() < 0.5:
        point = draw.choice(PAUSING)
        faults.append(Fault("kill", point, role=point.partition(".")[0]))
    return faults


def _at_point(draw: random.Random) -> Fault:
    point = draw.choice(sorted(POINTS.keys() - {*PAUSING[:3], "gateway.job_put_aside"}))
    action = draw.choice(POINT_ACTIONS)
    if action == "freeze" and point in NEVER:
        action = "kill"
    if action == "full" and point not in FULL_DISK:
        action = "kill"
    role = draw.choice(("trainer", "trainer", "gateway")) if point.startswith("disk.") else point.partition(".")[0]
    return Fault(action, point, draw.randint(0, draw.choice((2, 12))), role, seconds=_seconds(draw))


def _at_moment(draw: random.Random) -> Fault:
    action = draw.choice(MOMENT_ACTIONS)
    role = draw.choice(ROLES) if action in ("kill", "freeze", "term") else ""
    return Fault(
        action, role=role, at_s=draw.uniform(0.1, 5.0), seconds=_seconds(draw), amount=draw.choice((0.05, 0.3, 0.8))
    )


def _seconds(draw: random.Random) -> float:
    return LEASE_S * draw.choice((0.5, 1.5, 3.0, 6.0)) * draw.uniform(0.9, 1.1)


def draw_job(draw: random.Random) -> JobSpec:
    """A small job; every third has two stages."""
    per_step, size = draw.randint(1, 3), draw.choice((1, 2, 2, 3))
    return JobSpec.model_validate(
        _varied(
            {
                "student": {"model": "student"},
                "teachers": {"main": {"model": "teacher"}},
                "seed": draw.randint(0, 1000),
                "deterministic": draw.random() < 0.25,
                "max_failed_fraction": 0.6,
                "stages": [
                    {
                        "data": {"rows": [{"prompt": f"row {number}"} for number in range(draw.randint(3, 7))]},
                        "sampling": {"max_tokens": 6},
                        "loss": {"objective": draw.choice(("policy_gradient", "full_vocabulary"))},
                        "schedule": {
                            "steps": draw.randint(3, 7),
                            "prompts_per_step": per_step,
                            "group_size": size,
                            "max_staleness": draw.randint(0, 2),
                            "micro_batch_tokens": 24,
                        },
                    }
                ],
                "checkpoint": {"every_steps": draw.randint(1, 3), "keep_last": draw.randint(1, 3)},
            }
        )
    )


def _varied(spec: dict[str, Any]) -> dict[str, Any]:
    return _with_mixtures(_with_second_stage(_with_a_mix(_with_given_texts(spec))))


def _with_given_texts(spec: dict[str, Any]) -> dict[str, Any]:
    """Every third job trains on texts that the student did not write, all or half of them; some ask no teacher."""
    stage = spec["stages"][0]
    kind = random.Random(f"texts {spec['seed']}").choice(("",) * 8 + ("sft", "seq_kd", "gkd on data", "gkd"))
    if not kind:
        return spec
    stage["off_policy_source"] = "data" if kind in ("sft", "gkd on data") else "teacher"
    stage["on_policy_fraction"] = 0.5 if kind.startswith("gkd") else 0
    stage["loss"] = {"objective": "full_vocabulary" if kind.startswith("gkd") else "cross_entropy"}
    if stage["off_policy_source"] == "data":
        stage["schedule"]["group_size"] = 1
        stage["data"]["rows"] = [{**row, "completion": row["prompt"][-3:]} for row in stage["data"]["rows"]]
    return {**spec, "teachers": {}} if kind == "sft" else spec


def _with_a_mix(spec: dict[str, Any]) -> dict[str, Any]:
    """Every fourth job draws its prompts by share from the rows of two teachers."""
    draw = random.Random(f"mix {spec['seed']}")
    if not spec["teachers"] or draw.random() >= 0.25:
        return spec
    data = spec["stages"][0]["data"]
    for number, row in enumerate(data["rows"]):
        row["teacher"] = ("main", "second")[number % 2]
    data["mix"] = {"main": draw.choice((0.3, 1, 4)), "second": 1}
    return {**spec, "teachers": {"main": {"model": "teacher"}, "second": {"model": "teacher"}}}


def _with_second_stage(spec: dict[str, Any]) -> dict[str, Any]:
    """In every third job other rows, numbers and objective follow, and teachers behind a stage that has none."""
    draw = random.Random(f"stages {spec['seed']}")
    if draw.random() > 1 / 3:
        return spec
    teachers = list(spec["teachers"]) or ["main"]
    rows = [{"prompt": f"other {n}", "teacher": teachers[n % len(teachers)]} for n in range(draw.randint(3, 7))]
    second = {
        "name": "second",
        "data": {"rows": rows},
        "sampling": {"max_tokens": 5},
        "loss": {"objective": draw.choice(("policy_gradient", "full_vocabulary"))},
        "schedule": {
            "steps": draw.randint(2, 4),
            "prompts_per_step": draw.randint(1, 3),
            "group_size": draw.choice((1, 2)),
            "max_staleness": draw.randint(0, 2),
            "micro_batch_tokens": 32,
        },
    }
    return {**spec, "teachers": {name: {"model": "teacher"} for name in teachers}, "stages": [*spec["stages"], second]}


def _with_mixtures(spec: dict[str, Any]) -> dict[str, Any]:
    """Every third job has two teachers, and where its losses ask them, rows for one of them or for both."""
    draw = random.Random(f"mixtures {spec['seed']}")
    if not spec["teachers"] or draw.randrange(3):
        return spec
    for stage in spec["stages"]:
        is_scored = stage["loss"]["objective"] != "cross_entropy"
        for row in stage["data"]["rows"]:
            heavy = row.get("teacher") or draw.choice(("main", "second"))
            light = "second" if heavy == "main" else "main"
            row["teacher"] = draw.choice((heavy, {heavy: 0.7, light: 0.3} if is_scored else heavy))
    return {**spec, "teachers": {"main": {"model": "teacher"}, "second": {"model": "second"}}}
