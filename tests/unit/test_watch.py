"""What a job says it waits for, and the pulse that tells a slow computation from a hung one."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stillhouse.core import pulse
from stillhouse.core.errors import DeadlineError
from stillhouse.core.pulse import BULK, Pulse
from stillhouse.core.queue.jobs import JobRecord
from stillhouse.core.queue.registry import ServiceInfo
from stillhouse.core.queue.streams import Scope
from stillhouse.core.worker import ComputeThread
from stillhouse.trainer import watch
from stillhouse.trainer.train import LearnerThread
from tests.waiting import wait_until

JOB = "job_a"


def service(
    role: str,
    state: str = "waiting",
    *,
    job_id: str = JOB,
    silent_s: float = 0.0,
    transfer_silent_s: float = 0.0,
    problem: str = "",
    number: int = 0,
) -> ServiceInfo:
    extra = {"silent_s": f"{silent_s:.1f}", "transfer_silent_s": f"{transfer_silent_s:.1f}", "problem": problem}
    return ServiceInfo(role, f"{role}-{number}", "a:1", 1, 0.0, 0.0, state=state, job_id=job_id, extra=extra)


class Job:
    """A record, its events, and a `Watch` over them that looks at the services given."""

    def __init__(
        self,
        status: str = "running",
        size: int = 1,
        idle_s: float = 0.0,
        min_samplers: int = 1,
        needs_teachers: bool = True,
    ) -> None:
        self.record: dict[str, Any] = {"status": status, "status_reason": "", "status_message": ""}
        self.events: list[dict[str, Any]] = []
        self.pool = SimpleNamespace(
            size=size,
            has=lambda instance: instance == "sampler-0",
            has_started=status == "running" and min_samplers > 0,
        )
        self.idle_s = idle_s
        self.updates = 0
        self.present: list[ServiceInfo] = []
        settings = SimpleNamespace(hang_s=300.0)
        ctx: Any = SimpleNamespace(instance="trainer-0", jobs=self, registry=self, redis=self, settings=settings)
        pool: Any = self.pool
        self._watch = watch.Watch(
            ctx,
            Scope(JOB, 1),
            interrupt=Any,  # type: ignore[arg-type]  # not asked
            samplers=pool,
            min_samplers=lambda: min_samplers,
            status=lambda: status,
            idle_s=lambda: self.idle_s,
            needs_teachers=lambda: needs_teachers,
        )

    async def services(self) -> list[ServiceInfo]:
        return self.present

    async def info(self, _: str) -> dict[str, int]:
        return {"used_memory": 1, "maxmemory": 0}

    async def update(self, _: Scope, *, allowed: tuple[str, ...], **fields: Any) -> None:
        assert self.record["status"] in allowed
        self.updates += 1
        self.record |= fields

    async def event(self, _: str, kind: str, message: str, *, level: str, **data: Any) -> None:
        self.events.append({"type": kind, "level": level, "message": message, **data})

    async def look(self, *present: ServiceInfo) -> tuple[str, str]:
        self.present = list(present)
        await self._watch._tell(JobRecord(JOB, spec={}, created_at=0.0, **self.record))
        return self.record["status"], self.record["status_reason"]


async def test_a_job_that_asks_no_teacher_does_not_miss_one() -> None:
    assert await Job(needs_teachers=False).look(service("sampler")) == ("running", "")
    assert await Job(needs_teachers=True).look(service("sampler")) == ("stalled", "no_teacher")
    assert await Job(needs_teachers=False, size=0, min_samplers=0).look() == ("running", "")


WELL = (service("sampler"), service("teacher"))
SILENT_S, QUIET_S = watch.SILENT_S + 1, watch.QUIET_S + 1


@pytest.mark.parametrize("status", ["starting", "running"])
@pytest.mark.parametrize(
    ("present", "size", "idle_s", "reason"),
    [
        (WELL, 1, 0.0, ""),
        ([service("teacher")], 0, 0.0, "no_sampler"),
        ([service("sampler")], 1, 0.0, "no_teacher"),
        ([service("sampler", "sampling", silent_s=SILENT_S), service("teacher")], 1, SILENT_S, "sampler_silent"),
        ([service("sampler"), service("teacher", "scoring", silent_s=SILENT_S)], 1, SILENT_S, "teacher_silent"),
        (WELL, 1, QUIET_S, "no_progress"),
        # slow is not silent: tokens come, but no completion ended for minutes
        ([service("sampler", "sampling", silent_s=30.0), service("teacher")], 1, 1000.0, ""),
        # the teacher is busy for another job, and our turn comes
        ([service("sampler"), service("teacher", "scoring", job_id="job_b")], 1, QUIET_S, ""),
        # a sampler of another job is no help
        ([service("sampler", "sampling", job_id="job_b"), service("teacher")], 1, QUIET_S, "no_progress"),
        # the weights do not come through
        ([service("sampler", "pulling", transfer_silent_s=QUIET_S), service("teacher")], 1, QUIET_S, "no_weights"),
        # it was leased and cannot load the student, or loads it still, or another one samples
        ([service("sampler", "idle", job_id="", problem="gone"), service("teacher")], 1, QUIET_S, "no_student"),
        ([service("sampler", "loading", job_id="", problem="gone"), service("teacher")], 1, QUIET_S, "no_student"),
        ([service("sampler", "loading", job_id=""), service("teacher")], 1, QUIET_S, ""),
        (
            [service("sampler", "idle", job_id="", problem="gone"), service("sampler", "sampling", number=1), WELL[1]],
            2,
            QUIET_S,
            "",
        ),
        # a large model is being loaded or pulled: longer patience, but not for ever
        ([service("sampler", "pulling"), service("teacher")], 1, QUIET_S, ""),
        ([service("sampler", "pulling"), service("teacher")], 1, watch.NO_PROGRESS_S + 1, "no_progress"),
    ],
)
async def test_a_job_is_stalled_with_the_reason_and_only_then(
    status: str, present: Any, size: int, idle_s: float, reason: str
) -> None:
    job = Job(status, size, idle_s)
    assert await job.look(*present) == ("stalled" if reason else status, reason)
    assert bool(job.record["status_message"]) == bool(reason)


async def test_a_job_repeats_why_its_samplers_cannot_begin() -> None:
    job = Job(idle_s=QUIET_S)
    await job.look(service("sampler", "idle", job_id="", problem="model 'm': a file changed"), service("teacher"))
    assert job.record["status_message"] == "sampler 'sampler-0': model 'm': a file changed"


async def test_a_stalled_job_goes_back_by_itself_and_says_each_thing_once() -> None:
    job = Job()
    for _ in range(3):
        assert await job.look(service("sampler")) == ("stalled", "no_teacher")
    for _ in range(3):
        assert await job.look(*WELL) == ("running", "")
    assert job.updates == 2
    assert [(event["type"], event["level"], event["status"], event["reason"]) for event in job.events] == [
        ("job.status", "warning", "stalled", "no_teacher"),
        ("job.status", "info", "running", ""),
    ]


async def test_a_job_that_the_sweeper_took_for_orphaned_goes_back() -> None:
    job = Job()
    job.record |= {"status": "stalled", "status_reason": "no_trainer"}
    assert await job.look(*WELL) == ("running", "")


async def test_waiting_for_more_samplers_is_no_stall_but_having_none_is() -> None:
    waiting = Job("starting", size=0, min_samplers=2)
    assert await waiting.look(service("sampler", job_id="job_b"), service("teacher")) == ("starting", "")
    running = Job("running", size=0)
    assert await running.look(service("sampler", job_id="job_b"), service("teacher")) == ("stalled", "no_sampler")
    assert "serve other jobs" in running.record["status_message"]


# -- the pulse ---------------------------------------------------------------------------------------------------------


async def test_a_call_that_beats_is_not_hung_and_one_that_stops_is() -> None:
    compute, go_on, has_started = ComputeThread("test"), threading.Event(), threading.Event()

    def beat_for_a_while() -> None:
        started = time.monotonic()
        while time.monotonic() - started < 0.6:
            compute.pulse.beat()
            time.sleep(0.01)
        has_started.set()
        go_on.wait(10)

    call = asyncio.create_task(compute.run(beat_for_a_while))
    guard = asyncio.create_task(compute.pulse.watch("sampler 's'", 0.3))
    try:
        with pytest.raises(DeadlineError, match=r"sampler 's' made no progress for 0 s \(setting hang_s 0.3 s\)"):
            await asyncio.wait_for(guard, 5)
        assert has_started.is_set(), "longer than hang_s, but with progress"
    finally:
        go_on.set()
    await call
    assert compute.pulse.silent_s() == 0.0
    compute.close()


def test_loading_has_more_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(pulse.time, "monotonic", lambda: now)
    own = Pulse()
    with own.work(patience=BULK):
        now += 9.0
        assert not own.is_hung(1.0)
        now += 2.0
        assert own.is_hung(1.0)
    assert not own.is_hung(1.0)
    own.beat()
    assert own.silent_s() == 0.0, "a late callback of a call that has ended starts nothing"


async def test_a_hung_learner_is_not_waited_for() -> None:
    learner, go_on = LearnerThread(hang_s=0.1), threading.Event()
    call = asyncio.create_task(learner.call(go_on.wait, 10))
    try:
        await wait_until(lambda: learner.pulse.is_hung(0.1), timeout_s=5, what="the call to count as hung")
        await asyncio.wait_for(asyncio.to_thread(learner.close), 1)
    finally:
        go_on.set()
    await call


BLOCKED = """
import threading
from stillhouse.core.service import main
from stillhouse.core.worker import ComputeThread

class Blocked:
    def __init__(self, ctx):
        self._compute = ComputeThread("sampler", ctx.pulse)
    def register(self, server): pass
    def state(self): return "sampling", ""
    async def run(self):
        try:
            await self._compute.run(threading.Event().wait)
        finally:
            self._compute.close()

main("sampler", Blocked)
"""


def test_a_process_whose_computation_hangs_ends_with_exit_code_1(redis_url: str, tmp_path: Path) -> None:
    env = {key: value for key, value in os.environ.items() if not key.startswith("STILLHOUSE_")} | {
        "STILLHOUSE_HOME": str(tmp_path),
        "STILLHOUSE_REDIS_URL": redis_url,
        "STILLHOUSE_INTERNAL_TOKEN": "internal-token-of-the-tests",
        "STILLHOUSE_INSTANCE": "sampler-7",
        "STILLHOUSE_HANG_S": "0.5",
    }
    ended = subprocess.run([sys.executable, "-c", BLOCKED], env=env, capture_output=True, text=True, timeout=20)
    assert ended.returncode == 1, ended.stderr
    said = ended.stdout + ended.stderr
    assert "the computation of sampler 'sampler-7' made no progress" in said
    assert "Traceback" not in said, "a known end, in one line"
