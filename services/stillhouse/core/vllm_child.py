"""Care for the processes that vLLM starts: none outlives us, and one that fails says why. Light: no vLLM here.

Our side holds `Cause`; vLLM's processes call `enter()`, from the module that is named as their worker extension.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from stillhouse.core.parent import die_with_parent

CAUSE_FILE: Final = "STILLHOUSE_VLLM_CAUSE_FILE"
"""Environment variable with the file that gets the reason when an engine fails: vLLM itself only says that it did."""
_STARTING: Final = threading.Lock()
"""Held while engine processes are started with `CAUSE_FILE` in the environment."""


class Cause:
    """Why an engine failed, in the words of its own process."""

    def __init__(self) -> None:
        self._file = tempfile.NamedTemporaryFile(prefix="stillhouse-vllm-")  # noqa: SIM115 - closed with the engine

    @contextmanager
    def told(self) -> Iterator[None]:
        """Engine processes that are started meanwhile leave their reason here.

        One start at a time: they inherit the environment, of which a process has one.
        """
        with _STARTING:
            os.environ[CAUSE_FILE] = self._file.name
            try:
                yield
            finally:
                os.environ.pop(CAUSE_FILE, None)

    def read(self) -> str:
        """Empty if none was left: it was killed, or has not failed."""
        return Path(self._file.name).read_text().strip()

    def obituary(self, exit_codes: Sequence[int | None]) -> str:
        """How the engine ended, whose processes have these exit codes; None = it has not ended."""
        if why := self.read():
            return f"failed: {why}"
        code = next((code for code in exit_codes if code is not None), None)
        if code is None:
            return "does not answer"
        return f"ended with {code}" if code >= 0 else f"was killed by signal {-code}; out of memory?"

    def close(self) -> None:
        self._file.close()


class _CauseHandler(logging.Handler):
    """Writes the last error that was logged with its exception."""

    def __init__(self, path: Path) -> None:
        super().__init__(logging.ERROR)
        self._path = path

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and (error := record.exc_info[1]) is not None:
            self._path.write_text(f"{type(error).__name__}: {error}")


def enter() -> None:
    """What an engine's process does before it has a model.

    Raises:
        ImportError: this is no such process.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        raise ImportError("this belongs into the processes of vLLM's engine")
    die_with_parent(signal.SIGKILL)
    if os.getppid() != parent.pid:  # it died before we asked
        os._exit(1)
    if path := os.environ.get(CAUSE_FILE):
        for name in ("vllm.v1.engine.core", "vllm.v1.executor.multiproc_executor"):
            logging.getLogger(name).addHandler(_CauseHandler(Path(path)))
