"""One cell of the sweep: a small job, one process that is killed, frozen or fails at one named point, and the verdict.

Most points are reached by any job. Some need something to happen before: a crash, so that there is something to replay;
a SIGTERM, so that there is something to drain; a user who cancels.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from stillhouse.core.failpoints import POINTS
from tests.chaos.harness import ENDS, PATIENCE_S, Chaos, clock, job, process_state, until

ACTIONS: Final = ("kill", "stop", "raise")
ONCE: Final = frozenset(
    f"trainer.{name}"
    for name in ("claimed", "epoch_made", "epoch_opened", "replayed", "exported", "ended", "stopping", "retaining")
) | {"trainer.stage_ended", "trainer.stage_begun", "sampler.draining", "teacher.draining"}
"""Points that a job reaches once or a few times: nothing is skipped there."""
ELSEWHERE: Final = frozenset(
    {
        "gateway.job_put_aside",
        "gateway.pause_requested",
        "gateway.resume_requested",
        "trainer.evaluated",
        "trainer.paused",
        "trainer.stop_recorded",
    }
)
"""Points that a pause, a deletion, an evaluation or an early end leads to: the cells do not lead there yet. Unit tests
and, for pauses, the simulation die there."""
SWEPT: Final = tuple(point for point in POINTS if point not in ELSEWHERE)
FILES: Final = ("opened.json", ".journal", "0000", "manifest.json", "final.json", "job.json")
"""What is being written when a disk.* point is hit; "0000" is a checkpoint's folder or a journal."""
SECOND_STAGE: Final = {
    "name": "second",
    "data": {"rows": [{"prompt": "something else"}, {"prompt": "and more"}]},
    "sampling": {"max_tokens": 8},
    "loss": {"objective": "policy_gradient"},
    "schedule": {"steps": 3, "prompts_per_step": 2},
}
"""Follows the first where a stage has to end."""
LONG_TOKENS: Final = 96
"""Completions that last long enough for a signal to arrive in the middle."""


@dataclass
class Cell:
    """What happened in a cell."""

    point: str
    action: str
    seed: int
    is_hit: bool = False
    role: str = ""
    detail: str = ""
    status: str = ""
    recovery_s: float | None = None
    """From the fault to the next trained step, or to the end of the job; at the gateway to the client's answer."""
    epochs: int = 0
    violations: list[str] = field(default_factory=list)

    @property
    def is_bad(self) -> bool:
        return bool(self.violations) or not self.is_hit

    def as_json(self) -> dict[str, Any]:
        facts = asdict(self)
        return {"hit": facts.pop("is_hit"), **facts}


def all_cells(seed: int) -> list[tuple[str, str]]:
    """Every point with every action, in an order that follows from the seed."""
    cells = [(point, action) for point in SWEPT for action in ACTIONS]
    random.Random(f"{seed}/order").shuffle(cells)
    return cells


def diagonal(seed: int) -> list[tuple[str, str]]:
    """Every point once; which action it gets rotates with the seed."""
    cells = [(point, ACTIONS[(seed + index) % len(ACTIONS)]) for index, point in enumerate(SWEPT)]
    random.Random(f"{seed}/order").shuffle(cells)
    return cells


def run_cell(chaos: Chaos, point: str, action: str, seed: int) -> Cell:
    """Run one cell. What goes wrong is in its violations; nothing is raised."""
    cell = Cell(point, action, seed)
    play = _Play(chaos, cell)
    try:
        play.run()
    except AssertionError as error:
        cell.violations.append(str(error)[:4000])
    finally:
        play.clients.shutdown(wait=False)
        chaos.disarm()
    return cell


