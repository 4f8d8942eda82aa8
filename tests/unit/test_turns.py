"""Whose turn it is: priority, then the owner's share, then age."""

from __future__ import annotations

import random

from stillhouse.core.queue.turns import ActiveJob, in_turn


def waiting(job_id: str, owner: str = "a", priority: int = 0, status: str = "queued") -> ActiveJob:
    return ActiveJob(job_id, status, owner, priority, is_led=False)


def running(job_id: str, owner: str = "a") -> ActiveJob:
    return ActiveJob(job_id, "running", owner, 0, is_led=True)


def test_the_oldest_of_equals_comes_first() -> None:
    assert in_turn([waiting("old"), waiting("new")]) == ["old", "new"]


def test_priority_goes_before_share_and_age() -> None:
    jobs = [running("r"), waiting("old", "b"), waiting("urgent", "a", priority=1), waiting("late", "b", priority=-1)]
    assert in_turn(jobs) == ["urgent", "old", "late"]


def test_the_owner_with_the_least_running_work_comes_before_the_older_job() -> None:
    jobs = [running("r1"), running("r2"), running("r3", "b"), waiting("a1"), waiting("b1", "b"), waiting("c1", "c")]
    assert in_turn(jobs) == ["c1", "b1", "a1"]


def test_what_rests_or_is_led_has_no_turn() -> None:
    rests = [waiting(status, status=status) for status in ("pausing", "paused", "succeeded")]
    assert in_turn([running("r"), *rests, waiting("resumed", status="resuming")]) == ["resumed"]


def test_owners_who_keep_sending_get_even_shares_of_the_trainers() -> None:
    """Three owners with 40, 10 and 4 jobs waiting, two trainers: none has to wait for the end of another's heap."""
    draw = random.Random(20261128)
    heap = [("a", n) for n in range(40)] + [("b", n) for n in range(10)] + [("c", n) for n in range(4)]
    jobs = {f"{owner}{number}": waiting(f"{owner}{number}", owner) for owner, number in heap}
    led: list[str] = []
    turns: dict[str, int] = {}
    begun: list[str] = []
    while len(begun) < 12:
        active = [ActiveJob(j.id, j.status, j.owner, 0, j.id in led, turns.get(j.owner, 0)) for j in jobs.values()]
        begun.append(in_turn(active)[0])
        led.append(begun[-1])
        turns[begun[-1][0]] = len(begun)
        if len(led) == 2:
            del jobs[led.pop(draw.randrange(2))]
    assert begun[:2] == ["a0", "b0"]
    shares = [sum(job_id[0] == owner for job_id in begun) for owner in "abc"]
    assert min(shares) >= 3, f"{shares} of the first 12 turns"
