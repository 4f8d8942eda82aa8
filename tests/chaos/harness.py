"""A whole deployment of real processes that tests hurt: armed failpoints, signals, and what can be seen from outside.

with deployment(folder) as chaos:
    chaos.arm("trainer.journalled", "kill")
    job_id = chaos.submit(job("one"))
    chaos.hit("trainer.journalled")
    chaos.ended(job_id)
    assert chaos.violations(job_id) == []
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import httpx
from redis import Redis
from redis.exceptions import RedisError

from stillhouse.client.client import Client
from stillhouse.client.errors import ApiError
from stillhouse.core.blobs import Artifacts, JobArtifacts, read_json, read_jsonl
from stillhouse.core.errors import StillhouseError, UnavailableError
from stillhouse.core.failpoints import ENVIRONMENT, POINTS
from stillhouse.core.oracle.ends import is_temporary
from stillhouse.core.oracle.verify import verify_job
from stillhouse.core.queue import keys
from stillhouse.core.queue.jobs import JobRecord, _record
from tests.cluster import job_spec
from tests.e2e.deployment import Stillhouse
from tests.tiny import make_tiny_model

LEASE_S: Final = 3.0
"""Short, so that takeovers are quick; long enough for an event loop that shares two cores with seven others."""
POLL_S: Final = 0.05
PATIENCE_S: Final = float(os.environ.get("CHAOS_PATIENCE_S", "60"))
"""Deadline of every wait: cells take a few seconds on an idle machine."""


def until(condition: Callable[[], Any], what: str, timeout_s: float = PATIENCE_S) -> Any:
    """The first true value of `condition`.

    Raises:
        AssertionError: says what never happened.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        if value := condition():
            return value
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s for {what}"
        time.sleep(POLL_S)


