"""Verdicts come from processes of their own: what goes wrong there stays with its completion."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest

from stillhouse.core.answers import ANSWER_MAX
from stillhouse.core.errors import UnavailableError
from stillhouse.trainer.verify import judges as module
from stillhouse.trainer.verify.judges import (
    FAILED_IN_A_ROW,
    FAILED_ROWS,
    TEXT_MAX,
    TRIES,
    Failure,
    Item,
    Judges,
    Verdict,
    VerifierError,
)
from stillhouse.trainer.verify.process import environment
from stillhouse.v1.rollout_pb2 import Score
from tests import acme
from tests.waiting import wait_until

PATIENCE_S = 30.0
"""Deadline of verdicts that come at once, on a busy machine."""


@pytest.fixture(autouse=True)
def _acme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", acme.path_with(acme.install(tmp_path)))


@pytest.fixture
async def judges() -> AsyncIterator[Judges]:
    made = Judges(timeout_s=PATIENCE_S)
    yield made
    seen = made.pids
    await made.close()
    assert made.pids == []
    assert [pid for pid in seen if is_alive(pid)] == []


def is_alive(pid: int) -> bool:
    """Runs, and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def ask(judges: Judges, *texts: str, answer: str | None = None) -> list[Verdict]:
    return await judges.judge([Item("acme", text, answer) for text in texts])


def with_deadline(judges: Judges, timeout_s: float) -> Judges:
    """The same judges, with another deadline from now on."""
    judges._timeout_s = timeout_s
    return judges


async def test_verdicts_stand_in_the_order_of_their_items(judges: Judges) -> None:
    right = [Item("numeric", f"it is {n}", str(n)) for n in range(40)]
    wrong = [Item("exact", "a", "b"), Item("acme", "half"), Item("regex", "abc", "b.")]
    verdicts = await judges.judge(right + wrong)
    assert [verdict.reward for verdict in verdicts] == [1.0] * 40 + [0.0, 0.5, 1.0]
    assert [verdict.note for verdict in verdicts[40:]] == ["wrong: expected 'b', got 'a'", "", "matched 'bc'"]
    assert len(judges.pids) == 2
    assert await judges.judge([]) == []


async def test_two_calls_at_once_share_the_processes(judges: Judges) -> None:
    several = await asyncio.gather(*(ask(judges, *[f"say {call} {n}" for n in range(5)]) for call in range(6)))
    assert [[v.note for v in answers] for answers in several] == [[f"{c} {n}" for n in range(5)] for c in range(6)]
    assert len(judges.pids) == 2


async def test_a_pattern_that_never_ends_costs_only_its_own_completion(judges: Judges) -> None:
    await ask(judges, "half", "half")  # both processes run: no start within the deadline below
    started = time.monotonic()
    endless = Item("regex", "a" * 60 + "!", r"^(a+)+$")
    verdicts = await with_deadline(judges, 1.0).judge([endless, *[Item("exact", "a", "a")] * 6])
    assert verdicts[0] == Verdict(0.0, "no verdict within 1 s", "timeout")
    assert verdicts[1:] == [Verdict(1.0, "right")] * 6
    assert time.monotonic() - started < 15
    assert judges.failures == {"timeout": 1}


async def test_what_ignores_sigterm_is_killed_with_its_children(judges: Judges, tmp_path: Path) -> None:
    file = tmp_path / "pid"
    task = asyncio.create_task(ask(judges, "child", answer=str(file)))
    child = int(await wait_until(lambda: file.exists() and file.read_text(), timeout_s=20, what="the child's pid"))
    worker = judges.pids[0]
    assert is_alive(child)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await wait_until(lambda: not is_alive(child) and not is_alive(worker), timeout_s=10, what="both to be gone")
    assert (await ask(judges, "half"))[0].reward == 0.5


async def kill_in_a_verdict(file: Path) -> None:
    """Kill -9 the process that judges `once`, and remove its sign."""
    pid = int(await wait_until(lambda: file.exists() and file.read_text(), timeout_s=20, what="the verdict to run"))
    file.unlink()
    os.kill(pid, signal.SIGKILL)


async def test_a_completion_whose_process_was_killed_is_judged_again(judges: Judges, tmp_path: Path) -> None:
    file = tmp_path / "pid"
    task = asyncio.create_task(ask(judges, "once", "half", answer=str(file)))
    for _ in range(TRIES - 1):
        await kill_in_a_verdict(file)
    await wait_until(file.exists, timeout_s=20, what="the last verdict")
    (tmp_path / "pid.go").touch()
    assert await task == [Verdict(1.0, ""), Verdict(0.5, "")]
    assert not judges.failures


async def test_a_completion_of_which_three_processes_died_has_no_reward(judges: Judges, tmp_path: Path) -> None:
    file = tmp_path / "pid"
    task = asyncio.create_task(ask(judges, "once", "half", answer=str(file)))
    for _ in range(TRIES):
        await kill_in_a_verdict(file)
    assert await task == [Verdict(0.0, "no verdict: its process was ended by SIGKILL", "crash"), Verdict(0.5, "")]
    assert judges.failures == {"crash": 1}


