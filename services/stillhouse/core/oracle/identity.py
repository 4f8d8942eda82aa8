"""Whose work a job's artifacts may hold: its own, and in a retried job up to an epoch that of the jobs before it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Identity:
    """The names that files of a job may carry."""

    job_id: str
    inherited_epoch: int = 0
    """Newest epoch that comes from another job; 0 = none does."""
    ancestors: frozenset[str] = frozenset()
    note: str = ""
    """Where a retried job began, for people."""

    def may_be_of(self, job_id: str, epoch: int) -> bool:
        """Whether a file of an epoch may say that it is of a job."""
        return job_id in self.ancestors if epoch <= self.inherited_epoch else job_id == self.job_id


def identity(document: Mapping[str, Any]) -> Identity:
    """From a job.json.

    Raises:
        KeyError: what it says of its origin is incomplete.
    """
    job_id, origin = str(document["id"]), document.get("origin")
    if origin is None:
        return Identity(job_id)
    note = f"began at step {origin['step']}, from {origin['checkpoint']} of job {origin['job_id']}"
    return Identity(job_id, int(origin["epoch"]), frozenset(map(str, origin["job_ids"])), note)
