"""What a retried job begins with: the past of a checkpoint of another job, so that it stands by itself.

Linked (copied, where files cannot be linked) are the checkpoints up to that one, the journals behind it and what says
how its epochs opened, with their numbers: a claim of the new job opens from it by the usual rule, and the oracle checks
every step from the first on. Files of a past never change, so both jobs may have them; either may be deleted.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stillhouse.core.blobs import JobArtifacts, fsync_dir, make_dirs, unsealed
from stillhouse.core.checkpoints import Settled, read_references
from stillhouse.core.errors import ConflictError, CorruptError, NotFoundError
from stillhouse.core.oracle.lineage import Lineage, lineage_of, working_epochs
from stillhouse.core.oracle.read import Checkpoint, Epoch, read_epochs
from stillhouse.core.queue.jobs import JobRecord
from stillhouse.core.spec_base import STAGE_PREFIX
from stillhouse.gateway.needed import verifies

START = f"{STAGE_PREFIX}start"


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a retried job begins."""

    job_id: str
    checkpoint: str
    """`ckpt_...` of that job."""
    step: int
    epoch: int
    """Newest epoch that comes from there."""
    job_ids: tuple[str, ...]
    """Jobs that wrote what comes from there: that one, and those that it was a retry of."""

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "job_ids": list(self.job_ids)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Origin:
        return cls(**{**document, "job_ids": tuple(document["job_ids"])})


def choose(job: JobArtifacts, record: JobRecord, checkpoint: str) -> Origin:
    """The checkpoint of a finished job to go on from; '' = the newest that verifies. Blocks: hashes its files.

    Raises:
        NotFoundError: it has no such checkpoint, or none at all.
        ConflictError: nothing is left to do from there.
        CorruptError: its files do not verify.
    """
    epochs = read_epochs(job)
    lineage = lineage_of(epochs, next(iter(working_epochs(epochs)), 0))
    found = _find(record, lineage, checkpoint)
    if record.status == "succeeded" and found.step >= record.stop_step:
        raise ConflictError(f"job {record.id} succeeded, and {_id(found)} is its end: name an earlier checkpoint")
    earlier = unsealed(job.job_json).get("origin") or {}
    job_ids = (record.id, *earlier.get("job_ids", ()))
    return Origin(record.id, _id(found), found.step, found.epoch, job_ids)


def _id(checkpoint: Checkpoint) -> str:
    return f"ckpt_{checkpoint.epoch}-{checkpoint.name}"


def _find(record: JobRecord, lineage: Lineage, checkpoint: str) -> Checkpoint:
    if not lineage.checkpoints:
        raise NotFoundError(f"job {record.id} has no checkpoint to go on from; send its spec again as a new job")
    if not checkpoint:
        good = next((each for each in reversed(lineage.checkpoints) if verifies(each)), None)
        if good is None:
            raise CorruptError(f"no checkpoint of job {record.id} verifies; `stillhouse verify {record.id}` says why")
        return good
    found = next((each for each in lineage.checkpoints if _id(each) == checkpoint), None)
    if found is None:
        have = ", ".join(map(_id, lineage.checkpoints[-8:]))
        raise NotFoundError(f"job {record.id} cannot go on from '{checkpoint}'; it can from {have}", param="checkpoint")
    if not verifies(found):
        raise CorruptError(f"checkpoint {checkpoint} of job {record.id} does not verify; name another one")
    return found


def link(origin: Origin, old: JobArtifacts, new: JobArtifacts) -> dict[str, Settled]:
    """Give a new job the past of its origin, durably; returns what the old job's references meant. Blocks."""
    epochs = read_epochs(old)
    lineage = lineage_of(epochs, origin.epoch)
    past = [each for each in lineage.checkpoints if (each.step, _id(each)) <= (origin.step, origin.checkpoint)]
    journals = {(epoch, step) for step, epoch in lineage.steps.items() if step < origin.step}
    needed = _needed(epochs, lineage, {epoch for epoch, _ in journals})
    for number in needed:
        journals |= {(source, step) for step, source in epochs[number].replay.items() if step < origin.step}
    pairs = [(old.journal(*each), new.journal(*each)) for each in journals]
    for checkpoint in past:
        target = new.manifests(checkpoint.epoch) / checkpoint.name
        pairs += [(file, target / file.relative_to(checkpoint.folder)) for file in _files(checkpoint.folder)]
    for number in needed | {epoch for epoch, _ in journals}:
        names = ("opened.json", "closed.json")
        pairs += [(old.epoch(number) / name, new.epoch(number) / name) for name in names]
    pairs += [(file, new.evaluations / file.name) for file in _measured(old, origin.step)]
    for source, target in pairs:
        if source.is_file():
            _link(source, target)
    for folder in sorted({target.parent for _, target in pairs if target.exists()}):
        fsync_dir(folder)
    if not old.job_json.is_file():  # deleted meanwhile: what was linked may be a part
        raise NotFoundError(f"no job '{origin.job_id}'")
    return {
        name: settled
        for name, settled in read_references(old).items()
        if name == START or not name.startswith(STAGE_PREFIX)  # ends of its own stages are settled anew
    }


def _needed(epochs: dict[int, Epoch], lineage: Lineage, sources: set[int]) -> set[int]:
    """Epochs without which it cannot be told that the past is one."""
    return {number for number in set(lineage.limits) | sources if number in epochs}


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def _measured(job: JobArtifacts, step: int) -> list[Path]:
    return [path for path in job.evaluations.glob("*.json") if path.stem.isdigit() and int(path.stem) <= step]


def _link(source: Path, target: Path) -> None:
    make_dirs(target.parent)
    try:
        os.link(source, target)
    except FileExistsError:
        return
    except OSError:  # a file system without links
        shutil.copy2(source, target)
