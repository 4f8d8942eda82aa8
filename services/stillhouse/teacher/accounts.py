"""What each job costs a teacher process: tokens, seconds, loads, bytes. In GetInfo and on /metrics.

The job's own record has the same, summed over its teachers by the trainer from the scores themselves (`usage`).
"""

from __future__ import annotations

from collections import OrderedDict
from contextlib import suppress
from typing import Final

from stillhouse.core.metrics import JOB_LOADS, JOB_SCORE_SECONDS, JOB_TOKENS
from stillhouse.v1.teacher_pb2 import TeacherAccount

MAX_JOBS: Final = 1000
"""Jobs remembered; the ones that were not served for longest are forgotten, and their metrics removed."""


class Accounts:
    """An account per job; the empty id is for direct calls."""

    def __init__(self) -> None:
        self._jobs: OrderedDict[str, TeacherAccount] = OrderedDict()

    def scored(self, job_id: str, tokens: int, seconds: float) -> None:
        """A batch was scored."""
        account = self._of(job_id)
        account.scored_tokens += tokens
        account.score_s += seconds
        JOB_TOKENS.labels(job_id, "scored").inc(tokens)
        JOB_SCORE_SECONDS.labels(job_id).inc(seconds)

    def cached(self, job_id: str, tokens: int) -> None:
        """Scores were found in the cache."""
        self._of(job_id).cached_tokens += tokens
        JOB_TOKENS.labels(job_id, "cached").inc(tokens)

    def loaded(self, job_id: str, seconds: float) -> None:
        """A model was loaded for the job."""
        account = self._of(job_id)
        account.model_loads += 1
        account.load_s += seconds
        JOB_LOADS.labels(job_id).inc()

    def sent(self, job_id: str, size_bytes: int) -> None:
        """A score was handed over."""
        self._of(job_id).score_bytes += size_bytes

    def messages(self) -> list[TeacherAccount]:
        """As GetInfo tells them, least recently served first."""
        return list(self._jobs.values())

    def _of(self, job_id: str) -> TeacherAccount:
        if job_id not in self._jobs:
            self._jobs[job_id] = TeacherAccount(job_id=job_id)
            if len(self._jobs) > MAX_JOBS:
                _forget(self._jobs.popitem(last=False)[0])
        self._jobs.move_to_end(job_id)
        return self._jobs[job_id]


def _forget(job_id: str) -> None:
    for source in ("scored", "cached"):
        with suppress(KeyError):
            JOB_TOKENS.remove(job_id, source)
    for metric in (JOB_SCORE_SECONDS, JOB_LOADS):
        with suppress(KeyError):  # it was never counted there
            metric.remove(job_id)