def clock(seconds: float) -> Callable[[], bool]:
    """A condition that holds once so much time has passed: for leases that must run out."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() >= end


@dataclass(frozen=True, slots=True)
class Moment:
    """What the record of a job said at a time."""

    at: float
    status: str
    epoch: int
    step: int
    weights_epoch: int


@dataclass
class Timeline:
    """A job, watched from beside it: every change of its record."""

    moments: list[Moment] = field(default_factory=list)

    def backwards(self) -> list[str]:
        """Changes that no claim may make: an older epoch, weights of an older epoch, fewer steps in the same epoch."""
        found = []
        for before, after in zip(self.moments, self.moments[1:], strict=False):
            if after.epoch < before.epoch or after.weights_epoch < before.weights_epoch:
                found.append(f"epoch goes back: {before} -> {after}")
            if after.epoch == before.epoch and after.status in ENDS and after.step < before.step:
                found.append(f"step goes back: {before} -> {after}")
            if before.status in ENDS and after.status != before.status:
                found.append(f"an ended job goes on: {before} -> {after}")
        return found


ENDS: Final = ("succeeded", "failed", "cancelled")


class Chaos:
    """A running deployment."""

    def __init__(self, command: Stillhouse, failpoints: Path, lease_s: float = LEASE_S) -> None:
        self.lease_s = lease_s
        self.command = command
        self.home = command.home
        self.failpoints = failpoints
        self.artifacts = Artifacts(command.home / "artifacts")
        client = read_json(command.home / "client.json")
        self.url, self.api_key = client["url"], client["api_key"]
        self.redis = Redis(
            port=self.state()["valkey_port"],
            password=(command.home / "run" / "valkey-password").read_text().strip(),
            socket_timeout=5,
        )

    # -- processes ---------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        return read_json(self.home / "run" / "state.json")

    def pids(self, role: str = "") -> dict[str, int]:
        """Running processes by name."""
        rows = self.state()["services"]
        return {row["name"]: row["pid"] for row in rows if row["pid"] and role in ("", row["role"])}

    def ready(self, role: str) -> list[str]:
        """Processes of a role whose heartbeat is in the registry."""
        found = []
        with suppress(RedisError, OSError):
            for name, pid in self.pids(role).items():
                known = self.redis.hget(keys.service(role, name), "pid")
                if known == str(pid).encode() and process_state(pid) in "RSD":
                    found.append(name)
        return found

    def wait_ready(self, **numbers: int) -> None:
        """Wait until so many processes of each role serve; one of each that is not named."""
        wanted = {"gateway": 1, "sampler": 1, "teacher": 1, "trainer": 1} | numbers
        until(
            lambda: all(len(self.ready(role)) >= number for role, number in wanted.items()),
            f"{wanted} services to be ready",
            120,
        )

    def doing(self, name: str) -> str:
        """What a process says it does."""
        role = name.partition("-")[0]
        value: Any = self.redis.hget(keys.service(role, name), "state")
        return value.decode() if value else ""

    def kill(self, name: str, number: int = signal.SIGKILL) -> int:
        """Send a signal to a running process; its pid."""
        pid = until(lambda: self.pids().get(name), f"{name} to run")
        os.kill(pid, number)
        return pid

    # -- failpoints --------------------------------------------------------------------------------------------------

    def arm(self, point: str, action: str, **order: Any) -> None:
        """Have the next process at a point do `action`."""
        assert point in POINTS, point
        (self.failpoints / f"{point}.hit").unlink(missing_ok=True)
        armed = self.failpoints / f"{point}.armed"
        temp = armed.with_suffix(".new")
        temp.write_text(json.dumps({"action": action, **order}))
        temp.rename(armed)

    def taken(self, point: str) -> dict[str, Any] | None:
        """What happened at an armed point: {"pid", "role", "detail", "at"}; None = nothing yet."""
        path = self.failpoints / f"{point}.hit"
        with suppress(OSError, json.JSONDecodeError):
            found = json.loads(path.read_bytes())
            if "pid" in found:
                return {**found, "at": path.stat().st_mtime}
        return None

    def disarm(self) -> None:
        for path in self.failpoints.iterdir():
            path.unlink(missing_ok=True)

    # -- jobs --------------------------------------------------------------------------------------------------------

    def submit(self, spec: dict[str, Any], timeout_s: float = PATIENCE_S) -> str:
        """Submit as a client does that does not give up: the same Idempotency-Key until there is an answer."""
        return self._insist(lambda client: client.jobs.create(spec, idempotency_key=spec["name"]), timeout_s)["id"]

    def cancel(self, job_id: str, timeout_s: float = PATIENCE_S) -> dict[str, Any]:
        return self._insist(lambda client: client.jobs.cancel(job_id), timeout_s)

    def _insist(self, call: Callable[[Client], Any], timeout_s: float) -> Any:
        deadline = time.monotonic() + timeout_s
        with Client(self.url, self.api_key, retries=0) as client:
            while True:
                try:
                    return call(client)
                except (UnavailableError, httpx.HTTPError) as error:
                    problem: Exception = error
                except ApiError as error:
                    if error.status < 500:
                        raise
                    problem = error
                assert time.monotonic() < deadline, f"the gateway did not answer in {timeout_s:g} s: {problem}"
                time.sleep(4 * POLL_S)

    def record(self, job_id: str) -> JobRecord | None:
        """The record; None while the queue server does not answer or does not know it."""
        try:
            raw: Any = self.redis.hgetall(keys.job(job_id))
        except (RedisError, OSError):
            return None
        return _record({key.decode(): value.decode() for key, value in raw.items()}) if b"id" in raw else None

    def ended(self, job_id: str, timeout_s: float = PATIENCE_S) -> JobRecord:
        """Wait for the end of a job, final.json included."""
        final = self.job(job_id).root / "final.json"

        def over() -> JobRecord | None:
            record = self.record(job_id)
            return record if record and record.is_terminal and final.is_file() else None

        try:
            return until(over, f"{job_id} to end", timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{error}; its record: {self.record(job_id)}; {self.command.logs()}") from None

    def job(self, job_id: str) -> JobArtifacts:
        return self.artifacts.job(job_id)

    def named(self, name: str) -> tuple[list[str], list[str]]:
        """Jobs of a name: (in the queue server, in the artifacts)."""
        ids: Any = self.redis.zrange(keys.JOBS, 0, -1)
        records = [self.record(job_id.decode()) for job_id in ids]
        on_disk = []
        for job_id in self.artifacts.job_ids():
            with suppress(StillhouseError):  # the sweeper removed it just now
                on_disk.append((job_id, read_json(self.artifacts.job(job_id).job_json)["spec"]["name"]))
        return (
            [record.id for record in records if record and record.spec["name"] == name],
            [job_id for job_id, given in on_disk if given == name],
        )

    @contextmanager
    def watched(self, job_id: Callable[[], str | None]) -> Iterator[Timeline]:
        """Watch a job's record from a thread; `job_id` = None while it is not known."""
        timeline, stop = Timeline(), threading.Event()

        def watch() -> None:
            while not stop.wait(POLL_S):
                if (name := job_id()) and (moment := self._moment(name)):
                    last = timeline.moments[-1] if timeline.moments else None
                    if last is None or replace(last, at=moment.at) != moment:
                        timeline.moments.append(moment)

        thread = threading.Thread(target=watch, name="watch", daemon=True)
        thread.start()
        try:
            yield timeline
        finally:
            stop.set()
            thread.join()

    def _moment(self, job_id: str) -> Moment | None:
        record = self.record(job_id)
        if record is None:
            return None
        weights_epoch = (record.weights or {}).get("epoch", 0)
        return Moment(time.time(), record.status, record.epoch, record.step, weights_epoch)

    def steps_at(self, job_id: str) -> list[float]:
        """When each step was trained, those of a replay included, and when the job ended: unix times."""
        times = [point["created_at"] for point in read_jsonl(self.job(job_id).metrics)]
        final = self.job(job_id).root / "final.json"
        return sorted(times) + ([read_json(final)["finished_at"]] if final.is_file() else [])

    def recovery_s(self, job_id: str, hit_at: float) -> float | None:
        """Seconds from a fault to the next trained step, or to the end of the job."""
        return next((round(at - hit_at, 2) for at in self.steps_at(job_id) if at > hit_at), None)

    # -- judgement ---------------------------------------------------------------------------------------------------

    def violations(self, job_id: str) -> list[str]:
        """What the oracle finds in an ended job, and work of it that is left in the queue server."""
        with suppress(AssertionError):  # the sweeper and the last claim clean up behind the end
            until(lambda: not self.leftovers(job_id), "the job's leftovers to go", 15)
        report = verify_job(self.job(job_id), self.record(job_id))
        found = [f"[{finding.rule}] {finding.message}" for finding in report.violations]
        return found + [f"left over: {name}" for name in self.leftovers(job_id)]

    def leftovers(self, job_id: str) -> list[str]:
        """Work streams, marks and leases of a job in the queue server; files in the making in its folder."""
        kept = {keys.events(job_id), keys.metrics(job_id)}
        streams = [key.decode() for key in self.redis.scan_iter(f"{keys.job(job_id)}:*") if key.decode() not in kept]
        return streams + [str(path) for path in self.job(job_id).root.rglob("*") if is_temporary(path)]


