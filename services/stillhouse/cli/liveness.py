"""Which children have stopped to show signs of life: frozen, deadlocked or cut off, but not dead.

The sign of a service is its heartbeat in the registry, which its event loop sends every two seconds; that of the queue
server is any answer at all. A look takes place in a thread, so that whoever asks never waits.

When all heartbeats stop at once it is not the services: a queue server that answers and refuses writes (its disk is
full) keeps none. Then nobody is accused.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from stillhouse.cli import valkey
from stillhouse.cli.deployment import Deployment
from stillhouse.cli.process import Child
from stillhouse.cli.registry import live_services
from stillhouse.core.errors import StillhouseError

HANG_S: Final = 15.0
"""Silence after which a process is taken for frozen: seven heartbeats, so that two overloaded cores kill nobody."""
START_S: Final = 180.0
"""The same before the first sign: imports take a minute from a cold disk on two busy cores."""
LOOK_S: Final = 2.0
"""Time between looks: a heartbeat. A look costs some ten milliseconds of CPU."""
MIN_LOOKS: Final = 4
"""Looks in a row without a sign, however long they took: a supervisor that was itself asleep accuses nobody."""

Look = Callable[[], "Mapping[str, Hashable] | None"]
"""Signs by name of the process, each different from the one before while the process lives; None = nobody can tell,
because the queue server that keeps the heartbeats is silent. Has a deadline of its own."""


@dataclass(slots=True)
class _Silence:
    """What is known about one process since its last sign."""

    pid: int
    since: float
    sign: Hashable = None
    looks: int = 0

    def is_over(self, sign: Hashable, now: float) -> bool:
        """Note what a look has seen; True if it was a new sign."""
        if sign is None or sign == self.sign:
            self.looks += 1
            return False
        self.sign, self.since, self.looks = sign, now, 0
        return True


class Liveness:
    """Signs of life of the children of one supervisor; `hang_s` = 0 looks at nobody."""

    def __init__(self, look: Look | None, hang_s: float, *, start_s: float = START_S, look_s: float = LOOK_S) -> None:
        self._look = look
        self._hang_s = hang_s
        self._start_s = start_s
        self._look_s = look_s
        self._silences: dict[str, _Silence] = {}
        self._thread: threading.Thread | None = None
        self._seen: Mapping[str, Hashable] | None = None
        self._next_look = 0.0

    def silent(self, children: Sequence[Child]) -> list[tuple[Child, float]]:
        """Children that have been silent for too long, and for how many seconds. Returns at once."""
        now = time.monotonic()
        if self._look is None or self._hang_s == 0 or now < self._next_look:
            return []
        if self._thread is None:
            self._thread = threading.Thread(target=self._take_a_look, name="liveness", daemon=True)
            self._thread.start()
        if self._thread.is_alive():
            return []
        self._thread, self._next_look = None, now + self._look_s
        return self._judge(children, self._seen, now)

    def _take_a_look(self) -> None:
        assert self._look is not None
        self._seen = None  # should the look raise, nobody can tell
        self._seen = self._look()

    def _judge(
        self, children: Sequence[Child], seen: Mapping[str, Hashable] | None, now: float
    ) -> list[tuple[Child, float]]:
        can_tell = seen is not None and any(
            self._is_new(child, seen.get(child.spec.name)) for child in children if child.spec.role != "valkey"
        )
        guilty = []
        for child in children:
            name, silence = child.spec.name, self._silences.get(child.spec.name)
            if child.pid is None:
                self._silences.pop(name, None)
                continue
            if silence is None or silence.pid != child.pid:
                self._silences[name] = silence = _Silence(child.pid, now)
            if not can_tell and child.spec.role != "valkey":  # it starts anew once somebody can tell
                silence.since, silence.looks = now, 0
            elif not silence.is_over((seen or {}).get(name), now):
                limit_s = self._start_s if silence.sign is None else self._hang_s
                if silence.looks >= MIN_LOOKS and now - silence.since >= limit_s:
                    guilty.append((child, now - silence.since))
        return guilty

    def _is_new(self, child: Child, sign: Hashable) -> bool:
        known = self._silences.get(child.spec.name)
        return sign is not None and (known is None or sign != known.sign)


def look_at(deployment: Deployment, valkey_port: int, pid_of: Callable[[str], int | None]) -> Look:
    """A look at the processes of a deployment. A heartbeat counts if it comes from the pid that runs now."""

    def look() -> Mapping[str, Hashable] | None:
        if not valkey.is_alive(deployment, valkey_port):
            return None
        signs: dict[str, Hashable] = {"valkey": time.monotonic()}
        try:
            services = asyncio.run(live_services(deployment))
        except StillhouseError:  # config.yaml is being edited: nothing is known of the services
            return signs
        for info in services:
            if info.pid == pid_of(info.instance):
                signs[info.instance] = (info.pid, info.seen_at)
        return signs

    return look