async def test_a_process_that_died_while_idle_costs_nothing(judges: Judges) -> None:
    first = int((await ask(judges, "pid"))[0].note)
    os.kill(first, signal.SIGKILL)
    await wait_until(lambda: judges._idle[0].has_ended, timeout_s=10, what="its end to be seen")
    assert int((await ask(judges, "pid"))[0].note) != first
    assert first not in judges.pids


async def test_an_answer_in_time_counts_though_it_was_read_late(judges: Judges) -> None:
    await ask(judges, "half")
    task = asyncio.create_task(ask(with_deadline(judges, 0.6), "nap"))
    await wait_until(lambda: not judges._idle, timeout_s=10, what="the verdict to begin")
    time.sleep(1.2)  # the event loop is held up: this is what is tried here
    assert await task == [Verdict(0.5, "")]


async def test_closed_judges_judge_no_more() -> None:
    judges = Judges(timeout_s=PATIENCE_S)
    task = asyncio.create_task(ask(judges, "hang", "hang"))
    await wait_until(lambda: len(judges.pids) == 2, timeout_s=20, what="two processes")
    pids = judges.pids
    await judges.close()
    with suppress(VerifierError, UnavailableError):  # it ends, with a failed verdict or none
        assert {verdict.failure for verdict in await task} == {"crash"}
    with pytest.raises(UnavailableError):
        await ask(judges, "half")
    assert judges.pids == []
    assert not any(map(is_alive, pids))


@pytest.mark.parametrize(
    ("text", "note", "failure"),
    [
        ("segv", "no verdict: its process was ended by SIGSEGV", "crash"),
        ("exit", "no verdict: its process ended with exit code 3: out of luck", "crash"),
        ("sysexit", "SystemExit: 5", "exception"),
        ("raise", "ZeroDivisionError: division by zero", "exception"),
        ("hog", "MemoryError", "exception"),
        ("nan", "ValueError: the reward is not a number", "exception"),
        ("word", "ValueError: could not convert string to float: 'good'", "exception"),
    ],
)
async def test_a_failure_has_reward_0_and_says_why(judges: Judges, text: str, note: str, failure: Failure) -> None:
    assert await ask(judges, text, "half") == [Verdict(0.0, note, failure), Verdict(0.5, "")]
    assert judges.failures == {failure: 1}


async def test_what_verifiers_may_return(judges: Judges) -> None:
    above, below, true, long, odd = await ask(judges, "above", "below", "true", "long", "surrogate \ud800")
    assert above == Verdict(1.0, "reward 7.5 clipped to 1; well done")
    assert below == Verdict(0.0, "reward -1 clipped to 0")
    assert true == Verdict(1.0, "")
    assert len(long.note) == 200
    assert odd.note == "??"
    assert Score(reward_note=odd.note).reward_note == "??"  # a message of protobuf holds no half of a character


async def test_noise_is_not_taken_for_a_verdict_and_input_is_closed(judges: Judges) -> None:
    assert await ask(judges, "noisy", "noisy", "half") == [*[Verdict(1.0, "input: ''")] * 2, Verdict(0.5, "")]


async def test_a_process_out_of_memory_is_replaced(judges: Judges) -> None:
    first = (await ask(judges, "pid"))[0].note
    assert (await ask(judges, "hog"))[0].failure == "exception"
    assert (await ask(judges, "pid"))[0].note != first


async def test_a_process_is_replaced_before_it_is_old(judges: Judges, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "VERDICTS_MAX", 3)
    pids = [(await ask(judges, "pid"))[0].note for _ in range(7)]
    assert [pids.index(pid) for pid in pids] == [0, 0, 0, 3, 3, 3, 6]


async def test_texts_are_read_from_their_end_and_answers_have_a_limit(judges: Judges) -> None:
    cut, whole, long = await judges.judge(
        [
            Item("numeric", "1 " + "x" * TEXT_MAX + " 42", "42"),
            Item("acme", "length " + "é" * (TEXT_MAX - 7)),
            Item("acme", "half", "a" * (ANSWER_MAX + 1)),
        ]
    )
    assert cut == Verdict(1.0, "right (its first 5 characters were not read)")
    assert whole.note == str(TEXT_MAX)
    assert long.failure == "exception"
    assert str(ANSWER_MAX) in long.note


async def test_a_verifier_is_given_answer_and_row(judges: Judges) -> None:
    (verdict,) = await judges.judge([Item("acme", "answer", None, {"messages": [{"role": "user"}]})])
    assert verdict.note == "None {'messages': [{'role': 'user'}]}"
    (verdict,) = await judges.judge([Item("acme", "answer", None, {"odd": float("nan")})])
    assert (verdict.reward, verdict.failure) == (0.0, "exception")