def process_state(pid: int) -> str:
    """R, S, D, T (stopped), Z; "X" = gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


@contextmanager
def deployment(
    folder: Path, *, lease_s: float = LEASE_S, samplers: int = 2, teachers: int = 2, trainers: int = 2, **env: str
) -> Iterator[Chaos]:
    """`stillhouse up` with two of each, and two tiny models; at the end nothing is left of it."""
    failpoints = folder / "failpoints"
    failpoints.mkdir(parents=True)
    command = Stillhouse(folder / "home")
    command.env |= {"STILLHOUSE_LEASE_S": str(lease_s), "STILLHOUSE_TEACHER_BATCH_TOKENS": "64"}
    command.env |= {ENVIRONMENT: str(failpoints), **env}
    try:
        for seed, name in enumerate(("student", "teacher")):
            command("models", "add", name, str(make_tiny_model(folder / name, seed=seed)))
        numbers = ["--samplers", samplers, "--teachers", teachers, "--trainers", trainers]
        # frozen processes are ours to wake, so nobody else may kill them
        command("up", "--detach", "--port", "0", "--threads", "1", "--hang", "0", *map(str, numbers))
        yield Chaos(command, failpoints, lease_s)
        for line in command.processes():  # `down` waits for those that we stopped
            with suppress(ProcessLookupError):
                os.kill(int(line.split()[0]), signal.SIGCONT)
        command("down")
        assert command.processes() == []
    finally:
        for line in command.processes():
            os.kill(int(line.split()[0]), signal.SIGKILL)


def job(name: str, *, objective: str = "full_vocabulary", steps: int = 7, every_steps: int = 2, **changes: Any) -> Any:
    """A small job: 3 groups of 2 a step over 5 rows, so that passes over the data end inside steps.

    Its seed follows from its name: teachers remember the scores of samples that another job drew before, and a job of
    such samples would never come to where they are scored.
    """
    return job_spec(
        name=name,
        seed=int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big"),
        stages__0__loss={"objective": objective},
        stages__0__schedule={
            "steps": steps,
            "prompts_per_step": 3,
            "group_size": 2,
            "max_staleness": 1,
            "micro_batch_tokens": 64,
        },
        checkpoint={"every_steps": every_steps},
        **changes,
    )
