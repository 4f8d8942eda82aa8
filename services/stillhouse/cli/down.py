"""`stillhouse down`, and the removal of what a killed supervisor left behind."""

from __future__ import annotations

import os
import signal
import time
from typing import Final

from stillhouse.cli import process
from stillhouse.cli.console import CliError, duration, say
from stillhouse.cli.deployment import LOCK_PATIENCE_S, Deployment
from stillhouse.cli.supervisor import STOP_ORDER

SLACK_S: Final = 10.0
"""Beyond the drain times of all roles: for a machine that swaps."""
DEFAULT_DRAIN_S: Final = 20.0
"""Where no supervisor recorded its own: as in core/config.py."""
KILL_WAIT_S: Final = 10.0
"""A killed process is gone at once, unless the kernel writes back its files first."""


def down(deployment: Deployment) -> None:
    """Stop a deployment; says what happened. At the end no process of it is left.

    Raises:
        CliError: something could not even be killed; names the pids.
    """
    started = time.monotonic()
    drain_s = float(deployment.read_state().get("drain_s", DEFAULT_DRAIN_S))
    pid = _supervisor(deployment)
    if pid is None:
        left = remove_leftovers(deployment, drain_s)
        if left:
            say(f"the supervisor was gone already; removed {len(left)} processes that it left in {deployment.home}")
        else:
            say(f"nothing is running in {deployment.home}")
        return
    processes = len(_groups(deployment))
    say(f"stopping {processes} processes of {deployment.home} (supervisor pid {pid}) ...")
    process.send([pid], signal.SIGTERM)
    if process.wait_gone(lambda: [pid] if process.is_alive(pid) else [], drain_s * len(STOP_ORDER) + SLACK_S):
        say(f"the supervisor (pid {pid}) does not stop; killing it")
        process.send([pid], signal.SIGKILL)
        process.wait_gone(lambda: [pid] if process.is_alive(pid) else [], KILL_WAIT_S)
    left = remove_leftovers(deployment, drain_s)
    extra = f"; {len(left)} had to be removed after it" if left else ""
    say(f"stopped in {duration(time.monotonic() - started)}{extra}")


def _supervisor(deployment: Deployment) -> int | None:
    """Pid of the supervisor, verified: a signal must hit no stranger. None if there is none.

    The open lock file proves it, and not the environment as in `process.ours`: a supervisor in the foreground knows
    its home by an option or the default.

    Raises:
        CliError: the lock is held, but not by the process whose number it shows.
    """
    deadline = time.monotonic() + LOCK_PATIENCE_S  # one that starts or ends right now settles within milliseconds
    while (pid := deployment.supervisor_pid()) is not None:
        if process.holds(pid, deployment.lock_file):
            return pid
        if time.monotonic() > deadline:
            raise CliError(
                f"{deployment.lock_file} is locked, but not by the process it names (pid {pid or '?'})",
                fix=f"`fuser {deployment.lock_file}` names the holder",
            )
        time.sleep(0.02)
    return None


def remove_leftovers(deployment: Deployment, drain_s: float) -> list[int]:
    """Stop recorded processes that live on without a supervisor; returns their pids.

    Raises:
        CliError: some do not even die by SIGKILL.
    """
    groups = _groups(deployment)
    found = process.ours(groups, deployment.home)
    if not found:
        return []
    process.send(found, signal.SIGTERM)
    left = process.wait_gone(lambda: process.ours(groups, deployment.home), drain_s)
    process.send(left, signal.SIGKILL)
    if stuck := process.wait_gone(lambda: process.ours(groups, deployment.home), KILL_WAIT_S):
        raise CliError(f"processes {stuck} do not die by SIGKILL", fix="they hang in the kernel: see `dmesg`")
    return found


def _groups(deployment: Deployment) -> list[int]:
    """Process groups that the last supervisor recorded; never our own."""
    services = deployment.read_state().get("services", [])
    return [service["pid"] for service in services if service.get("pid") and service["pid"] != os.getpgrp()]
