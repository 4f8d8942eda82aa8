"""A computation that hangs: the job says whose, the process ends, and the job succeeds with its successor."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stillhouse.core.errors import DeadlineError
from stillhouse.sampler.engines.decode import Decoder
from stillhouse.teacher.engines.transformers import TransformersEngine as TeacherEngine
from stillhouse.trainer import watch
from stillhouse.trainer.learner import Learner
from tests.cluster import cluster, job_spec
from tests.waiting import wait_until

COMPUTES: dict[str, tuple[Any, str]] = {
    "sampler": (Decoder, "run"),
    "teacher": (TeacherEngine, "score"),
    "trainer": (Learner, "step"),
}
HANG_S = 6.0


@pytest.fixture
def go_on() -> Iterator[threading.Event]:
    """Set at the end, so that the hung thread does not keep the tests from ending."""
    event = threading.Event()
    yield event
    event.set()


@pytest.mark.parametrize(
    "role", ["trainer", *(pytest.param(r, marks=pytest.mark.full) for r in ("sampler", "teacher"))]
)
async def test_a_hung_computation_ends_its_process_and_the_job_goes_on(
    tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch, go_on: threading.Event, role: str
) -> None:
    owner, method = COMPUTES[role]
    original, calls = getattr(owner, method), iter(range(1000))

    def hangs_once(self: Any, *args: Any, **kwargs: Any) -> Any:
        if next(calls) == 2:
            go_on.wait()
        return original(self, *args, **kwargs)

    monkeypatch.setattr(owner, method, hangs_once)
    monkeypatch.setattr(watch, "SILENT_S", 1.0)
    async with cluster(tmp_path, redis_url, "sampler", "teacher", "trainer", hang_s=HANG_S) as made:
        made.add_model("student", seed=1)
        made.add_model("teacher", seed=2)
        job_id = await made.submit(job_spec(stages__0__schedule={"steps": 8, "prompts_per_step": 3}))
        ctx, process = made._running[f"{role}-0"]
        if role != "trainer":

            async def is_said() -> bool:
                record = await made.ctx.jobs.get(job_id)
                return (record.status, record.status_reason) == ("stalled", f"{role}_silent")

            await wait_until(is_said, timeout_s=20, what=f"the job to say {role}_silent")
        await wait_until(process.done, timeout_s=HANG_S + 15, what=f"the {role} to end")
        with pytest.raises(DeadlineError, match=rf"computation of {role} '{role}-0' made no progress"):
            process.result()
        del made._running[f"{role}-0"]
        await ctx.close()
        await made.start(role, f"{role}-0")
        record = await made.ended(job_id)
        assert (record.status, record.step, record.usage["failed_samples"]) == ("succeeded", 8, 0), record.error
        assert record.epoch == (2 if role == "trainer" else 1)
