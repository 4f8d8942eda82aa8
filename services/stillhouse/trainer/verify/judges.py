"""Judges: verdicts on completions, by verifiers in worker processes with a deadline each.

    judges = Judges(timeout_s=10)
    await judges.load({"numeric": 1000})
    verdicts = await judges.judge([Item("numeric", "6 * 7 = 42", "42"), ...])
    await judges.close()

Processes start when they are needed. One that does not answer in time is killed and replaced: its completion has
reward 0, the others do not notice. One that dies is replaced, and the completion judged again. A verifier that only
fails ends the job (VerifierError): training towards its zeros would be training towards nothing.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from stillhouse.core.answers import ANSWER_MAX
from stillhouse.core.errors import JobFailedError, UnavailableError, WireError
from stillhouse.core.tasks import cancel_all
from stillhouse.trainer.verify.process import WorkerDied, WorkerProcess

WORKERS: Final = 2
"""Processes at once: verdicts take milliseconds, and a second one goes on while the first waits for its deadline."""
LOAD_S: Final = 120.0
"""Deadline of importing a verifier: reasoning-gym takes 4 s from a cold disk; 30 times that on a busy machine."""
TRIES: Final = 3
"""Processes that may die of a verdict, or of loading, before it has failed: what was killed from outside must not be
somebody's reward, and what crashes by itself does it again."""
FAILED_IN_A_ROW: Final = 32
"""So many verdicts of a verifier failed and none worked in between: it is broken."""
FAILED_ROWS: Final = 4
"""If they belong to so many rows, or to all it has: a bad row with a large group says nothing about the others."""
VERDICTS_MAX: Final = 2000
"""A process is replaced after so many, so that what a library leaks never becomes somebody's reward 0."""
TEXT_MAX: Final = 1_000_000
"""Characters of a completion that are judged, from its end; a queue entry carries some 57,000 tokens."""

Failure = Literal["", "timeout", "crash", "exception"]


class VerifierError(JobFailedError):
    """A verifier does not work: the job cannot go on."""

    code = "verifier_failed"


@dataclass(frozen=True, slots=True)
class Item:
    """A completion to judge."""

    verifier: str
    """Name, as in `Row.verifier`."""
    text: str
    """The completion."""
    answer: str | None = None
    """The row's reference answer."""
    row: dict[str, Any] = field(default_factory=dict)
    """What else the row says, for verifiers that want to know the prompt: JSON values."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a verifier says."""

    reward: float
    """In [0, 1]."""
    note: str
    """For people: `wrong: expected '42', got '41'`, `no verdict within 10 s`."""
    failure: Failure = ""
    """Why there is none, with reward 0: the deadline, a dead process, or an exception; empty = there is one."""


