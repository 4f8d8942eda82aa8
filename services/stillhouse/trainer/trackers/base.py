"""Metrics for experiment trackers, in a thread of each tracker's own: none of them can stop or slow training.

    step done -> queue (bounded, never waited for) -> thread: tracker.log

A tracker that fails is told of once and gets no more; one that hangs loses what does not fit into its queue, and is
left behind when the claim ends. metrics.jsonl is written anyway.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from stillhouse.core.spec_trackers import TrackerSpec

QUEUE_POINTS: Final = 1000
"""Points that wait for a tracker, at most: more than a slow network leaves behind in a few minutes."""
CLOSE_S: Final = 10.0
"""How long the end of a claim waits for all trackers together to write what they have."""


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """The run as trackers know it. The same for every claim of a job, so a takeover goes on with it."""

    job_id: str
    name: str
    config: dict[str, Any]
    """The job's spec, without its rows."""
    folder: Path
    """Of the job's artifacts."""


class Tracker(Protocol):
    """Where metrics go. All calls come from one thread."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Finite values of a step; after a takeover a step may come again."""
        ...

    def close(self) -> None:
        """Nothing more comes from this claim."""
        ...


Opens = Callable[[TrackerSpec, TrackedRun], Tracker]


@dataclass
class Feed:
    """One tracker's thread."""

    spec: TrackerSpec
    run: TrackedRun
    opens: Opens
    tell: Callable[[str], None]
    """Takes a warning for people; called from the thread, too."""
    num_lost: int = 0
    _queue: queue.Queue[tuple[int, dict[str, float]] | None] = field(default_factory=lambda: queue.Queue(QUEUE_POINTS))
    _thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        # a daemon: one that hangs does not keep the process
        self._thread = threading.Thread(target=self._work, name=f"tracker {self.spec.kind}", daemon=True)
        self._thread.start()

    def put(self, point: tuple[int, dict[str, float]] | None) -> None:
        """Hand over a point; None = the end. Never waits."""
        try:
            self._queue.put_nowait(point)
        except queue.Full:
            self.num_lost += 1
            if self.num_lost == 1:
                self.tell(
                    f"tracker {self.spec.kind} does not keep up: points are lost to it; metrics.jsonl has them all"
                )

    def join(self, timeout_s: float) -> None:
        """Wait for what was handed over."""
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self.tell(f"tracker {self.spec.kind} did not finish in {CLOSE_S:g} s and is left behind")

    def _work(self) -> None:
        """consumes: points; waits for: the next; produces: calls of the tracker; unblocked by: the end, or an error."""
        try:
            tracker = self.opens(self.spec, self.run)
            while (point := self._queue.get()) is not None:
                tracker.log(*point)
            tracker.close()
        except ModuleNotFoundError as error:
            self.tell(
                f"tracker {self.spec.kind} is not installed where the trainer runs ({error}); install "
                f"stillhouse[{self.spec.kind}] there, or leave it out of 'trackers'"
            )
        except BaseException as error:  # whatever a foreign package raises ends its thread, and nothing else
            self.tell(f"tracker {self.spec.kind} failed and gets no more: {type(error).__name__}: {str(error)[:300]}")


class Trackers:
    """All of a job's."""

    def __init__(
        self, specs: Sequence[TrackerSpec], run: TrackedRun, opens: Opens, tell: Callable[[str], None]
    ) -> None:
        self._feeds = [Feed(spec, run, opens, tell) for spec in specs]

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Hand a step's metrics to every tracker; what is not a finite number is left out."""
        finite = {name: float(v) for name, v in values.items() if isinstance(v, int | float) and math.isfinite(v)}
        for feed in self._feeds:
            feed.put((step, finite))

    def close(self) -> None:
        """Let them write what they have, for CLOSE_S at most. Blocks."""
        for feed in self._feeds:
            feed.put(None)
        end = time.monotonic() + CLOSE_S
        for feed in self._feeds:
            feed.join(max(0.1, end - time.monotonic()))
