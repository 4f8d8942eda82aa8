"""`stillhouse verifiers`: the list, and one verdict by hand.

A verdict comes from `python -m stillhouse.trainer.verify`, a process of the trainer's part: this one never imports it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from importlib.util import find_spec
from typing import Any, Final

from stillhouse.cli.console import EXIT_FAILED, EXIT_USAGE, CliError, print_json, print_table, say
from stillhouse.core.verifiers import VerifierInfo, problem_of, verifiers

START_S: Final = 180.0
"""What starting processes and importing a verifier may take beside the verdict: its own deadline is 120 s."""
_ROW_FIX: Final = """write it like --row '{"prompt": "What is 6 * 7?"}'"""


def show(*, as_json: bool) -> None:
    """Table of the verifiers."""
    found = verifiers().values()
    if as_json:
        print_json([asdict(info) | {"status": _status(info)} for info in found])
        return
    print_table(
        ("name", "rewards when", "answer", "source", "here"),
        [(info.name, info.about, "needed" if info.needs_answer else "", info.source, _status(info)) for info in found],
    )


def _status(info: VerifierInfo) -> str:
    """Whether it works on this machine."""
    if info.problem:
        return info.problem
    if info.module and find_spec(info.module) is None:
        return f"pip install 'stillhouse[{info.extra}]'"
    return "ok"


def judge(name: str, text: str, answer: str | None, row: str, timeout_s: float, *, as_json: bool) -> None:
    """Print the verdict on a text; `row` is JSON."""
    if problem := problem_of(name, answer):
        raise CliError(problem, fix="`stillhouse verifiers` lists what there is", exit_code=EXIT_USAGE)
    item = {"verifier": name, "answer": answer, "row": _read_row(row)}
    item["text"] = sys.stdin.read() if text == "-" else text
    verdict = _ask(item | {"timeout_s": timeout_s}, timeout_s)
    if as_json:
        print_json(verdict)
    else:
        say(f"reward {verdict['reward']:g}: {verdict['note']}")
    if verdict["failure"]:
        raise SystemExit(EXIT_FAILED)


def _read_row(row: str) -> dict[str, Any]:
    try:
        read = json.loads(row)
    except (ValueError, RecursionError) as error:
        raise CliError(f"--row is not JSON: {error}", fix=_ROW_FIX, exit_code=EXIT_USAGE) from None
    if not isinstance(read, dict):
        raise CliError(f"--row is a JSON {type(read).__name__}, not an object", fix=_ROW_FIX, exit_code=EXIT_USAGE)
    return read


def _ask(request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    argv = [sys.executable, "-P", "-m", "stillhouse.trainer.verify"]
    try:
        done = subprocess.run(
            argv, input=json.dumps(request), capture_output=True, text=True, timeout=timeout_s + START_S
        )
    except subprocess.TimeoutExpired as late:
        raise CliError(f"the judging process did not answer within {late.timeout:g} s") from None
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise CliError(lines[-1] if lines else f"the judging process ended with exit code {done.returncode}")
    return json.loads(done.stdout)
