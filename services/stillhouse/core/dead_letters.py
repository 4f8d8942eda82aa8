"""Samples that were given up, and why: of a job's whole lineage, from its journals, and what is on the queue now.

The stream `dead` of an epoch goes when the epoch closes; a journal says for good how each sample of its step ended.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from stillhouse.core.blobs import JobArtifacts
from stillhouse.core.errors import CorruptError
from stillhouse.core.oracle.lineage import lineage_of, working_epochs
from stillhouse.core.oracle.read import read_epochs, read_journal
from stillhouse.core.spec_stages import ScheduleSpec, step_of
from stillhouse.v1 import rollout_pb2


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A sample without a score."""

    sample_id: str
    step: int | None
    """Optimizer step that it belongs to; None for samples of an evaluation."""
    epoch: int
    row: int
    """Row of the data."""
    teacher: str
    reason: str
    """Short code."""
    message: str
    service: str
    """Who gave up: sampler, teacher or trainer."""
    attempts: int
    is_journalled: bool
    """Its step goes on without it; else the step is still being collected."""

    @property
    def order(self) -> tuple[float, list[int], str]:
        """By step, group and index; samples of evaluations last."""
        numbers = [int(number) for number in re.findall(r"\d+", self.sample_id)]
        return (float("inf") if self.step is None else self.step, numbers, self.sample_id)


def journalled(artifacts: JobArtifacts, on_damage: Callable[[str], None] = lambda _: None) -> list[DeadLetter]:
    """Those of the lineage of the newest epoch, by step."""
    epochs = read_epochs(artifacts)
    head = next(iter(working_epochs(epochs)), 0)
    found: list[DeadLetter] = []
    for step, epoch in sorted(lineage_of(epochs, head).steps.items()):
        path = artifacts.journal(epoch, step)
        try:
            facts = path.stat()
            found += _of_journal(path, step, epoch, facts.st_mtime_ns, facts.st_size)
        except (CorruptError, OSError) as error:
            on_damage(str(error))
    return found


@lru_cache(maxsize=100_000)
def _of_journal(path: Path, step: int, epoch: int, _mtime_ns: int, _size: int) -> tuple[DeadLetter, ...]:
    """A journal never changes once it is written, so each is read once per process; most hold none."""
    _, scores = read_journal(path)
    return tuple(_letter(score, step, epoch, is_journalled=True) for score in scores if _is_failed(score))


def queued(payloads: Iterable[bytes], epoch: int, schedules: Sequence[ScheduleSpec]) -> list[DeadLetter]:
    """Those on the stream `dead` of a running epoch; `payloads` are Scores, `schedules` those of the job's stages."""
    found = []
    for score in map(rollout_pb2.Score.FromString, payloads):
        is_training = score.rollout.purpose == rollout_pb2.PURPOSE_TRAIN
        step = step_of(score.rollout.group, schedules) if is_training else None
        found.append(_letter(score, step, epoch, is_journalled=False))
    return found


def _is_failed(score: rollout_pb2.Score) -> bool:
    return score.WhichOneof("result") == "failed"


def _letter(score: rollout_pb2.Score, step: int | None, epoch: int, *, is_journalled: bool) -> DeadLetter:
    rollout, failed = score.rollout, score.failed
    return DeadLetter(
        sample_id=rollout.sample_id,
        step=step,
        epoch=epoch,
        row=rollout.row,
        teacher=rollout.teacher,
        reason=failed.reason,
        message=failed.message,
        service=failed.service,
        attempts=failed.attempts,
        is_journalled=is_journalled,
    )
