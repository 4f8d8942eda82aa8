"""Zombie trainers: frozen past the lease, woken when another one leads. Nothing that they still write is accepted.

A late checkpoint does not stay: retention deletes what is on no lineage. So the control looks at once, not at the end.
"""

from __future__ import annotations

import os
import random
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from stillhouse.core.blobs import unsealed
from stillhouse.core.queue import keys
from tests.chaos.harness import Chaos, clock, job, process_state, until

POINTS = (
    ("trainer.journalled", {}),
    ("trainer.stepped", {}),
    ("trainer.published", {}),
    ("trainer.committing", {}),
    ("disk.synced", {"match": ".journal", "role": "trainer"}),  # the last moment before a journal's rename
    ("disk.synced", {"match": "-", "role": "trainer"}),  # and before a checkpoint's
    ("trainer.exported", {}),
    ("trainer.ended", {}),
)
RENAMES = "disk.synced"
"""Whoever freezes here writes as soon as it is woken: the test's control, without which a clean run says little."""
TRIES = int(os.environ.get("CHAOS_ZOMBIES", str(len(POINTS))))


@dataclass
class Zombie:
    """A trainer that was frozen with a job in its hands."""

    name: str
    pid: int
    epoch: int
    files: set[Path]
    """What it had written when it froze."""


@pytest.mark.full
@pytest.mark.timeout(900)
def test_no_commit_of_a_zombie_is_accepted(chaos: Chaos, chaos_seed: int) -> None:
    draw = random.Random(f"{chaos_seed}/zombies")
    accepted: list[str] = []
    late: list[str] = []
    for number in range(TRIES):
        point, order = POINTS[number % len(POINTS)]
        found, late_files = run_one(chaos, f"zombie-{chaos_seed}-{number}", point, order, draw)
        accepted += [f"{point}: {message}" for message in found]
        late += [f"{point}: {path.parent.name}/{path.name}" for path in late_files]
    print(f"seed {chaos_seed}: {TRIES} zombies wrote late: {late}")
    assert not accepted, f"seed {chaos_seed}: {accepted}"


def run_one(
    chaos: Chaos, name: str, point: str, order: dict[str, Any], draw: random.Random
) -> tuple[list[str], set[Path]]:
    """(stale work that was accepted, files that the zombie wrote after it had lost the job)."""
    chaos.wait_ready(trainer=2)
    if point not in ("trainer.exported", "trainer.ended"):
        order = {**order, "skip": draw.randint(0, 2)}
    chaos.arm(point, "stop", **order)
    objective = draw.choice(("full_vocabulary", "policy_gradient"))
    job_id = chaos.submit(job(name, objective=objective, steps=8))
    late: set[Path] = set()
    with chaos.watched(lambda: job_id) as timeline:
        taken = until(lambda: chaos.taken(point), f"a trainer to come to {point}")
        until(lambda: process_state(taken["pid"]) == "T", "it to freeze")
        zombie = freeze_frame(chaos, job_id, taken["pid"])
        if point == "trainer.ended":  # it has nothing left to lose
            until(clock(2 * chaos.lease_s), "two leases", 60)
        else:
            opened = chaos.job(job_id).epoch(zombie.epoch + 1) / "opened.json"
            until(opened.is_file, "another trainer to take over")
            if point == RENAMES:
                late = wake_before_another_claim(chaos, job_id, zombie)
            elif draw.random() < 0.5:  # woken when the other one is done; else while it works
                until(lambda: (record := chaos.record(job_id)) and record.is_terminal, "the job to end")
        if not late:
            os.kill(zombie.pid, signal.SIGCONT)
        record = chaos.ended(job_id)
        until(lambda: is_back(chaos, zombie), f"{zombie.name} to let go")
    found = timeline.backwards()
    if record.status != "succeeded":
        found.append(f"ended '{record.status}': {record.error}")
    if point != "trainer.ended":
        found += stale(chaos, job_id, zombie, record)
    return found + chaos.violations(job_id), late | late_files(chaos, job_id, zombie)


def wake_before_another_claim(chaos: Chaos, job_id: str, zombie: Zombie) -> set[Path]:
    """What a zombie renames into place when it wakes: there for certain when a third claim decides what to open from.

    The second one stands still meanwhile and then dies, since its next checkpoint would have the late one deleted.
    """
    heir = unsealed(chaos.job(job_id).epoch(zombie.epoch + 1) / "opened.json")["trainer"]
    chaos.kill(heir, signal.SIGSTOP)
    try:
        os.kill(zombie.pid, signal.SIGCONT)
        return until(lambda: late_files(chaos, job_id, zombie), f"{zombie.name} to write what it had lost")
    finally:
        chaos.kill(heir, signal.SIGKILL)


def freeze_frame(chaos: Chaos, job_id: str, pid: int) -> Zombie:
    record = chaos.record(job_id)
    assert record is not None
    name = next(name for name, running in chaos.pids().items() if running == pid)
    return Zombie(name, pid, record.epoch, files_of(chaos, job_id, record.epoch))


def files_of(chaos: Chaos, job_id: str, epoch: int) -> set[Path]:
    """Journals and checkpoints of an epoch, as they count: under their final names."""
    folder = chaos.job(job_id).epoch(epoch)
    return set(folder.glob("steps/*.journal")) | set(folder.glob("manifests/0*/manifest.json"))


def late_files(chaos: Chaos, job_id: str, zombie: Zombie) -> set[Path]:
    """What it wrote after it had lost the job, and retention has not deleted yet."""
    return files_of(chaos, job_id, zombie.epoch) - zombie.files


def is_back(chaos: Chaos, zombie: Zombie) -> bool:
    """It looks for work again, or a new process of its name does."""
    if chaos.pids().get(zombie.name) != zombie.pid:
        return True
    fields: Any = chaos.redis.hgetall(keys.service("trainer", zombie.name))
    return fields.get(b"state") == b"idle" and process_state(zombie.pid) != "T"


def stale(chaos: Chaos, job_id: str, zombie: Zombie, record: Any) -> list[str]:
    """What of the zombie's late work the job rests on."""
    artifacts, found = chaos.job(job_id), []
    if record.epoch <= zombie.epoch:
        found.append(f"the record is of epoch {record.epoch}, the zombie's was {zombie.epoch}")
    if (record.weights or {}).get("epoch") != record.epoch:
        found.append(f"the published weights are {record.weights}, the job ended in epoch {record.epoch}")
    if record.result and not record.result["export_path"].startswith(f"epochs/{record.epoch}/"):
        found.append(f"the export is {record.result['export_path']}, the job ended in epoch {record.epoch}")
    for epoch in range(zombie.epoch + 1, record.epoch + 1):
        opened = unsealed(artifacts.epoch(epoch) / "opened.json")
        base = opened["opened_from"]
        if base and base["epoch"] == zombie.epoch:
            found += missing(zombie, artifacts.manifests(zombie.epoch) / base["name"] / "manifest.json")
        for source, step in opened["replay"]:
            if source == zombie.epoch:
                found += missing(zombie, artifacts.journal(source, step))
    return found


def missing(zombie: Zombie, path: Path) -> list[str]:
    return [] if path in zombie.files else [f"the job rests on {path}, written after the zombie had lost it"]