async def test_no_credential_reaches_a_verifier(judges: Judges, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("STILLHOUSE_INTERNAL_TOKEN", "STILLHOUSE_REDIS_URL", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, "secret")
    names = set((await ask(judges, "names"))[0].note.split(","))
    assert {"PATH", "PYTHONPATH", "PYTHONHASHSEED"} <= names
    assert [name for name in names if "STILLHOUSE" in name or "TOKEN" in name or "SECRET" in name] == []
    assert "secret" not in environment(os.environ).values()


async def test_only_failures_in_a_row_end_the_job(judges: Judges) -> None:
    failing = [Item("acme", "raise", str(row % FAILED_ROWS)) for row in range(FAILED_IN_A_ROW)]
    await judges.judge(failing[2:])
    await ask(judges, "half")
    await judges.judge(failing[2:])
    with pytest.raises(VerifierError, match=r"'acme' failed 32 times in a row, on 4 rows, at last with: ZeroDiv"):
        await judges.judge(failing[:2])


@pytest.mark.parametrize("rows", [{}, {"acme": 2}], ids=["of many", "of two"])
async def test_one_bad_row_does_not_end_the_job(judges: Judges, rows: dict[str, int]) -> None:
    await judges.load(rows)
    await ask(judges, *["raise"] * (2 * FAILED_IN_A_ROW))
    assert judges.failures == {"exception": 2 * FAILED_IN_A_ROW}


@pytest.mark.parametrize("number", [1, 2])
async def test_failures_on_all_rows_of_a_verifier_end_the_job_however_few_they_are(judges: Judges, number: int) -> None:
    await judges.load({"acme": number, "exact": 1000})
    failing = [Item("acme", "raise", str(n % number)) for n in range(FAILED_IN_A_ROW)]
    await judges.judge([*failing[1:], Item("exact", "a", "a")])
    with pytest.raises(VerifierError, match=rf"'acme' failed 32 times in a row, on {number} rows"):
        await judges.judge(failing[:1])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nope", r"'nope' cannot be loaded: LookupError: unknown verifier 'nope'; there are acme, .*exact, math"),
        ("acme-broken", r"'acme-broken' cannot be loaded: AttributeError: .*missing"),
        ("acme-number", r"'acme-number' cannot be loaded: TypeError: acme_verifiers:__doc__ is a NoneType"),
        ("acme-dies", r"'acme-dies' cannot be loaded: its process ended with exit code 7"),
    ],
)
async def test_a_verifier_that_cannot_be_loaded_ends_the_job(judges: Judges, name: str, message: str) -> None:
    with pytest.raises(VerifierError, match=message):
        await judges.judge([Item(name, "x", "y"), Item("exact", "a", "a")])
    with pytest.raises(VerifierError, match=message):
        await judges.load({"exact": 1, name: 1})
    assert (await judges.judge([Item("exact", "a", "a")]))[0].reward == 1.0


async def test_loaded_verifiers_wait_for_their_texts(judges: Judges) -> None:
    await judges.load({"acme": 5, "exact": 5})
    (process,) = judges._idle
    assert process.loaded == {"acme", "exact"}
    assert (await ask(judges, "pid"))[0].note == str(process.pid)


async def test_a_name_of_ours_stays_ours(judges: Judges) -> None:
    assert (await judges.judge([Item("exact", "half", "other")]))[0].reward == 0.0


async def test_a_verifier_without_its_package_names_the_extra(judges: Judges, tmp_path: Path) -> None:
    (tmp_path / "math_verify.py").write_text("raise ImportError('no math_verify here')\n")
    with pytest.raises(VerifierError, match=r"no math_verify here; .*pip install 'stillhouse\[verifiers\]'"):
        await judges.judge([Item("math", "1", "1")])


async def test_cancelled_verdicts_leave_no_process(judges: Judges) -> None:
    task = asyncio.create_task(ask(judges, "hang", "hang", "hang"))
    await wait_until(lambda: len(judges.pids) == 2, timeout_s=20, what="two processes")
    pids = judges.pids
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await wait_until(lambda: not any(map(is_alive, pids)), timeout_s=10, what="both to be gone")


def _start(request: dict[str, object]) -> subprocess.Popen[bytes]:
    """A process that judges this."""
    argv = [sys.executable, "-m", "stillhouse.trainer.verify"]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    assert process.stdin is not None
    process.stdin.write(json.dumps(request).encode())
    process.stdin.close()
    return process


async def test_processes_die_with_their_parent(tmp_path: Path) -> None:
    """The parent is killed -9 in the middle of a verdict that ignores SIGTERM."""
    file = tmp_path / "pid"
    parent = _start({"verifier": "acme", "text": "child", "answer": str(file), "timeout_s": 600})
    child = int(await wait_until(lambda: file.exists() and file.read_text(), timeout_s=20, what="the child's pid"))
    try:
        (worker,) = map(int, Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split())
        parent.kill()
        parent.wait(10)
        await wait_until(lambda: not is_alive(worker), timeout_s=10, what="the worker to be gone")
    finally:
        os.kill(child, signal.SIGKILL)  # what a verifier starts outlives only this


def test_a_worker_without_judges_refuses_to_run() -> None:
    argv = [sys.executable, "-m", "stillhouse.trainer.verify.worker", "1"]
    answer = subprocess.run(argv, input=b"", capture_output=True, timeout=30)
    assert answer.returncode == 1
    assert b"started by the judges" in answer.stderr
