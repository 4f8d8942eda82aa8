"""A link that swallows what is sent: heartbeats go on, but no weights or payloads arrive. The job says so in time."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from stillhouse.teacher.service import TeacherServicer
from stillhouse.trainer.service import TrainerServicer
from tests.cluster import cluster, job_spec
from tests.waiting import wait_until

pytestmark = [pytest.mark.full, pytest.mark.timeout(120)]
STALLED_S = 15.0


@pytest.mark.parametrize(
    ("servicer", "method", "reason"),
    [(TrainerServicer, "FetchWeights", "no_weights"), (TeacherServicer, "FetchScore", "no_progress")],
)
async def test_a_silent_link_stalls_the_job_and_it_goes_on_when_the_link_is_back(
    tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch, servicer: Any, method: str, reason: str
) -> None:
    original, is_open, cut_at = getattr(servicer, method), asyncio.Event(), list[float]()
    calls = iter(range(1000))

    async def swallowed(self: Any, request: Any, context: Any) -> Any:
        if next(calls) == 3:
            cut_at.append(time.monotonic())
        if cut_at:
            await asyncio.wait_for(is_open.wait(), 60)
        async for part in original(self, request, context):
            yield part

    monkeypatch.setattr(servicer, method, swallowed)
    async with cluster(tmp_path, redis_url, "sampler", "teacher", "trainer") as made:
        made.add_model("student", seed=1)
        made.add_model("teacher", seed=2)
        job_id = await made.submit(job_spec(stages__0__schedule={"steps": 8, "prompts_per_step": 3}))

        async def is_stalled() -> str:
            record = await made.ctx.jobs.get(job_id)
            return record.status_reason if record.status == "stalled" else ""

        assert await wait_until(is_stalled, timeout_s=40, what="the job to be stalled") == reason
        seconds = time.monotonic() - cut_at[0]
        is_open.set()
        print(f"{method} swallowed: {reason} after {seconds:.1f} s")
        record = await made.ended(job_id)
        assert (record.status, record.step, record.usage["failed_samples"]) == ("succeeded", 8, 0), record.error
        assert seconds <= STALLED_S
