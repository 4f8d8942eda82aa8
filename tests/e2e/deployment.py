"""A deployment as a user has it: the `stillhouse` command, real processes, a home of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx


class Stillhouse:
    """The command, as a user on a fresh machine has it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.env = {key: value for key, value in os.environ.items() if not key.startswith("STILLHOUSE_")}
        self.env |= {"STILLHOUSE_HOME": str(home), "OMP_NUM_THREADS": "1"}

    def __call__(self, *arguments: str, code: int = 0, timeout_s: float = 200) -> str:
        answer = subprocess.run(
            [sys.executable, "-m", "stillhouse.cli.main", *arguments],
            env=self.env,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert answer.returncode == code, f"{arguments}: {answer.stdout}\n{answer.stderr}\n{self.logs()}"
        return answer.stdout if code == 0 else answer.stderr

    def get(self, path: str) -> Any:
        """What the gateway answers, asked directly: the command takes seconds of CPU to start, too much for a poll."""
        client = json.loads((self.home / "client.json").read_text())
        headers = {"Authorization": f"Bearer {client['api_key']}"}
        answer = httpx.get(f"{client['url']}{path}", headers=headers, timeout=25, trust_env=False)
        return answer.raise_for_status().json()

    def services(self) -> dict[str, dict[str, Any]]:
        """Rows of `ps` by instance."""
        return {row["instance"]: row for row in json.loads(self("ps", "--json"))["services"]}

    def processes(self) -> list[str]:
        """Living processes with our home in their environment, as /proc knows them: the oracle for orphans."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                environ = (entry / "environ").read_bytes() if entry.name.isdigit() else b""
                if f"STILLHOUSE_HOME={self.home}\0".encode() in environ:
                    found.append(f"{entry.name} {(entry / 'cmdline').read_bytes().decode()}")
            except OSError:
                continue
        return found

    def logs(self) -> str:
        return "\n".join(f"== {path.name}\n{path.read_text()[-1500:]}" for path in sorted(self.home.glob("logs/*.log")))


def wait_until(condition: Callable[[], Any], what: str, timeout_s: float = 90) -> Any:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if result := condition():
            return result
        time.sleep(0.2)
    raise AssertionError(f"waited {timeout_s} s for {what}")
