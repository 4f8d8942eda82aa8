"""A deterministic job of two stages with crashes equals the run without, bit for bit; also where they meet.

A claim may open from the checkpoint at a stage's end, or from one before it and replay journals of both stages: then
the learner changes stage in the middle of the replay.
"""

from __future__ import annotations

from typing import Any

import pytest

from stillhouse.core import failpoints
from stillhouse.core.oracle.verify import verify_job
from stillhouse.trainer import manifests
from tests.chaos.equality import assert_same, everything
from tests.chaos.test_deterministic import CrashAt, _disarmed, run
from tests.cluster import Cluster, job_spec

__all__ = ["_disarmed"]  # a fixture

FIRST, SECOND = 4, 4
"""Steps of the stages."""
COMMIT_EVERY = 3


def spec() -> dict[str, Any]:
    """Other rows, objective, groups, staleness, rate, averages and moments in each stage."""
    job = job_spec(
        deterministic=True,
        checkpoint={"every_steps": COMMIT_EVERY},
        evaluation={"data": {"rows": [{"prompt": "tea"}, {"prompt": "rain"}]}, "max_tokens": 6},
    )
    first = {
        **job["stages"][0],
        "name": "first",
        "loss": {"objective": "policy_gradient"},
        "optimizer": {"lr": 1e-2, "decay": "cosine", "ema_decay": 0.5},
        "schedule": {"steps": FIRST, "prompts_per_step": 2, "group_size": 2, "max_staleness": 1},
    }
    second = {
        **first,
        "name": "second",
        "data": {"rows": [{"prompt": f"tell {word}"} for word in ("six", "seven", "eight", "nine")]},
        "loss": {"objective": "full_vocabulary"},
        "optimizer": {"lr": 5e-3, "warmup_steps": 2, "ema_decay": 0.8},
        "schedule": {"steps": SECOND, "prompts_per_step": 3, "max_staleness": 2, "micro_batch_tokens": 64},
    }
    return {**job, "stages": [first, second]}


_baseline: list[dict[str, Any]] = []


async def baseline(deployment: Cluster) -> dict[str, Any]:
    """The run without crashes, once."""
    if not _baseline:
        _baseline.append(await run(deployment, spec()))
    return _baseline[0]


CRASHES: dict[str, list[tuple[str, int]]] = {
    "around the boundary": [
        ("trainer.stepped", FIRST),  # the last step of the first stage is journalled, its end not committed
        ("trainer.stage_ended", 1),
        ("trainer.journalled", FIRST + 1),  # the first of the second
    ],
}
MORE_CRASHES: dict[str, list[tuple[str, int]]] = {
    "while the end is committed": [("trainer.committing", 2)],
    "the end is committed": [("trainer.committed", 2)],
    "the second stage has begun": [("trainer.stage_begun", 1)],
    "in the second stage": [("trainer.mid_backward", FIRST + 2), ("trainer.replayed", 1)],
    "after the second stage's first commit": [("trainer.committed", 3)],
}


@pytest.mark.parametrize("points", CRASHES.values(), ids=CRASHES)
async def test_crashes_change_nothing(deployment: Cluster, points: list[tuple[str, int]]) -> None:
    expected = await baseline(deployment)
    assert_same(await run(deployment, spec(), CrashAt(*points)), expected)


@pytest.mark.full
@pytest.mark.parametrize("points", MORE_CRASHES.values(), ids=MORE_CRASHES)
async def test_more_crashes_change_nothing(deployment: Cluster, points: list[tuple[str, int]]) -> None:
    expected = await baseline(deployment)
    assert_same(await run(deployment, spec(), CrashAt(*points)), expected)


class RotAndCrash(CrashAt):
    """Damages the checkpoint of a step before the crash: the next claim has to open from an older one."""

    def __init__(self, deployment: Cluster, step: int, point: tuple[str, int]) -> None:
        super().__init__(point)
        self._deployment = deployment
        self._step = step

    def __call__(self, name: str, detail: str) -> None:
        was_open = list(self.open)
        try:
            super().__call__(name, detail)
        finally:
            if self.open != was_open:
                self._rot()

    def _rot(self) -> None:
        (job_id,) = self._deployment.ctx.artifacts.job_ids()
        artifacts = self._deployment.ctx.artifacts.job(job_id)
        (ref,) = [ref for ref in manifests.list_manifests(artifacts) if ref.step == self._step]
        (ref.folder(artifacts) / "model.safetensors").write_bytes(b"rotten")


async def test_a_replay_changes_stage_in_the_middle(deployment: Cluster) -> None:
    """The end of the first stage is damaged: journals of both stages are trained again, the end is committed anew."""
    job = spec()
    failpoints.install(RotAndCrash(deployment, FIRST, ("trainer.journalled", FIRST + 2)))
    record = await deployment.ended(job_id := await deployment.submit(job))
    failpoints.install(None)
    assert (record.status, record.epoch) == ("succeeded", 2), record.error
    artifacts = deployment.ctx.artifacts.job(job_id)
    replayed = [event["data"] for event in await deployment.ctx.jobs.events(job_id) if event["type"] == "job.rewound"]
    assert replayed[0]["to"] == FIRST + 2
    committed = {(ref.epoch, ref.step) for ref in manifests.list_manifests(artifacts)}
    assert (2, FIRST) in committed
    assert verify_job(artifacts, record).ok
    assert_same(everything(artifacts), await baseline(deployment))
