"""The disk below a folder: real files, and the knowledge of what a power loss would leave of them.

Whatever a process writes is seen by all others at once (the page cache), and survives the death of the process. After a
power loss (`crash`) a file that was not fsynced may be whole, cut or empty, and a name that was created, moved or
removed since its folder was fsynced may be as it was before: what ALICE (Pillai et al., OSDI 2014) calls the possible
states. Each folder keeps a prefix of its changes, independently of the others.

Writes of a dead process raise; a full disk refuses to create and to sync.
"""

from __future__ import annotations

import errno
import io
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.chaos.sim.process import check_alive

HISTORY = (".jsonl",)
"""Files that may lose their last lines by design: only appended to, never fsynced."""


@dataclass
class _Change:
    """A change of names in a folder that a power loss may undo."""

    kind: str
    """"create", "mkdir" or "rename"."""
    path: str
    source: str = ""
    replaced: bytes | None = None
    """What a rename wrote over."""


class Disk:
    """Watches over the files below `root`."""

    def __init__(self, root: Path, draw: random.Random, trace: Callable[..., None]) -> None:
        self._root = str(root)
        self._draw = draw
        self._trace = trace
        self._dirty: set[str] = set()
        """Files with content that is not synced."""
        self._changes: dict[str, list[_Change]] = {}
        """Folder -> changes of its names that are not synced, in order."""
        self.is_full = False
        self.num_fsyncs = 0
        self.skips_fsync = False
        """For the planted bug."""
        self._real: dict[str, Any] = {}

    # -- installed in place of the functions of `os` and `io` ---------------------------------------------------------

    @contextmanager
    def installed(self) -> Iterator[None]:
        names = ("open", "unlink", "rename", "replace", "mkdir", "rmdir", "fsync")
        self._real = {name: getattr(os, name) for name in names} | {"io.open": io.open}
        for name in names:
            setattr(os, name, getattr(self, f"_{name}"))
        io.open = self._io_open  # type: ignore[assignment]
        try:
            yield
        finally:
            for name in names:
                setattr(os, name, self._real[name])
            io.open = self._real["io.open"]

    def _ours(self, path: Any) -> str | None:
        if isinstance(path, int):
            return None
        text = os.fspath(path)
        return text if isinstance(text, str) and text.startswith(self._root) else None

    def _begin(self, path: Any) -> str | None:
        ours = self._ours(path)
        if ours is not None:
            check_alive()
        return ours

    def _note(self, change: _Change) -> None:
        self._changes.setdefault(os.path.dirname(change.path), []).append(change)

    def _writes(self, path: str, exists: bool) -> None:
        if self.is_full:
            raise OSError(errno.ENOSPC, "no space left on the simulated disk", path)
        if not exists:
            self._note(_Change("create", path))
        self._dirty.add(path)

    def _open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        ours = self._begin(path) if dir_fd is None else None
        if ours is not None and flags & (os.O_WRONLY | os.O_RDWR):
            self._writes(ours, os.path.exists(ours))
        return self._real["open"](path, flags, mode, dir_fd=dir_fd)

    def _io_open(self, file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        ours = self._begin(file)
        if ours is not None and any(letter in mode for letter in "wax+"):
            self._writes(ours, os.path.exists(ours))
        return self._real["io.open"](file, mode, *args, **kwargs)

    def _unlink(self, path: Any, *, dir_fd: int | None = None) -> None:
        if dir_fd is not None:
            check_alive()
        ours = self._begin(path) if dir_fd is None else None
        self._real["unlink"](path, dir_fd=dir_fd)
        if ours is not None:
            self._dirty.discard(ours)

    def _mkdir(self, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        ours = self._begin(path)
        if ours is not None and self.is_full:
            raise OSError(errno.ENOSPC, "no space left on the simulated disk", ours)
        self._real["mkdir"](path, mode, dir_fd=dir_fd)
        if ours is not None:
            self._note(_Change("mkdir", ours))

    def _rmdir(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._begin(path)
        self._real["rmdir"](path, dir_fd=dir_fd)

    def _rename(self, source: Any, target: Any, **kwargs: Any) -> None:
        ours, to = self._begin(source), self._ours(target)
        replaced = None
        if to is not None and os.path.isfile(to):
            with self._real["io.open"](to, "rb") as stream:
                replaced = stream.read()
        self._real["rename"](source, target, **kwargs)
        if ours is None or to is None:
            return
        self._note(_Change("rename", to, ours, replaced))
        for path in [path for path in self._dirty if path == ours or path.startswith(ours + "/")]:
            self._dirty.remove(path)
            self._dirty.add(to + path[len(ours) :])
        for folder in [folder for folder in self._changes if folder == ours or folder.startswith(ours + "/")]:
            moved = self._changes.pop(folder)
            for change in moved:
                change.path = change.path.replace(ours, to, 1)
                change.source = change.source.replace(ours, to, 1)
            self._changes[to + folder[len(ours) :]] = moved

    _replace = _rename

    def _fsync(self, fd: int) -> None:
        path = os.readlink(f"/proc/self/fd/{fd}")
        if not path.startswith(self._root):
            self._real["fsync"](fd)
            return
        check_alive()
        self.num_fsyncs += 1
        if self.skips_fsync:
            return
        if os.path.isdir(path):
            self._changes.pop(path, None)
        else:
            self._dirty.discard(path)

    # -- power loss --------------------------------------------------------------------------------------------------

    def crash(self) -> None:
        """Leave what a power loss may leave."""
        with self._silent():
            for path in sorted(self._dirty):
                self._damage(path)
            for folder in sorted(self._changes, reverse=True):  # what lies deeper first
                changes = self._changes[folder]
                kept = self._draw.randint(0, len(changes))
                for change in reversed(changes[kept:]):
                    self._undo(change)
        self._dirty.clear()
        self._changes.clear()

    @contextmanager
    def _silent(self) -> Iterator[None]:
        mine = {name: getattr(os, name) for name in self._real if "." not in name}
        for name in mine:
            setattr(os, name, self._real[name])
        watched, io.open = io.open, self._real["io.open"]
        try:
            yield
        finally:
            for name, function in mine.items():
                setattr(os, name, function)
            io.open = watched

    def _damage(self, path: str) -> None:
        if not os.path.isfile(path):
            return
        size = os.path.getsize(path)
        most = max(0, size - 200) if path.endswith(HISTORY) else 0
        fate = self._draw.choice(("whole", "cut", "empty"))
        if fate != "whole":
            length = self._draw.randint(most, size) if fate == "cut" else most
            self._trace("torn", os.path.basename(path), length)
            os.truncate(path, length)

    def _undo(self, change: _Change) -> None:
        if not os.path.lexists(change.path) or change.path.endswith(HISTORY):
            return
        self._trace("undone", change.kind, os.path.basename(change.path))
        if change.kind == "rename":
            if os.path.isdir(os.path.dirname(change.source)) and not os.path.lexists(change.source):
                os.rename(change.path, change.source)
            if change.replaced is not None:
                Path(change.path).write_bytes(change.replaced)
        elif os.path.isdir(change.path):
            shutil.rmtree(change.path)
        else:
            os.unlink(change.path)
