"""Which stream of rollouts is scored next: fair between jobs, and every model that is in memory is used up first.

Two rules, in this order:

* A model in memory serves all work that waits for it before another one is loaded, but not for ever: once others wait,
  it has used up its turn after TURN_LOADS times the time that loading it took. Then all models that wait get a turn of
  that size before any gets a second one, those in memory first, then in the order in which they began to wait. So
  at most one part in TURN_LOADS + 1 of a busy teacher's time goes into loading, and a model waits for two loads and
  turns of each of the others at most (early in one round, late in the next).
* Among the streams that this allows, the job goes first that was served the fewest tokens (start-time fair queueing):
  a job with ten times the work delays a small one by one batch. A job that comes, or comes back, is taken to have been
  served as much as the one at work: time without work gives no credit. A job whose model fits beside those at work
  has it loaded as soon as it is the job's turn.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

TURN_LOADS: Final = 10
"""A turn lasts so many times the load of its model: loading costs a busy teacher at most a tenth of its scoring."""
MIN_TURN_S: Final = 1.0
"""Shortest turn: a tiny model that loads in milliseconds is not to be changed after every batch."""

ModelKey = tuple[str, str, str]
"""What is in memory once: (sha256, dtype, job that owns it or "")."""


@dataclass(frozen=True, slots=True)
class Stream:
    """A stream of rollouts with work."""

    name: str
    job_id: str
    model: ModelKey
    size_bytes: int = 0
    """Memory that the model takes."""


class Schedule:
    """Turns of models and jobs. Knows neither queue nor engine: it is told what waits, is in memory, and took time."""

    def __init__(self) -> None:
        self._served: dict[str, float] = {}
        """Tokens by job, lifted to the job at work when a job begins to wait."""
        self._level = 0.0
        """Tokens of the job that was served last, before it was."""
        self._waits: set[str] = set()
        """Jobs that waited at the last look."""
        self._used_s: dict[ModelKey, float] = {}
        """What a model has used of its turn."""
        self._load_s: dict[ModelKey, float] = {}
        self._since: dict[ModelKey, int] = {}
        """When a model began to wait, as a count."""
        self._clock = itertools.count()

    def choose(
        self,
        waiting: Sequence[Stream],
        resident: Collection[ModelKey],
        fits: Callable[[int, Collection[ModelKey]], bool],
    ) -> Stream:
        """The stream to serve next, of at least one.

        `fits(size_bytes, keep)` says whether a model of that size has room beside the models `keep`.
        """
        self._look(waiting)
        keep = self.at_work(waiting, resident)
        fresh = self._fresh(stream.model for stream in waiting)
        for job_id in sorted(self._waits, key=lambda job_id: (self._served[job_id], job_id)):
            mine = [stream for stream in waiting if stream.job_id == job_id and stream.model in fresh]
            mine.sort(key=lambda stream: (stream.model not in resident, self._since[stream.model], stream.name))
            if mine and (mine[0].model in resident or fits(mine[0].size_bytes, keep)):
                return mine[0]
        # only if a model is larger than the memory: its stream is served, and refused with the reason
        return min((one for one in waiting if one.model in fresh), key=lambda stream: self._since[stream.model])

    def at_work(self, waiting: Sequence[Stream], resident: Collection[ModelKey]) -> set[ModelKey]:
        """Models in memory whose turn is not over: they are not to leave for another one."""
        return self._fresh(stream.model for stream in waiting) & set(resident)

    def upcoming(self, waiting: Sequence[Stream], resident: Collection[ModelKey]) -> Stream | None:
        """The stream whose model will be loaded next, as far as one can tell now."""
        fresh = self._fresh(stream.model for stream in waiting)
        outside = [stream for stream in waiting if stream.model in fresh and stream.model not in resident]
        return min(outside, key=lambda stream: self._since.get(stream.model, 0), default=None)

    def served(self, stream: Stream, tokens: int, seconds: float) -> None:
        """A turn is over: its padded tokens and the time it took, with the pull of an average, without a load."""
        self._level = self._served.get(stream.job_id, 0.0)
        self._served[stream.job_id] = self._level + tokens
        self._used_s[stream.model] = self._used_s.get(stream.model, 0.0) + seconds

    def loaded(self, model: ModelKey, seconds: float) -> None:
        """How long it took to bring a model into memory."""
        self._load_s[model] = seconds

    def rest(self) -> None:
        """Nothing waits anywhere: a new round begins."""
        self._used_s.clear()
        self._waits.clear()
        self._since.clear()

    def forget(self, jobs: Collection[str], models: Collection[ModelKey]) -> None:
        """Drop what is known of jobs and models that are not among these."""
        for known, living in ((self._served, jobs), (self._used_s, models), (self._load_s, models)):
            for name in [name for name in known if name not in living]:
                del known[name]  # type: ignore[arg-type]
        self._waits &= set(jobs)

    def _look(self, waiting: Sequence[Stream]) -> None:
        """Note who begins to wait and who no longer does."""
        jobs, models = {stream.job_id for stream in waiting}, {stream.model for stream in waiting}
        for job_id in jobs - self._waits:
            self._served[job_id] = max(self._served.get(job_id, 0.0), self._level)
        self._waits = jobs
        self._since = {model: since for model, since in self._since.items() if model in models}
        for stream in waiting:
            if stream.model not in self._since:
                self._since[stream.model] = next(self._clock)

    def _fresh(self, waiting: Iterable[ModelKey]) -> set[ModelKey]:
        """Waiting models whose turn is not over; when it is over for all of them, a new round begins."""
        models = set(waiting)
        fresh = {model for model in models if self._used_s.get(model, 0.0) < self._turn_s(model)}
        if not fresh:
            self._used_s.clear()
        return fresh or models

    def _turn_s(self, model: ModelKey) -> float:
        return max(MIN_TURN_S, TURN_LOADS * self._load_s.get(model, 0.0))
