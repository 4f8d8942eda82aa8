"""The home folder of a local deployment: where everything lies, its secrets, its state, and who may run it.

    {home}/client.json           0600  {"url", "api_key"} for the client on this machine
           api-keys.json         0600  hashed API keys, read by the gateway
           models.yaml                 registered models
           run/lock                    held (flock) by the supervisor as long as it lives
           run/state.json              what runs: pids, ports, restarts
           run/internal-token    0600  credential between services
           run/valkey-password   0600
           run/valkey.conf       0600
           valkey/  logs/  artifacts/

The lock, not a pid file, says whether a supervisor lives: the kernel drops it at any kind of death, and a pid that
was given to another program proves nothing.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from stillhouse.cli.console import EXIT_RUNNING, EXIT_USAGE, CliError
from stillhouse.core.blobs import read_json, write_atomic, write_json
from stillhouse.core.errors import NotFoundError

PRIVATE_DIR: Final = 0o700
PRIVATE_FILE: Final = 0o600
DEFAULT_HOME: Final = "~/.stillhouse"
LOG_LIMIT_BYTES: Final = 10 << 20
"""A log longer than this is set aside when its process starts: a day of a busy service."""
LOGS_KEPT: Final = 3
"""Logs set aside per service."""
LOCK_PATIENCE_S: Final = 0.5
"""Another command may look at the lock, which holds it for microseconds."""


class Deployment:
    """Paths, secrets and state below one home folder."""

    def __init__(self, home: Path | str | None = None) -> None:
        given = home or os.environ.get("STILLHOUSE_HOME") or DEFAULT_HOME
        self.home = Path(given).expanduser().resolve()
        self.run = self.home / "run"
        self.logs = self.home / "logs"
        self.valkey = self.home / "valkey"
        self.state_file = self.run / "state.json"
        self.lock_file = self.run / "lock"
        self.internal_token = self.run / "internal-token"
        self.valkey_password = self.run / "valkey-password"
        self.valkey_config = self.run / "valkey.conf"
        self.client_file = self.home / "client.json"

    def prepare(self) -> None:
        """Create folders and secrets; what exists stays.

        Raises:
            CliError: the folder cannot be written.
        """
        try:
            if not self.home.exists():
                self.home.mkdir(parents=True, mode=PRIVATE_DIR)
            for folder in (self.run, self.logs, self.valkey):
                folder.mkdir(exist_ok=True, mode=PRIVATE_DIR)
            for secret in (self.internal_token, self.valkey_password):
                if not secret.is_file() or len(secret.read_text().strip()) < 16:
                    write_atomic(secret, secrets.token_urlsafe(32).encode(), mode=PRIVATE_FILE)
        except OSError as error:
            raise CliError(
                f"cannot write the home folder {self.home}: {error.strerror}",
                fix="choose another with --home DIR",
                exit_code=EXIT_USAGE,
            ) from None

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Be the one supervisor of this home.

        Raises:
            CliError: another one is; names its pid.
        """
        fd = os.open(self.lock_file, os.O_RDWR | os.O_CREAT, PRIVATE_FILE)
        try:
            deadline = time.monotonic() + LOCK_PATIENCE_S
            while not _try_lock(fd):
                if time.monotonic() > deadline:
                    raise self.already_running()
                time.sleep(0.02)
            os.ftruncate(fd, 0)
            os.write(fd, str(os.getpid()).encode())
            try:
                yield
            finally:
                os.ftruncate(fd, 0)  # while it is still ours: nobody may read the number of one that has gone
        finally:
            os.close(fd)

    def supervisor_pid(self) -> int | None:
        """Pid of the supervisor that holds the lock, 0 while it has not written it yet; None if nobody holds it.

        Asks for a shared lock, which only a supervisor's stands against: two commands may look at the same time.
        """
        try:
            fd = os.open(self.lock_file, os.O_RDWR)
        except FileNotFoundError:
            return None
        try:
            deadline = time.monotonic() + LOCK_PATIENCE_S
            while not _try_lock(fd, fcntl.LOCK_SH):
                text = os.pread(fd, 32, 0).decode()
                # between flock and write the file is empty: the holder lives, its number comes in a moment
                if text.isdigit() or time.monotonic() > deadline:
                    return int(text or 0)
                time.sleep(0.02)
            return None
        finally:
            os.close(fd)

    def already_running(self) -> CliError:
        """The error of a second `up`."""
        return CliError(
            f"already running in {self.home} (supervisor pid {self.supervisor_pid() or '?'})",
            fix="`stillhouse ps` shows it, `stillhouse down` stops it; a second one needs its own --home and --port",
            exit_code=EXIT_RUNNING,
        )

    def read_state(self) -> dict[str, Any]:
        """What the last supervisor wrote; {} if there was none."""
        try:
            state = read_json(self.state_file)
        except NotFoundError:
            return {}
        return state if isinstance(state, dict) else {}

    def write_state(self, state: dict[str, Any]) -> None:
        """Replace state.json; readers see old or new."""
        write_json(self.state_file, {**state, "updated": round(time.time(), 3)}, mode=PRIVATE_FILE)

    def environment(self, valkey_port: int) -> dict[str, str]:
        """STILLHOUSE_* variables that every service of this deployment shares. Secrets travel as file names only."""
        return {
            "STILLHOUSE_HOME": str(self.home),
            "STILLHOUSE_REDIS_URL": f"redis://127.0.0.1:{valkey_port}/0",
            "STILLHOUSE_REDIS_PASSWORD_FILE": str(self.valkey_password),
            "STILLHOUSE_INTERNAL_TOKEN_FILE": str(self.internal_token),
        }

    def open_log(self, name: str) -> int:
        """A file descriptor that appends to the log of a process; an overlong log is set aside first."""
        path = self.logs / f"{name}.log"
        if path.is_file() and path.stat().st_size > LOG_LIMIT_BYTES:
            for number in range(LOGS_KEPT - 1, 0, -1):
                older = path.with_name(f"{name}.log.{number}")
                if older.is_file():
                    older.rename(path.with_name(f"{name}.log.{number + 1}"))
            path.rename(path.with_name(f"{name}.log.1"))
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, PRIVATE_FILE)

    def log_tail(self, name: str, lines: int = 8) -> str:
        """The last lines of a process's log."""
        try:
            text = (self.logs / f"{name}.log").read_text(errors="replace")
        except FileNotFoundError:
            return ""
        return "\n".join(text.splitlines()[-lines:])


def _try_lock(fd: int, kind: int = fcntl.LOCK_EX) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
