"""Folders for what a process puts on disk and nobody needs after it: gone with it, at the latest with the next one.

    {parent}/{name}.lock    held (flock) as long as the process lives
             {name}/        its files

The lock, not a pid, says whether the owner lives: the kernel drops it at any kind of death, and pids mean nothing
across containers that share a disk.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import time
from pathlib import Path
from typing import Final

YOUNG_S: Final = 60.0
"""A lock file so young may be one that its owner is about to lock."""


class SpillFolder:
    """A folder of this process."""

    def __init__(self, parent: Path, name: str) -> None:
        parent.mkdir(parents=True, exist_ok=True)
        self.path = parent / f"{name}-{secrets.token_hex(4)}"
        self._lock = _lock_of(self.path)
        self._fd = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        self.path.mkdir(mode=0o700)

    def close(self) -> None:
        """Delete it with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.unlink(missing_ok=True)
        os.close(self._fd)


def dead_folders(parent: Path) -> list[Path]:
    """Folders whose owner is gone."""
    return [folder for folder in (path.with_suffix("") for path in sorted(parent.glob("*.lock"))) if _is_dead(folder)]


def remove_dead(folder: Path) -> None:
    """Delete a folder if its owner is gone."""
    if _is_dead(folder):
        shutil.rmtree(folder, ignore_errors=True)
        _lock_of(folder).unlink(missing_ok=True)


def _is_dead(folder: Path) -> bool:
    try:
        fd = os.open(_lock_of(folder), os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        if time.time() - os.fstat(fd).st_mtime < YOUNG_S:
            return False
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(fd)


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")
