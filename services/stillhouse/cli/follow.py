"""Follows a job over REST: polls, survives a restarting gateway, and hands what it knows to a view.

Polling and not the event stream: progress fields change between events, and a poll has nothing to resume.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from stillhouse.core.errors import NotFoundError, StillhouseError, UnavailableError

POLL_S: Final = 1.0
"""A step takes seconds; a person does not see more than one picture a second."""
EXIT_CODES: Final = {"succeeded": 0, "failed": 1, "cancelled": 2}
"""The exit code of a watched job is its result."""
QUEUES_EVERY: Final = 3
"""Polls between two looks at the queues: each asks the queue server about all of them."""
RETRY_STATUS: Final = frozenset({0, 429, 500, 502, 503, 504})
"""HTTP answers that a restart or a moment's patience may cure; 0 = no answer."""
GIVE_UP_S: Final = 600.0
"""Without any answer for so long the watch ends: no restart takes ten minutes."""
MAX_WARNINGS: Final = 3
"""Warnings shown: the newest."""


class JobsApi(Protocol):
    """The part of `Client.jobs` that watching needs."""

    def get(self, job_id: str) -> Any:
        """The job as REST shows it."""
        ...

    def metrics(self, job_id: str, *, step_from: int = 0) -> Sequence[Any]:
        """Points {epoch, step, values} from `step_from` on."""
        ...

    def events(self, job_id: str, *, after: str = "") -> Iterable[Any]:
        """Events so far, after the one with id `after`."""
        ...


class ServicesApi(Protocol):
    """The part of `Client.services` that watching needs."""

    def queues(self) -> Sequence[Any]:
        """The work that waits, by role and model."""
        ...


@dataclass
class Picture:
    """What is known of a job."""

    job: Any = field(default_factory=dict)
    """A Job; {} until the gateway has answered."""
    points: dict[int, dict[str, float]] = field(default_factory=dict)
    """Metrics by step; after a takeover the newest of a repeated step."""
    evaluations: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Held-out measures by step, as their events tell them, with the event's `message`."""
    warnings: list[str] = field(default_factory=list)
    """The newest few."""
    queues: Sequence[Any] = ()
    """What waits in the deployment, of all jobs; those that hold something."""
    offline_since: float | None = None
    """Monotonic time since when the gateway does not answer."""

    @property
    def status(self) -> str:
        return str(self.job.get("status", "unknown"))

    @property
    def is_terminal(self) -> bool:
        return self.status in EXIT_CODES

    @property
    def progress(self) -> dict[str, Any]:
        return self.job.get("progress") or {}

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.progress.get("step") or self.job.get("step") or 0)

    @property
    def total_steps(self) -> int:
        return int(self.progress.get("total_steps") or self.job.get("stop_step") or 0)

    def curve(self, name: str) -> list[float]:
        """One metric over the steps; NaN where a step has none."""
        return [self.points[step].get(name, math.nan) for step in sorted(self.points)]

    def last(self, name: str) -> float | None:
        """The newest value of a metric."""
        if self.points:
            return self.points[max(self.points)].get(name)
        return (self.progress.get("last_metrics") or {}).get(name)


class View(Protocol):
    """Shows pictures."""

    def show(self, picture: Picture) -> None:
        """Called after every poll, also after one that failed."""
        ...


class Follower:
    """Keeps a picture up to date."""

    def __init__(
        self,
        jobs: JobsApi,
        job_id: str,
        *,
        services: ServicesApi | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.picture = Picture()
        self._jobs = jobs
        self._services = services
        self._num_polls = 0
        self._job_id = job_id
        self._clock = clock
        self._epoch: int | None = None
        self._last_event = ""

    def poll(self) -> Picture:
        """Ask for news; a gateway that stops to answer leaves the old picture, with `offline_since` set.

        Raises:
            StillhouseError: the first question failed (a wrong address or id), an answer that patience does not cure
                such as 401, or no answer for GIVE_UP_S.
        """
        picture = self.picture
        try:
            job = self._jobs.get(self._job_id)
            self._add_points(job)
            self._add_events()
            self._look_at_queues()
            picture.job = job  # last: a terminal status ends the watch, so everything else is complete by then
            picture.offline_since = None
        except Exception as error:
            if not picture.job or not (is_transient(error) or _is_missing(error)):
                raise
            now = self._clock()
            if picture.offline_since is None:
                picture.offline_since = now
            if now - picture.offline_since > GIVE_UP_S:
                raise UnavailableError(f"no answer for {GIVE_UP_S / 60:g} minutes; at last: {error}") from error
        return picture

    def _add_points(self, job: Any) -> None:
        points = self.picture.points
        epoch = job.get("epoch")
        # a takeover may repeat steps with new values: ask for all of them once
        newest = max(points, default=0) if epoch == self._epoch else 0
        for point in self._jobs.metrics(self._job_id, step_from=newest):
            # REST writes null for what is no finite number
            points[int(point["step"])] = {
                name: math.nan if value is None else value for name, value in point["values"].items()
            }
        self._epoch = epoch

    def _add_events(self) -> None:
        for event in self._jobs.events(self._job_id, after=self._last_event):
            self._last_event = event["id"]
            if event.get("type") == "evaluation":
                self.picture.evaluations[int(event["data"]["step"])] = {**event["data"], "message": event["message"]}
            if event.get("level") in ("warning", "warn", "error"):
                self.picture.warnings = [*self.picture.warnings, str(event["message"])][-MAX_WARNINGS:]

    def _look_at_queues(self) -> None:
        is_time = self._num_polls % QUEUES_EVERY == 0
        self._num_polls += 1
        if self._services is None or not is_time:
            return
        try:
            queues = self._services.queues()
        except StillhouseError:  # a gauge that is missing is no reason to stop watching
            queues = ()
        self.picture.queues = [queue for queue in queues if queue.waiting or queue.in_work]


def follow(
    follower: Follower, view: View, *, poll_s: float = POLL_S, pause: Callable[[float], None] = time.sleep
) -> int:
    """Show a job until it ends; returns the exit code of its result."""
    while True:
        picture = follower.poll()
        view.show(picture)
        if picture.is_terminal:
            return EXIT_CODES[picture.status]
        pause(poll_s)


def is_transient(error: Exception) -> bool:
    """Waiting may cure it: no connection, or a status of a gateway that restarts."""
    status = getattr(error, "status", None)
    if status is not None:
        return status in RETRY_STATUS
    return isinstance(error, UnavailableError | ConnectionError | TimeoutError)


def _is_missing(error: Exception) -> bool:
    """404. A job that was there is not gone: the gateway restarts with an empty queue server or another disk."""
    return isinstance(error, NotFoundError) or getattr(error, "status", None) == 404