class Judges:
    """A pool of worker processes. Use it in one event loop; `close` when done."""

    def __init__(self, *, timeout_s: float, workers: int = WORKERS) -> None:
        self._timeout_s = timeout_s
        self._slots = asyncio.Semaphore(workers)
        self._workers = workers
        self._idle: list[WorkerProcess] = []
        self._processes: set[WorkerProcess] = set()
        self._is_closed = False
        self._failed_in_a_row: Counter[str] = Counter()
        self._failed_rows: dict[str, set[int]] = {}
        self._rows: dict[str, int] = {}
        """Rows of the job that name a verifier, as far as `load` was told."""
        self.failures: Counter[str] = Counter()
        """Verdicts that failed so far, by `Failure`."""

    @property
    def pids(self) -> list[int]:
        """Processes that were started and not yet seen to end."""
        return sorted(process.pid for process in self._processes)

    async def load(self, rows: Mapping[str, int]) -> None:
        """Load verifiers before they are needed: name -> number of the job's rows that it judges.

        Raises:
            VerifierError: one cannot be loaded.
        """
        self._rows.update(rows)
        async with self._slots:
            for name in rows:
                await self._give_back(await self._ready(name), is_fit=True)

    async def judge(self, items: Sequence[Item]) -> list[Verdict]:
        """Verdicts in the order of the items. Takes at most (items / workers) deadlines, rounded up, and loading.

        Raises:
            VerifierError: a verifier cannot be loaded, or only fails: see `_watch`.
        """
        verdicts: list[Verdict | None] = [None] * len(items)
        todo = iter(enumerate(items))
        runners = [
            asyncio.create_task(self._run(todo, verdicts), name="verdicts")
            for _ in range(min(self._workers, len(items)))
        ]
        try:
            await asyncio.gather(*runners)
        finally:
            await cancel_all(runners)
        return [verdict for verdict in verdicts if verdict is not None]

    async def close(self) -> None:
        """Kill all processes and wait until they are gone; verdicts under way fail."""
        self._is_closed = True
        self._idle.clear()
        for process in self._processes:
            process.kill()
        while self._processes:
            await self._bury(next(iter(self._processes)))

    async def _run(self, todo: Iterator[tuple[int, Item]], verdicts: list[Verdict | None]) -> None:
        """consumes: items; waits for: a free process; produces: verdicts; unblocked by: deadlines."""
        for index, item in todo:
            async with self._slots:
                verdict = await self._judge(item)
                for _ in range(TRIES - 1):
                    if verdict.failure == "crash" and not self._is_closed:
                        verdict = await self._judge(item)
            verdicts[index] = verdict
            self._watch(item, verdict)

    async def _judge(self, item: Item) -> Verdict:
        """The verdict on an item; a process that failed it is gone afterwards, also if this is cancelled."""
        process = await self._ready(item.verifier)
        is_fit = False
        try:
            reply = await process.ask(_request(item), self._timeout_s)
            process.verdicts += 1
            is_fit = process.verdicts < VERDICTS_MAX and not reply.get("is_spent")
            if "error" in reply:
                return Verdict(0.0, str(reply["error"]), "exception")
            return Verdict(float(reply["reward"]), _note(item, reply["note"]))
        except TimeoutError:
            return Verdict(0.0, f"no verdict within {self._timeout_s:g} s", "timeout")
        except WorkerDied as death:
            return Verdict(0.0, f"no verdict: {death}", "crash")
        except WireError as error:
            is_fit = True  # nothing was sent
            return Verdict(0.0, f"not judged: {error.message}", "exception")
        finally:
            await self._give_back(process, is_fit=is_fit)

    async def _ready(self, name: str) -> WorkerProcess:
        """A process that has loaded the verifier."""
        for attempt in range(1, TRIES + 1):
            process = await self._take()
            if name in process.loaded:
                return process
            is_fit = False
            try:
                reply = await process.ask({"load": name}, LOAD_S)
                if "error" in reply:
                    raise VerifierError(f"verifier '{name}' cannot be loaded: {reply['error']}")
                process.loaded.add(name)
                is_fit = True
                return process
            except TimeoutError:
                raise VerifierError(f"verifier '{name}' was not loaded within {LOAD_S:g} s") from None
            except WorkerDied as death:
                if attempt == TRIES:
                    raise VerifierError(f"verifier '{name}' cannot be loaded: {death}") from None
            finally:
                if not is_fit:
                    await self._give_back(process, is_fit=False)
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def _take(self) -> WorkerProcess:
        """An idle process, or a new one."""
        while self._idle:
            process = self._idle.pop()
            if not process.has_ended:
                return process
            await self._bury(process)
        if not self._is_closed:
            process = await WorkerProcess.start()
            self._processes.add(process)
            if not self._is_closed:
                return process
            await self._bury(process)
        raise UnavailableError("the judges are closed")

    async def _give_back(self, process: WorkerProcess, *, is_fit: bool) -> None:
        if is_fit and not self._is_closed:
            self._idle.append(process)
        else:
            await self._bury(process)

    async def _bury(self, process: WorkerProcess) -> None:
        process.kill()  # before anything can interrupt us
        await process.reap()
        self._processes.discard(process)

    def _watch(self, item: Item, verdict: Verdict) -> None:
        """Count failures; raise when a verifier only fails: FAILED_IN_A_ROW times, on FAILED_ROWS rows."""
        name = item.verifier
        if not verdict.failure:
            self._failed_in_a_row[name] = 0
            self._failed_rows.pop(name, None)
            return
        self.failures[verdict.failure] += 1
        self._failed_in_a_row[name] += 1
        rows = self._failed_rows.setdefault(name, set())
        rows.add(hash((item.answer, repr(item.row))))
        number = self._failed_in_a_row[name]
        if number >= FAILED_IN_A_ROW and len(rows) >= min(FAILED_ROWS, self._rows.get(name, FAILED_ROWS)):
            raise VerifierError(
                f"verifier '{name}' failed {number} times in a row, on {len(rows)} rows, at last with: {verdict.note}. "
                f"Try a row by hand: stillhouse verifiers try {name} --answer ... --text ..."
            )


def _request(item: Item) -> dict[str, Any]:
    if item.answer is not None and len(item.answer) > ANSWER_MAX:
        raise WireError(f"the answer has {len(item.answer)} characters, at most {ANSWER_MAX} are allowed")
    return {"name": item.verifier, "text": item.text[-TEXT_MAX:], "answer": item.answer, "row": item.row}


def _note(item: Item, note: str) -> str:
    cut = len(item.text) - TEXT_MAX
    return note if cut <= 0 else f"{note} (its first {cut} characters were not read)"
