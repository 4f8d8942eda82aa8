"""Keeps the processes of a local deployment alive and stops them in order.

One loop, no events: every TICK_S it collects what died, kills what has shown no sign of life for `hang_s` (liveness.py;
SIGKILL works on a stopped process, too) and starts what is due. It knows nothing about services; up.py says what to run
and when all of it counts as ready.

Tests that freeze processes and wake them again switch the killing off: `stillhouse up --hang 0`.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from stillhouse.cli.console import CliError
from stillhouse.cli.deployment import Deployment
from stillhouse.cli.liveness import Liveness
from stillhouse.cli.process import HEALTHY_S, Child, ProcessSpec

TICK_S: Final = 0.1
"""Time between looks: a death is noticed before anyone waits for it, and a hundred looks cost a millisecond of CPU."""
STOP_ORDER: Final = ("gateway", "sampler", "teacher", "trainer", "valkey")
"""First who lets work in, then who does it, last who keeps the queues that all of them hand work back to."""
MAX_EARLY_DEATHS: Final = 3
"""A process that dies so often before the deployment was ever ready is misconfigured; restarts would only hide it."""


class Supervisor:
    """Children of one deployment.

    consumes:     deaths and silence of children, `request_stop`
    waits for:    the next tick, TICK_S
    produces:     restarts, state.json
    unblocked by: time alone; nothing here blocks
    """

    def __init__(
        self,
        deployment: Deployment,
        *,
        report: Callable[[str], None],
        drain_s: float,
        facts: dict[str, Any] | None = None,
        healthy_s: float = HEALTHY_S,
    ) -> None:
        self.children: list[Child] = []
        self.facts: dict[str, Any] = {"status": "starting", **(facts or {})}
        """What state.json says besides the processes."""
        self._deployment = deployment
        self._report = report
        self._drain_s = drain_s
        self._healthy_s = healthy_s
        self._liveness: Liveness | None = None
        self._stop_requests = 0

    def handle_signals(self) -> None:
        """SIGTERM, SIGINT and SIGHUP ask for the stop; a second one ends the patience with those that drain."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: self.request_stop())

    def watch(self, liveness: Liveness) -> None:
        """From now on, kill children that `liveness` takes for frozen; the next look at them starts them again."""
        self._liveness = liveness

    def request_stop(self) -> None:
        """Leave `run` or `wait_until` at the next tick."""
        self._stop_requests += 1

    @property
    def is_stopping(self) -> bool:
        return self._stop_requests > 0

    def start(self, specs: Sequence[ProcessSpec]) -> None:
        """Start processes and keep them alive from now on.

        Raises:
            CliError: a program cannot be started.
        """
        for spec in specs:
            child = Child(spec, self._deployment, healthy_s=self._healthy_s)
            try:
                child.start()
            except OSError as error:
                raise CliError(f"cannot start {spec.name} ({spec.argv[0]}): {error.strerror}") from None
            self.children.append(child)
        self.save()

    def tick(self) -> None:
        """Kill the frozen, collect the dead, start what is due."""
        changed = False
        for child, silent_s in self._liveness.silent(self.children) if self._liveness else ():
            child.kill(f"gave no sign of life for {silent_s:.0f} s and was killed")
        for child in self.children:
            code = child.collect()
            if code is not None:
                delay = child.plan_restart()
                self._report(f"{child.spec.name} {child.killed_because or _ending(code)}; restart in {delay:g} s")
                changed = True
            if child.restart_at is not None and time.monotonic() >= child.restart_at:
                self._restart(child)
                changed = True
        if changed:
            self.save()

    def _restart(self, child: Child) -> None:
        child.restarts += 1
        try:
            child.start()
        except OSError as error:
            delay = child.plan_restart()
            self._report(f"{child.spec.name} cannot be started: {error.strerror}; next try in {delay:g} s")

    def wait_until(self, condition: Callable[[], bool], timeout_s: float, what: str) -> bool:
        """Keep everything alive until `condition` holds; False if the stop was requested meanwhile.

        Raises:
            CliError: a process keeps dying, or `timeout_s` is over; shows the end of its log.
        """
        deadline = time.monotonic() + timeout_s
        while not self.is_stopping:
            self.tick()
            for child in self.children:
                if child.deaths_in_a_row >= MAX_EARLY_DEATHS:
                    raise self._gives_up(child)
            if condition():
                return True
            if time.monotonic() > deadline:
                raise CliError(
                    f"waited {timeout_s:g} s for {what}",
                    fix=f"look into the logs in {self._deployment.logs}; `stillhouse doctor` checks the machine",
                )
            time.sleep(TICK_S)
        return False

    def run(self) -> None:
        """Keep everything alive until the stop is requested."""
        while not self.is_stopping:
            self.tick()
            time.sleep(TICK_S)

    def stop(self) -> None:
        """Stop all processes, role by role; at the end none is left."""
        self.facts["status"] = "stopping"
        self.save()
        patience = self._stop_requests  # a signal after this point means: now
        known = [role for role in STOP_ORDER if any(child.spec.role == role for child in self.children)]
        others = sorted({child.spec.role for child in self.children} - set(STOP_ORDER))
        for role in [*others, *known]:
            group = [child for child in self.children if child.spec.role == role]
            for child in group:
                child.terminate()
            self._drain(group, patience)
        self.facts["status"] = "stopped"
        self.save()

    def _drain(self, group: list[Child], patience: int) -> None:
        deadline = time.monotonic() + self._drain_s
        while any(child.pid is not None for child in group):
            for child in group:
                child.collect()
            is_urged = self._stop_requests > patience
            if is_urged or time.monotonic() > deadline:
                patience = self._stop_requests
                deadline = time.monotonic() + self._drain_s
                reason = "a second signal" if is_urged else f"it did not stop within {self._drain_s:g} s"
                for child in group:
                    if child.pid is not None:
                        self._report(f"{child.spec.name} killed: {reason}")
                        child.signal(signal.SIGKILL)
            time.sleep(TICK_S / 5)
        self.save()

    def pid_of(self, name: str) -> int | None:
        """The pid of a child; None while it does not run."""
        return next((child.pid for child in self.children if child.spec.name == name), None)

    def save(self) -> None:
        """Write state.json; a full disk is reported and no reason to let go of the processes."""
        services = [
            {
                "name": child.spec.name,
                "role": child.spec.role,
                "pid": child.pid,
                "state": child.state,
                "restarts": child.restarts,
                "started_at": round(child.started_at, 3),
            }
            for child in self.children
        ]
        try:
            self._deployment.write_state({**self.facts, "services": services})
        except OSError as error:
            self._report(f"cannot write {self._deployment.state_file}: {error.strerror}")

    def _gives_up(self, child: Child) -> CliError:
        tail = self._deployment.log_tail(child.spec.name)
        return CliError(
            f"{child.spec.name} died {child.deaths_in_a_row} times while starting; the end of its log:\n{tail}",
            fix=f"the whole log is {self._deployment.logs / (child.spec.name + '.log')}; "
            "`stillhouse doctor` checks the machine",
        )


def _ending(code: int) -> str:
    """`exited with 1` or `was killed by SIGKILL`."""
    if code >= 0:
        return f"exited with {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"
