"""Child processes of the supervisor, and what the kernel knows about processes.

Each child leads a session of its own: Ctrl-C in the terminal reaches only the supervisor, and one signal to the group
reaches whatever the child started itself (engine workers, verifiers).
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from stillhouse.cli.deployment import Deployment

BACKOFF_MIN_S: Final = 0.2
"""Pause before the first restart: long enough for a port to be free again, short enough that nobody notices."""
BACKOFF_MAX_S: Final = 10.0
"""Pause before a restart, at most."""
HEALTHY_S: Final = 60.0
"""A process that lived so long is healthy: its next death starts again at BACKOFF_MIN_S."""
_PR_SET_PDEATHSIG: Final = 1
_LIBC: Final = ctypes.CDLL(None) if sys.platform == "linux" else None
"""Loaded here and not in the forked child, where loading could meet a lock that nobody will release."""


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """A process to keep alive."""

    name: str
    """Unique, also the name of its log: `sampler-0`."""
    role: str
    """gateway, sampler, teacher, trainer or valkey: the order of the stop goes by it."""
    argv: tuple[str, ...]
    """Program and arguments; no secrets, since every user of the machine can read them."""
    env: dict[str, str] = field(default_factory=dict)
    """Variables added to the supervisor's own environment."""


class Child:
    """One supervised process. States: waiting (for its turn or a restart) -> running -> waiting | stopped."""

    def __init__(self, spec: ProcessSpec, deployment: Deployment, *, healthy_s: float = HEALTHY_S) -> None:
        self.spec = spec
        self.restarts = 0
        self.deaths_in_a_row = 0
        """Deaths since it last lived for `healthy_s`."""
        self.started_at = 0.0
        self.restart_at: float | None = None
        """Monotonic time of the next start; None = not planned."""
        self.killed_because = ""
        """What is to be said about its death, if we killed it."""
        self._deployment = deployment
        self._healthy_s = healthy_s
        self._delay_s = BACKOFF_MIN_S
        self._popen: subprocess.Popen[bytes] | None = None
        self._started = 0.0

    @property
    def pid(self) -> int | None:
        """Its pid, which is also its process group; None while it does not run."""
        return self._popen.pid if self._popen else None

    @property
    def state(self) -> str:
        """running, restarting or stopped."""
        if self._popen is not None:
            return "running"
        return "restarting" if self.restart_at is not None else "stopped"

    def start(self) -> None:
        """Start it now.

        Raises:
            OSError: the program cannot be started.
        """
        log = self._deployment.open_log(self.spec.name)
        try:
            self._popen = subprocess.Popen(
                self.spec.argv,
                env={**os.environ, **self.spec.env, "STILLHOUSE_HOME": str(self._deployment.home)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                # safe beside the thread that looks for signs of life: it takes no lock
                preexec_fn=_die_with(os.getpid()),
            )
        finally:
            os.close(log)
        self.restart_at, self.killed_because = None, ""
        self.started_at, self._started = time.time(), time.monotonic()

    def collect(self) -> int | None:
        """Exit code if it has died since the last look (negative = signal), and the rest of its group killed."""
        if self._popen is None:
            return None
        if hasattr(os, "waitid"):
            # WNOWAIT keeps the zombie, and with it the pid, until the group is dealt with: no chance to hit a stranger
            if os.waitid(os.P_PID, self._popen.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                return None
        elif self._popen.poll() is None:  # macOS before Python 3.13: the group outlives its leader, or is empty
            return None
        self.signal(signal.SIGKILL)
        code = self._popen.wait()
        self._popen = None
        return code

    def plan_restart(self) -> float:
        """Schedule the next start with back-off; returns the pause in seconds."""
        if time.monotonic() - self._started >= self._healthy_s:
            self._delay_s, self.deaths_in_a_row = BACKOFF_MIN_S, 0
        delay = self._delay_s
        self.deaths_in_a_row += 1
        self.restart_at = time.monotonic() + delay
        self._delay_s = min(2 * delay, BACKOFF_MAX_S)
        return delay

    def signal(self, number: int) -> None:
        """Send a signal to its whole group."""
        if self._popen is None:
            return
        with suppress(ProcessLookupError, PermissionError):  # the group is empty; macOS says EPERM for one of zombies
            os.killpg(self._popen.pid, number)

    def kill(self, because: str) -> None:
        """End it and its group at once."""
        self.killed_because = because
        self.signal(signal.SIGKILL)

    def terminate(self) -> None:
        """Ask it to stop, and plan no restart. Its own children are its own business."""
        self.restart_at = None
        if self._popen is not None:
            # not Popen.send_signal: that would reap it, and `collect` could no longer reach its group safely
            os.kill(self._popen.pid, signal.SIGTERM)


def _die_with(parent: int) -> Callable[[], None] | None:
    """For the forked child: SIGTERM when the supervisor dies, by whatever signal."""
    if _LIBC is None:
        return None
    prctl = _LIBC.prctl

    def set_parent_death_signal() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died between fork and prctl
            os._exit(1)

    return set_parent_death_signal


def is_alive(pid: int) -> bool:
    """It exists and is not a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    fields = _stat(pid)
    return fields is None or fields[0] != "Z"


def ours(groups: Iterable[int], home: Path) -> list[int]:
    """Living pids in these process groups that belong to the deployment at `home`.

    A recorded pid may have gone to another program since; on Linux the environment of the process decides. Elsewhere,
    where it cannot be read, its command line does.
    """
    wanted = set(groups)
    if sys.platform != "linux":
        return [pid for pid in wanted if is_alive(pid) and _mentions_us(pid)]
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        pid = int(entry.name)
        fields = _stat(pid)
        if fields is None or fields[0] == "Z" or int(fields[2]) not in wanted:
            continue
        if f"STILLHOUSE_HOME={home}".encode() in _read(entry / "environ").split(b"\0"):
            found.append(pid)
    return sorted(found)


def holds(pid: int, path: Path) -> bool:
    """The process has this file open; where the kernel does not tell, its command line decides."""
    if pid <= 0 or not is_alive(pid):
        return False
    if sys.platform != "linux":
        return _mentions_us(pid)
    for link in Path(f"/proc/{pid}/fd").glob("*"):
        with suppress(OSError):  # closed meanwhile
            if os.readlink(link) == str(path):
                return True
    return False


def memory_bytes(pid: int) -> int | None:
    """Resident memory of a process and its children (ranks, verifiers); None if unknown."""
    children = _read(Path(f"/proc/{pid}/task/{pid}/children")).split()
    for line in _read(Path(f"/proc/{pid}/status")).splitlines():
        if line.startswith(b"VmRSS:"):
            return int(line.split()[1]) * 1024 + sum(memory_bytes(int(child)) or 0 for child in children)
    return None


def wait_gone(pids: Callable[[], list[int]], timeout_s: float) -> list[int]:
    """Wait until `pids()` is empty; returns what is left at the deadline."""
    deadline = time.monotonic() + timeout_s
    while (left := pids()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def send(pids: Iterable[int], number: int) -> None:
    """Signal processes, those already gone excepted.

    Raises:
        ValueError: a pid is not positive; to the kernel that means our own group or everyone.
    """
    for pid in pids:
        if pid <= 0:
            raise ValueError(f"pid {pid} is no single process")
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/{pid}/stat after the command name: state, ppid, pgrp, session ..."""
    text = _read(Path(f"/proc/{pid}/stat")).decode(errors="replace")
    return text.rpartition(")")[2].split() if text else None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it died meanwhile, is not ours to read, or there is no /proc
        return b""


def _mentions_us(pid: int) -> bool:
    shown = subprocess.run(["ps", "-p", str(pid), "-o", "command="], capture_output=True, text=True, check=False)
    return "stillhouse" in shown.stdout or "valkey-server" in shown.stdout