class _Play:
    """The choreography of a cell."""

    def __init__(self, chaos: Chaos, cell: Cell) -> None:
        self.chaos = chaos
        self.cell = cell
        self.role = cell.point.partition(".")[0]
        self.draw = random.Random(f"{cell.seed}/{cell.point}/{cell.action}")
        self.name = f"{cell.point}-{cell.action}-{self.draw.randrange(16**6):06x}"
        self.job_id: str | None = None
        self.answered_at = 0.0
        self.clients = ThreadPoolExecutor(2, thread_name_prefix="client")

    @property
    def is_cancelled(self) -> bool:
        """A user cancels the job of this cell."""
        return self.cell.point == "gateway.cancel_requested" or (
            self.cell.point == "trainer.stopping" and self.cell.action == "stop"
        )

    def run(self) -> None:
        chaos, cell = self.chaos, self.cell
        chaos.disarm()
        chaos.wait_ready(**({} if self.role in ("gateway", "disk") else {self.role: 2}))
        with chaos.watched(lambda: self.job_id) as timeline:
            self._arm()
            answer = self.clients.submit(self._submit)
            self._provoke(answer)
            taken = self._wait_hit()
            if taken and cell.action == "stop":
                self._wake(taken)
            job_id = answer.result(PATIENCE_S)
            record = chaos.ended(job_id)
        if taken:
            cell.is_hit, cell.role, cell.detail = True, taken["role"], taken["detail"][:80]
            cell.recovery_s = self._recovery(job_id, taken)
        cell.status, cell.epochs = record.status, record.epoch
        expected = "cancelled" if self.is_cancelled else "succeeded"
        if record.status != expected:
            cell.violations.append(f"ended '{record.status}', expected '{expected}': {record.error}")
        cell.violations += timeline.backwards()
        cell.violations += self._twins(job_id)
        cell.violations += chaos.violations(job_id)

    # -- before the fault --------------------------------------------------------------------------------------------

    def _spec(self) -> dict[str, Any]:
        point, draw = self.cell.point, self.draw
        changes: dict[str, Any] = {"objective": draw.choice(("full_vocabulary", "policy_gradient"))}
        if point == "teacher.serving":
            changes["objective"] = "full_vocabulary"
        if draw.random() < 0.3:
            held_out = [{"prompt": "tea"}, {"prompt": "rain"}]
            changes["evaluation"] = {"data": {"rows": held_out}, "max_tokens": 6, "every_steps": 3}
        if point == "sampler.draining":
            changes["stages__0__sampling"] = {"max_tokens": LONG_TOKENS}
        if self.is_cancelled:
            changes["steps"] = 500
        elif point.endswith((".draining", ".stopping")):
            changes["steps"] = 40  # long enough for the signal to be noticed
        else:
            changes["steps"] = draw.randint(6, 9)
        spec = job(self.name, every_steps=2 if point == "trainer.retaining" else draw.choice((2, 3)), **changes)
        if point.startswith("trainer.stage_"):
            spec["stages"].append(SECOND_STAGE)
        return spec

    def _arm(self) -> None:
        point, order = self.cell.point, {}
        if self.role == "disk":
            order["match"] = self.draw.choice(FILES)
        elif point not in ONCE and self.role != "gateway":
            order["skip"] = self.draw.randint(0, 2)
        if point in ("trainer.committing", "trainer.committed"):
            order["skip"] = self.draw.randint(0, 1)
        self.chaos.arm(point, self.cell.action, **order)
        if point == "trainer.replayed":  # two steps are journalled and no checkpoint holds them
            self.chaos.arm("trainer.stepped", "kill", skip=1)
        if point == "trainer.stopping" and not self.is_cancelled:
            self.chaos.arm("trainer.stepped", "term", skip=2)

    def _submit(self) -> str:
        self.job_id = self.chaos.submit(self._spec())
        self.answered_at = time.time()
        return self.job_id

    def _provoke(self, answer: Future[str]) -> None:
        """Do what makes the process come to the point."""
        if self.is_cancelled:
            job_id = answer.result(PATIENCE_S)
            until(lambda: (record := self.chaos.record(job_id)) and record.step >= 1, "the first step")
            self.clients.submit(self.chaos.cancel, job_id)
        elif self.cell.point.endswith(".draining"):
            busy = {"sampler": "sampler.generating", "teacher": "teacher.scoring"}[self.role]
            answer.result(PATIENCE_S)
            # a signal that comes between two batches drains nothing: the next process is asked, too
            while not self._has_ended() and not self.chaos.taken(self.cell.point):
                self.chaos.arm(busy, "term", skip=self.draw.randint(0, 3))
                self._wait(lambda: self.chaos.taken(busy))
                self._wait_some(lambda: self.chaos.taken(self.cell.point), 2.0)

    def _has_ended(self) -> bool:
        record = self.chaos.record(self.job_id) if self.job_id else None
        return record is not None and record.status in ENDS

    def _wait(self, condition: Callable[[], Any]) -> Any:
        """Wait until `condition` holds or the job has ended."""
        until(lambda: condition() or self._has_ended(), f"{self.cell.point} or the end of the job")
        return condition()

    def _wait_some(self, condition: Callable[[], Any], seconds: float) -> Any:
        over = clock(seconds)
        until(lambda: condition() or over(), "a moment", seconds + PATIENCE_S)
        return condition()

    # -- the fault ---------------------------------------------------------------------------------------------------

    def _wait_hit(self) -> dict[str, Any] | None:
        """What happened at the point; None if the job ended without coming there."""

        def taken() -> dict[str, Any] | None:
            return self.chaos.taken(self.cell.point)

        return self._wait(taken) or self._wait_some(taken, 1.0)  # the last points of a job lie behind its end

    def _wake(self, taken: dict[str, Any]) -> None:
        """Let the lease of the frozen process run out, and another take over where one can; then wake it."""
        chaos, pid = self.chaos, taken["pid"]
        until(lambda: process_state(pid) == "T", f"{pid} to be frozen", 10)
        epoch = (record.epoch if (record := chaos.record(self.job_id)) else 0) if self.job_id else 0
        try:
            over = clock(2 * chaos.lease_s)
            until(over, "two leases", 4 * chaos.lease_s)
            if taken["role"] == "trainer" and self.job_id:
                job_id = self.job_id
                until(
                    lambda: self._has_ended() or ((now := chaos.record(job_id)) and now.epoch > epoch),
                    "another trainer to take over",
                )
        finally:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    # -- after it ----------------------------------------------------------------------------------------------------

    def _recovery(self, job_id: str, taken: dict[str, Any]) -> float | None:
        if taken["role"] == "gateway" and not self.is_cancelled:
            return round(self.answered_at - taken["at"], 2)
        return self.chaos.recovery_s(job_id, taken["at"])

    def _twins(self, job_id: str) -> list[str]:
        """One request, one job: in the queue server and, once the sweeper has looked, on the disk."""
        only = ([job_id], [job_id])
        try:
            until(lambda: self.chaos.named(self.name) == only, "one job", 20)
        except AssertionError:
            return [f"one request made (records, folders) {self.chaos.named(self.name)}, expected {only}"]
        return []
