"""A process that runs verifiers: `python -m stillhouse.trainer.verify.worker PARENT_PID`.

judges.py starts and kills it.

consumes:     frames on its standard input: {"load": name} or {"name", "text", "answer", "row"}
waits for:    the next frame, as long as its parent lives
produces:     a frame on its standard output for each: {"reward", "note"} or {"error", "is_spent"}
unblocked by: the pipe's end, SIGKILL of the judges (deadline), or its parent's death

Standard output of a verifier goes to standard error, of which the judges keep the end. Not a sandbox: it holds up
against mistakes and endless loops, not against a package that means harm.
"""

from __future__ import annotations

import math
import os
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, BinaryIO, Final

from stillhouse.core.parent import die_with_parent
from stillhouse.core.verifiers import BUILT_IN, entry_point, problem_of, verifiers
from stillhouse.trainer.verify import frames
from stillhouse.trainer.verify.builtin import LOADERS

MEMORY_BYTES: Final = 2 << 30
"""What verdicts may take beyond what the process has when its verifier is loaded: sympy needs a twentieth of it."""
FILE_BYTES: Final = 64 << 20
"""Largest file that a verifier may write."""
NOTE_MAX: Final = 200
"""Characters of a note: it is kept with every sample."""


def main() -> None:
    """Answer frames until the pipe ends."""
    die_with_parent(signal.SIGKILL)
    if len(sys.argv) != 2 or os.getppid() != int(sys.argv[1]):
        sys.exit("this process is started by the judges of a trainer, which is gone")
    requests, replies = _take_pipes()
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, FILE_BYTES)
    serve(requests, replies)


def _take_pipes() -> tuple[BinaryIO, BinaryIO]:
    """The two pipes to the judges, on descriptors that neither verifiers nor their children can hit by accident."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return requests, replies


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """Load verifiers and give verdicts, one at a time."""
    loaded: dict[str, Callable[..., Any]] = {}
    while (request := frames.read(requests)) is not None:
        try:
            if "load" in request:
                loaded[request["load"]] = _load(request["load"])
                reply: dict[str, Any] = {"loaded": request["load"]}
            else:
                judge = loaded[request["name"]]
                reply = _reply(judge(request["text"], request["answer"], request["row"]))
        except (Exception, SystemExit) as error:  # the outermost place that can tell what a verifier raised
            message = _line(f"{type(error).__name__}: {error}").removesuffix(":")
            # after a MemoryError nobody knows what is half done
            reply = {"error": message, "is_spent": isinstance(error, MemoryError)}
        with suppress(Exception):
            sys.stdout.flush()
        replies.write(frames.encode(reply))
        replies.flush()


def _load(name: str) -> Callable[..., Any]:
    """The verifier of this name, imported without a limit of memory: libraries reserve more than they use."""
    _limit(resource.RLIMIT_AS, resource.RLIM_INFINITY)
    try:
        if name in LOADERS:
            return _built_in(name)
        point = entry_point(name)
        if point is None or verifiers()[name].problem:
            raise LookupError(problem_of(name, None))
        verifier = point.load()
        if not callable(verifier):
            raise TypeError(f"{point.value} is a {type(verifier).__name__}, not a function (text, answer, row)")
        return verifier
    finally:
        _limit(resource.RLIMIT_AS, _address_space() + MEMORY_BYTES)


def _built_in(name: str) -> Callable[..., Any]:
    try:
        judge = LOADERS[name]()
    except ImportError as error:
        extra = next(info.extra for info in BUILT_IN if info.name == name)
        raise ImportError(f"{error}; install it where the trainer runs: pip install 'stillhouse[{extra}]'") from None

    def with_answer(text: str, answer: str | None, row: dict[str, Any]) -> tuple[float, str]:
        if answer is None:
            raise ValueError("the row has no 'answer'")
        return judge(text, answer, row)

    return with_answer


def _reply(judgement: Any) -> dict[str, Any]:
    """Verdict of what a verifier returned: a reward, or (reward, note)."""
    reward, note = judgement if isinstance(judgement, tuple) else (judgement, "")
    reward = float(reward)
    if math.isnan(reward):
        raise ValueError("the reward is not a number")
    clipped = min(max(reward, 0.0), 1.0)
    if clipped != reward:
        note = f"reward {reward:g} clipped to {clipped:g}; {note}"
    return {"reward": clipped, "note": _line(str(note))}


def _line(text: str) -> str:
    text = text[: 4 * NOTE_MAX].encode("utf-8", "replace").decode()  # no message of protobuf holds half a character
    text = " ".join(text.split()).removesuffix(";")
    return text if len(text) <= NOTE_MAX else text[: NOTE_MAX - 3] + "..."


def _limit(what: int, soft: int) -> None:
    _, hard = resource.getrlimit(what)
    soft = soft if hard == resource.RLIM_INFINITY else hard if soft == resource.RLIM_INFINITY else min(soft, hard)
    resource.setrlimit(what, (soft, hard))


def _address_space() -> int:
    """Bytes of address space in use."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    main()
