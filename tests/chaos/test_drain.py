"""SIGTERM to each service in the middle of its work: it hands back, commits, exits 0, and nobody waits for a lease."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from itertools import pairwise

import pytest

from tests.chaos.harness import PATIENCE_S, Chaos, deployment, job, until

pytestmark = [pytest.mark.full, pytest.mark.timeout(400)]
LEASE_S = 30.0
"""Long: whoever has to wait for a lease to run out does not get its work done in time here."""
DRAIN_S = 20.0
"""Default of `drain_s`."""
RETAKEN_S = 10.0
"""Work that was handed back goes on: at once, plus what eight processes on two cores take to notice."""


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chaos]:
    with deployment(tmp_path_factory.mktemp("drain"), lease_s=LEASE_S) as running:
        yield running


@pytest.mark.parametrize("point", ["sampler.generating", "teacher.scoring", "trainer.mid_backward"])
def test_a_service_that_is_asked_to_stop_hands_its_work_on(patient: Chaos, point: str, chaos_seed: int) -> None:
    role = point.partition(".")[0]
    patient.wait_ready(sampler=2, teacher=2, trainer=2)
    patient.arm(point, "term", skip=3)
    job_id = patient.submit(job(f"drain-{point}-{chaos_seed}", steps=40))
    taken = until(lambda: patient.taken(point), f"a process to come to {point}")
    code, seconds = exit_of(patient, role, taken["pid"])
    record = patient.ended(job_id)
    gap_s = max(after - before for before, after in pairwise(patient.steps_at(job_id)))
    print(f"{point}: exit {code} after {seconds:.1f} s, longest time without a step {gap_s:.1f} s")
    assert code == 0
    assert seconds < DRAIN_S
    assert record.status == "succeeded", record.error
    assert gap_s < RETAKEN_S, "somebody waited for a lease to run out"
    assert patient.violations(job_id) == []


def test_a_gateway_that_is_asked_to_stop_answers_what_it_has_taken(patient: Chaos, chaos_seed: int) -> None:
    patient.wait_ready()
    patient.arm("gateway.job_json_written", "term")
    job_id = patient.submit(job(f"drain-gateway-{chaos_seed}"))
    taken = patient.taken("gateway.job_json_written")
    assert taken is not None
    code, seconds = exit_of(patient, "gateway", taken["pid"])
    assert code == 0
    assert seconds < DRAIN_S
    assert patient.ended(job_id).status == "succeeded"
    assert patient.violations(job_id) == []


def exit_of(chaos: Chaos, role: str, pid: int) -> tuple[int, float]:
    """(exit code of a process that was just asked to stop, as its supervisor saw it; seconds that took)."""
    started = time.monotonic()
    log = chaos.home / "logs" / "supervisor.log"
    name = next((name for name, running in chaos.pids(role).items() if running == pid), None)
    until(lambda: pid not in chaos.pids(role).values(), f"{name} to exit")
    names = re.escape(name) if name else rf"{role}-\d"
    pattern = re.compile(rf"^\S+ ({names}) exited with (\d+)", re.MULTILINE)
    found = until(lambda: pattern.findall(log.read_text()), f"{name or role} to exit", PATIENCE_S)
    return int(found[-1][1]), time.monotonic() - started
