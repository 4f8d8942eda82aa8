"""Reads the files of the model that is needed next, while the one before it computes."""

from __future__ import annotations

import threading
from contextlib import suppress

from stillhouse.core.errors import StillhouseError
from stillhouse.teacher.pool import ModelPool
from stillhouse.teacher.schedule import ModelKey
from stillhouse.v1.rollout_pb2 import TeacherTask


class ReadAhead:
    """One model at a time, in a thread that ends with the process: a load that follows finds its files verified and in
    the page cache. That takes no part of the budget for weights; the system gives the pages away when it needs them.
    """

    def __init__(self, pool: ModelPool) -> None:
        self._pool = pool
        self._thread: threading.Thread | None = None
        self._last: ModelKey | None = None

    def start(self, task: TeacherTask, key: ModelKey) -> None:
        """Read the task's model, unless it is the one read last or another is being read."""
        if key == self._last or (self._thread is not None and self._thread.is_alive()):
            return
        self._last = key
        self._thread = threading.Thread(target=self._read, args=(task,), name="read ahead", daemon=True)
        self._thread.start()

    def loaded(self, key: ModelKey) -> None:
        """The model was loaded: should it leave memory again, its files are read again."""
        if key == self._last:
            self._last = None

    def join(self, timeout_s: float) -> None:
        """Wait until nothing is being read."""
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _read(self, task: TeacherTask) -> None:
        with suppress(StillhouseError, OSError):  # who loads the model is told
            self._pool.read_ahead(task)
