"""Watching a job with a fake REST client: what is printed, what it survives, how it ends."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

import pytest
from rich.console import Console

from stillhouse.cli import screen, views
from stillhouse.cli.console import count, duration, number, printable, size, sparkline
from stillhouse.cli.follow import Follower, Picture, follow
from stillhouse.core.errors import NotFoundError, UnavailableError
from stillhouse.core.schemas import Queue

KL = "loss/reverse_kl/mean"


class FakeJobs:
    """A job that makes one optimizer step per poll and then succeeds; steps in `outages` meet a dead gateway first."""

    def __init__(self, steps: int = 4, *, ends: str = "succeeded", outages: Iterable[int] = (), epoch: int = 1) -> None:
        self.steps, self.ends, self.epoch = steps, ends, epoch
        self.step = -1
        self.outages = set(outages)
        self.asked_from: list[int] = []
        self.rewound_at: int | None = None

    def get(self, job_id: str) -> dict[str, Any]:
        self.step += 1
        if self.step in self.outages:
            self.outages.discard(self.step)
            self.step -= 1
            raise UnavailableError("connection refused")
        is_done = self.step >= self.steps
        return {
            "id": job_id,
            "name": "demo",
            "status": self.ends if is_done else "running" if self.step else "starting",
            "epoch": self.epoch,
            "progress": {
                "step": min(self.step, self.steps),
                "total_steps": self.steps,
                "phase": "training" if self.step else "loading",
                "eta_s": 5.0 * (self.steps - self.step),
                "bottleneck": "teacher",
                "tokens_per_s": {"sample": 230.0, "score": 1800.0, "train": 410.0},
            },
            "error": {"code": "non_finite", "message": "the loss is NaN"}
            if self.ends == "failed" and is_done
            else None,
        }

    def metrics(self, job_id: str, *, step_from: int = 0) -> list[dict[str, Any]]:
        self.asked_from.append(step_from)
        return [
            {"epoch": self.epoch, "step": step, "values": self.values(step)}
            for step in range(max(1, step_from), min(self.step, self.steps) + 1)
        ]

    def values(self, step: int) -> dict[str, float | None]:
        return {KL: 2.0 / step / self.epoch, "loss/total": None, "staleness/max": 1.0, "sample/tokens_per_s": 230.0}

    def events(self, job_id: str, *, after: str = "") -> list[dict[str, Any]]:
        if not after and self.step >= 2:
            return [{"id": "1-0", "level": "warning", "message": "sampler-0 is gone", "type": "service.lost"}]
        return []


def run(jobs: FakeJobs, view: Any) -> int:
    return follow(Follower(jobs, "job_1"), view, pause=lambda _: None)


def test_lines_name_every_step_once_and_the_end() -> None:
    lines: list[str] = []
    assert run(FakeJobs(), views.LineView(lines.append)) == 0
    assert lines[:2] == ["job_1 starting loading", "job_1 running training"]
    steps = [line for line in lines if line.startswith("step ")]
    assert [line.split()[1] for line in steps] == ["1/4", "2/4", "3/4", "4/4"]
    assert "kl 2  loss -  tok/s sample 230 score - train -" in steps[0]
    assert "eta 15s" in steps[0]
    assert "eta" not in steps[-1]
    assert lines.count("warning: sampler-0 is gone") == 1
    assert lines[-1].startswith("succeeded after 4 steps")
    assert "stillhouse download job_1" in lines[-1]


def test_a_job_with_rewards_shows_them() -> None:
    class Rewarded(FakeJobs):
        def values(self, step: int) -> dict[str, float | None]:
            return {"reward/mean": 0.25 * step, "loss/total": 0.0}

    lines: list[str] = []
    assert run(Rewarded(), views.LineView(lines.append)) == 0
    steps = [line for line in lines if line.startswith("step ")]
    assert "kl -  reward 0.25  loss 0" in steps[0]
    follower = Follower(Rewarded(), "job_1")
    for _ in range(4):
        follower.poll()
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(screen.screen(follower.picture, 80))
    assert "reward" in console.export_text()


@pytest.mark.parametrize(("ends", "code"), [("succeeded", 0), ("failed", 1), ("cancelled", 2)])
def test_exit_code_is_the_result(ends: str, code: int) -> None:
    lines: list[str] = []
    assert run(FakeJobs(ends=ends), views.LineView(lines.append)) == code
    assert lines[-1].startswith(ends)
    assert ("the loss is NaN" in lines[-1]) == (ends == "failed")


def test_a_restarting_gateway_is_waited_for() -> None:
    lines: list[str] = []
    jobs = FakeJobs(outages=[1, 3])
    assert run(jobs, views.LineView(lines.append)) == 0
    assert lines.count("the gateway does not answer; trying again") == lines.count("the gateway is back") == 2
    assert [line.split()[1] for line in lines if line.startswith("step ")] == ["1/4", "2/4", "3/4", "4/4"]


def test_an_unknown_job_is_not_waited_for() -> None:
    class Nothing(FakeJobs):
        def get(self, job_id: str) -> dict[str, Any]:
            raise NotFoundError(f"no job '{job_id}'")

    with pytest.raises(NotFoundError):
        run(Nothing(), views.LineView(lambda _: None))


def test_a_job_that_was_there_is_waited_for_but_not_forever() -> None:
    jobs, times = FakeJobs(), iter((0.0, 599.0, 601.0))
    follower = Follower(jobs, "job_1", clock=lambda: next(times))
    follower.poll()

    def gone(job_id: str) -> dict[str, Any]:
        raise NotFoundError(f"no job '{job_id}'")

    jobs.get = gone
    for _ in range(2):
        assert follower.poll().offline_since == 0.0
    with pytest.raises(UnavailableError, match=r"10 minutes.*no job 'job_1'"):
        follower.poll()


def test_a_gateway_that_never_answered_is_not_waited_for() -> None:
    with pytest.raises(UnavailableError):
        run(FakeJobs(outages=[0]), views.LineView(lambda _: None))


def test_only_new_metrics_are_asked_for_until_a_takeover_repeats_steps() -> None:
    jobs = FakeJobs(steps=10)
    follower = Follower(jobs, "job_1")
    for _ in range(5):
        follower.poll()
    assert jobs.asked_from == [0, 0, 1, 2, 3]
    assert follower.picture.points[1][KL] == 2.0
    jobs.epoch = 2
    follower.poll()
    assert jobs.asked_from[-1] == 0
    assert follower.picture.points[1][KL] == 1.0, "the newest of a repeated step wins"


def test_a_watch_that_begins_late_prints_only_the_last_steps() -> None:
    lines: list[str] = []
    jobs = FakeJobs(steps=100)
    jobs.step = 98
    run(jobs, views.LineView(lines.append))
    assert "... 79 earlier steps" in lines
    assert len([line for line in lines if line.startswith("step ")]) == 21


def test_json_lines_are_json_also_where_a_metric_is_not_finite() -> None:
    lines: list[str] = []
    run(FakeJobs(), views.JsonView(lines.append))
    records = [json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON")) for line in lines]
    assert [record["step"] for record in records if record["type"] == "step"] == [1, 2, 3, 4]
    assert [record["status"] for record in records if record["type"] == "status"] == [
        "starting",
        "running",
        "succeeded",
    ]
    assert records[-1]["status"] == "succeeded"


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_screen_shows_what_matters_at_any_width(width: int) -> None:
    jobs = FakeJobs(steps=30)
    follower = Follower(jobs, "job_1")
    for _ in range(20):
        follower.poll()
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(screen.screen(follower.picture, width))
    text = console.export_text()
    for part in ("job_1", "running", "step 19/30", "reverse KL", "tokens/s", "teacher", "sampler-0 is gone"):
        assert part in text, text
    assert all(len(line) <= width for line in text.splitlines())
    follower.picture.offline_since = 0.0
    console.print(screen.screen(follower.picture, width))
    assert "has not answered for" in " ".join(console.export_text().split())


def test_sparkline_follows_the_curve() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([]) == ""
    assert sparkline([3.0, 3.0]) == "▄▄"
    assert sparkline([0, math.nan, 7]) == "▁ █"
    assert sparkline([math.nan]) == " "
    falling = [1 / (step + 1) for step in range(1000)]
    line = sparkline(falling, 20)
    assert len(line) == 20
    assert list(line) == sorted(line, reverse=True), "averaging keeps a falling curve falling"


def test_numbers_for_people() -> None:
    assert [duration(s) for s in (0, 59.6, 185, 7620, 360_000, None)] == ["0s", "1m00s", "3m05s", "2h07m", "4d04h", "-"]
    assert [size(b) for b in (0, 1023, 1536, 150 << 20, 5 << 40)] == ["0 B", "1023 B", "1.5 KiB", "150 MiB", "5120 GiB"]
    assert [count(c) for c in (7, 1234, 135e6, 2.5e9, None, math.nan)] == ["7", "1.2k", "135M", "2.5B", "-", "-"]
    assert [number(n) for n in (0.123456, 12345.6, None, math.inf)] == ["0.1235", "1.235e+04", "-", "-"]


class Evaluated(FakeJobs):
    """Held-out measures before the first step and after the last, of two teachers."""

    def events(self, job_id: str, *, after: str = "") -> list[dict[str, Any]]:
        found = [self.evaluation(0)] if not after else []
        return [*found, self.evaluation(self.steps)] if self.step == self.steps else found

    def evaluation(self, step: int) -> dict[str, Any]:
        kls = {"math": 2.0 / (1 + step), "code": 4.0 / (1 + step)}
        by_teacher = {name: {"reverse_kl": kl, "num_prompts": 2} for name, kl in kls.items()}
        by_teacher["math"]["accuracy"] = step / 8
        data = {"step": step, "averaged": False, "reverse_kl": 3.0 / (1 + step), "accuracy": step / 8}
        message = f"step {step}: held-out reverse KL"
        return {"id": f"1-{step}", "type": "evaluation", "message": message, "data": data | {"by_teacher": by_teacher}}


def test_held_out_measures_are_shown_by_teacher() -> None:
    lines: list[str] = []
    run(Evaluated(), views.LineView(lines.append))
    assert [lines.count(f"step {step}: held-out reverse KL") for step in (0, 4)] == [1, 1]
    run(Evaluated(), views.JsonView(lines.append))
    found = [json.loads(line) for line in lines if '"evaluation"' in line]
    assert [line["by_teacher"]["math"]["accuracy"] for line in found] == [0.0, 0.5]

    follower = Follower(Evaluated(), "job_1")
    for _ in range(5):
        follower.poll()
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(screen.screen(follower.picture, 100))
    rows = {line.split("reverse KL")[0].strip(): line for line in console.export_text().splitlines()}
    assert "reverse KL 3 -> 0.6   accuracy 0 -> 0.5" in rows["held out"]
    assert "reverse KL 2 -> 0.4   accuracy 0 -> 0.5" in rows["math"]
    assert rows["code"].rstrip().endswith("reverse KL 4 -> 0.8")


def shown(picture: Any, width: int = 100) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(screen.screen(picture, width))
    return console.export_text()


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ("queued", "● queued  ○ validating  ○ starting  ○ running  ○ succeeded"),
        ("starting", "✓ queued  ✓ validating  ● starting  ○ running  ○ succeeded"),
        ("paused", "✓ queued  ✓ validating  ✓ starting  ● paused  ○ succeeded"),
        ("cancelling", "✓ queued  ✓ validating  ✓ starting  ● cancelling  ○ succeeded"),
        ("failed", "✓ queued  ✓ validating  ✓ starting  ✓ running  ✗ failed"),
        ("succeeded", "✓ queued  ✓ validating  ✓ starting  ✓ running  ✓ succeeded"),
    ],
)
def test_the_phases_of_a_job_stand_in_a_line(status: str, expected: str) -> None:
    assert screen.phases(Picture(job={"id": "job_1", "status": status})).plain.rstrip() == expected


def test_the_screen_has_a_curve_for_each_teacher_and_a_gauge_for_each_queue() -> None:
    class Queues:
        def queues(self) -> list[Queue]:
            full = Queue(role="sampler", waiting=3, in_work=2)
            return [full, Queue(role="teacher", model="big", waiting=0, in_work=0)]

    class TwoTeachers(FakeJobs):
        def values(self, step: int) -> dict[str, float | None]:
            return {KL: 2.0 / step, "loss/reverse_kl/math": 1.0 / step, "loss/reverse_kl/code": 3.0 / step}

    follower = Follower(TwoTeachers(), "job_1", services=Queues())
    for _ in range(3):
        follower.poll()
    text = shown(follower.picture)
    rows = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert "█" in rows["math"]
    assert "3 at first" in rows["code"]
    assert "sampler ██░░░ 2 in work, 3 waiting" in text
    assert "big" not in text, "an empty queue is no news"
    assert "bottleneck: teacher" in text


def test_nothing_that_users_or_models_write_steers_the_terminal() -> None:
    assert (
        printable("a\x1b[31mb\u202ec\x07\n\td é 日本 👩\u200d🚀") == "a\\x1b[31mb\\u202ec\\x07\n\td é 日本 👩\u200d🚀"
    )
    job = {"id": "job_1", "status": "running", "name": "x\x1b]0;title\x07"}
    assert "\x1b" not in shown(Picture(job=job, warnings=["\x1b[2J"]))
