"""One worker process as the judges see it: start, ask with a deadline, kill, and how it died."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

from stillhouse.core.errors import WireError
from stillhouse.core.tasks import cancel_all
from stillhouse.trainer.verify import frames

END_S: Final = 10.0
"""How long the kernel may take to end a process after SIGKILL: only one in a stuck disk call takes any time."""
READ_S: Final = 0.05
"""Time beyond the deadline to read what lies in the pipe: if this event loop was held up, it may have come in time."""
EXIT_S: Final = 2.0
"""How long a process whose pipes are closed may take to end by itself: the kernel writes no core file."""
STDERR_BYTES: Final = 2048
"""End of a worker's standard error that is kept to explain its death."""
_KEPT: Final = ("PATH", "PYTHONPATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "LD_LIBRARY_PATH")
"""Variables that a worker gets: no others, so no credential of this process or of its shell."""
_ADDED: Final = {
    "PYTHONHASHSEED": "0",  # sets of strings in the same order in every process: same text, same verdict
    "OMP_NUM_THREADS": "1",  # verdicts run beside training, and a thread pool reserves memory per core
    "OPENBLAS_NUM_THREADS": "1",
}


class WorkerDied(Exception):
    """The process ended, or said what no worker says; the message is for people."""


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Environment of a worker."""
    return {name: environ[name] for name in _KEPT if name in environ} | _ADDED


class WorkerProcess:
    """States: started -> asked, answered, asked, ... -> killed -> reaped. One asks at a time; `kill` any time."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._stderr = bytearray()
        self._is_killed = False
        self._drain = asyncio.create_task(self._keep_stderr(), name="verifier stderr")
        self.loaded: set[str] = set()
        """Verifiers it has loaded."""
        self.verdicts = 0
        """How many it gave."""

    @classmethod
    async def start(cls) -> WorkerProcess:
        """A new process, in a group of its own, so that what a verifier starts dies with it."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",  # no folder of ours on its path: a job's folder must not provide modules
            "-m",
            "stillhouse.trainer.verify.worker",
            str(os.getpid()),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=environment(os.environ),
            start_new_session=True,
        )
        return cls(process)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        """It died by itself, or somebody else killed it."""
        return self._process.returncode is not None

    async def ask(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """The answer to a request. After any exception the process is in an unknown state: kill it.

        Raises:
            TimeoutError: none came in time.
            WorkerDied: it ended instead, or answered nonsense.
            WireError: the request cannot be sent; nothing was.
        """
        exchange = asyncio.create_task(self._exchange(frames.encode(request)), name="verdict")
        try:
            done, _ = await asyncio.wait([exchange], timeout=timeout_s)
            if not done:
                done, _ = await asyncio.wait([exchange], timeout=READ_S)
        finally:
            await cancel_all([exchange])
        if not done:
            raise TimeoutError
        try:
            return exchange.result()
        except (asyncio.IncompleteReadError, ConnectionError):
            # its pipes are closed: let it end by itself, so that it is seen how it ended
            with suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), EXIT_S)
            self.kill()
            await self.reap()
            raise WorkerDied(self._how_it_died()) from None
        except WireError as error:
            raise WorkerDied(f"its process answered {error.message}") from None

    async def _exchange(self, frame: bytes) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None, "started with pipes"
        assert stdout is not None, "started with pipes"
        stdin.write(frame)
        await stdin.drain()
        return await frames.read_async(stdout)

    def kill(self) -> None:
        """SIGKILL to the process and all that it started; once, since its number may then belong to another."""
        if self._is_killed:
            return
        self._is_killed = True
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    async def reap(self) -> None:
        """Wait until a killed process is gone and close its pipes."""
        with suppress(TimeoutError):
            async with asyncio.timeout(END_S):
                await self._process.wait()
                await asyncio.wait([self._drain])
        await cancel_all([self._drain])
        # closes our ends of the pipes, which a child in a session of its own may still hold; Process has no call for it
        self._process._transport.close()  # type: ignore[attr-defined]

    def _how_it_died(self) -> str:
        code = self._process.returncode
        how = f"ended with exit code {code}"
        if code is not None and code < 0:
            with suppress(ValueError):
                how = f"was ended by {signal.Signals(-code).name}"
        lines = self._stderr.decode("utf-8", "replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"its process {how}" + (f": {last[:120]}" if last else "")

    async def _keep_stderr(self) -> None:
        """consumes: standard error; produces: its last bytes; unblocked by: the end of the process."""
        stderr = self._process.stderr
        assert stderr is not None, "started with pipes"
        while chunk := await stderr.read(1 << 16):
            self._stderr += chunk
            del self._stderr[:-STDERR_BYTES]
