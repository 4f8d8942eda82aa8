"""Arming points by files: who acts, when, and how often."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from stillhouse.core.failpoints import POINTS, FileHandler, InjectedError
from tests.chaos.harness import process_state, until

POINT = "sampler.sampled"
SOURCES = Path(__file__).resolve().parents[2] / "services" / "stillhouse"


def arm(folder: Path, **order: object) -> None:
    (folder / f"{POINT}.armed").write_text(json.dumps({"action": "raise", **order}))


def acted(handler: FileHandler, detail: str = "") -> bool:
    try:
        handler(POINT, detail)
    except InjectedError:
        return True
    return False


def test_one_visit_acts_once_and_says_where(tmp_path: Path) -> None:
    first, second = FileHandler(tmp_path, "sampler"), FileHandler(tmp_path, "sampler")
    arm(tmp_path)
    assert [acted(first, "3/0"), acted(second), acted(first)] == [True, False, False]
    hit = json.loads((tmp_path / f"{POINT}.hit").read_text())
    assert (hit["role"], hit["detail"]) == ("sampler", "3/0")


def test_role_match_and_skip_choose_the_visit(tmp_path: Path) -> None:
    handler, other = FileHandler(tmp_path, "sampler"), FileHandler(tmp_path, "teacher")
    arm(tmp_path, role="sampler", match="3/", skip=2)
    assert not acted(other, "3/0")
    assert [acted(handler, name) for name in ("3/0", "1/0", "3/1", "3/2")] == [False, False, False, True]


def test_times_arms_again_until_it_has_acted_so_often(tmp_path: Path) -> None:
    handlers = [FileHandler(tmp_path, "sampler") for _ in range(2)]
    arm(tmp_path, match="3/0", times=3)
    assert [acted(handlers[visit % 2], "3/0") for visit in range(5)] == [True, True, True, False, False]
    assert not acted(handlers[0], "4/0")


STOPS_IN_A_THREAD = """
import sys, threading
from stillhouse.core.failpoints import act
def work():
    act("stop", "disk.synced")
    print("ran on", flush=True)
thread = threading.Thread(target=work)
thread.start()
while thread.is_alive():  # busy, so that both threads are there to take the signal
    pass
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc says who is stopped")
def test_a_stop_in_a_worker_thread_freezes_there(tmp_path: Path) -> None:
    for number in range(20):
        output = tmp_path / f"{number}.txt"
        with output.open("wb") as stream:
            process = subprocess.Popen([sys.executable, "-c", STOPS_IN_A_THREAD], stdout=stream)
        try:
            until(lambda pid=process.pid: process_state(pid) == "T", "it to freeze", 30)
            assert output.read_bytes() == b"", "the thread ran on past the point"
            process.send_signal(signal.SIGCONT)
            assert process.wait(30) == 0
            assert output.read_bytes() == b"ran on\n"
        finally:
            process.kill()
            process.wait()


@pytest.mark.parametrize("point", POINTS)
def test_every_point_stands_somewhere_in_the_code(point: str) -> None:
    assert any(f'failpoint("{point}"' in path.read_text() for path in SOURCES.rglob("*.py"))
