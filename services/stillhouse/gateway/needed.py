"""Whether a checkpoint may be deleted on a user's behalf, and if not, why.

It stays if a recovery may need it, by the same rule as clean-up's: the two newest of the lineage that verify and all
that are newer, and what the newest claim opened from. While the job goes on also the ends of its stages, and of a
deterministic job, which may have to go further back, all. It stays, too, if a job that has not ended names it, or
somebody marked it as best.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from stillhouse.core.blobs import Artifacts, sha256_file
from stillhouse.core.checkpoints import named, registration
from stillhouse.core.errors import CorruptError, NotFoundError
from stillhouse.core.oracle.lineage import Lineage, lineage_of, working_epochs
from stillhouse.core.oracle.read import Checkpoint, Epoch, read_document, read_epochs
from stillhouse.core.pins import pinned
from stillhouse.core.queue.jobs import JobRecord
from stillhouse.core.spec import JobSpec

KEEP: Final = 2
"""Checkpoints that verify: the newest may turn out to be damaged on disk."""
_good: set[tuple[Path, str]] = set()
"""Checkpoints that verified in this process, by folder and hash: gigabytes are hashed once."""


def why_needed(artifacts: Artifacts, record: JobRecord, checkpoint: str, folder: Path) -> str:
    """Why a checkpoint has to stay, for people; '' = it may go. Blocks: hashes the newest checkpoints.

    Raises:
        CorruptError: what jobs name or somebody marked cannot be read.
    """
    job = artifacts.job(record.id)
    if checkpoint in pinned(job):
        return f"it is marked as best; take that back with DELETE /v1/jobs/{record.id}/checkpoints/{checkpoint}/best"
    if f"{record.id}/{checkpoint}" in named(artifacts) and not registration(job, checkpoint).is_file():
        return "a job that has not ended names it as a model; wait for that job, or cancel it"
    epochs = read_epochs(job)
    head = next(iter(working_epochs(epochs)), 0)
    return _needed_by_recovery(record, epochs, lineage_of(epochs, head), folder)


def _needed_by_recovery(record: JobRecord, epochs: dict[int, Epoch], past: Lineage, folder: Path) -> str:
    if past.is_cut:
        return "the history of the job is damaged: what a recovery needs is not known; see `stillhouse verify`"
    found = next((each for each in past.checkpoints if each.folder == folder), None)
    if found is None:
        return ""  # of a claim that had lost the job
    head = epochs[past.head]
    if head.base is not None and (head.base.epoch, head.base.name) == (found.epoch, found.name):
        return "the newest claim of the job opened from it"
    if found in _newest(past.checkpoints):
        return f"it is one of the {KEEP} newest that verify, from which the job would go on after a failure"
    if record.is_terminal:
        return ""
    spec = JobSpec.model_validate(record.spec)
    if spec.deterministic:
        return "the job is deterministic and has not ended: it may have to go back to any of its checkpoints"
    if found.step in {span.stop_step for span in spec.spans()}:
        return "a stage ended with it, and later stages may name it as a model; wait for the end of the job"
    return ""


def _newest(checkpoints: list[Checkpoint]) -> list[Checkpoint]:
    """The newest KEEP that verify, and all that are newer."""
    kept: list[Checkpoint] = []
    left = KEEP
    for checkpoint in reversed(checkpoints):
        kept.append(checkpoint)
        left -= verifies(checkpoint)
        if left == 0:
            break
    return kept


def verifies(checkpoint: Checkpoint) -> bool:
    """Whether all files of a checkpoint are what its manifest says."""
    key = (checkpoint.folder, checkpoint.sha256)
    if key not in _good:
        try:
            files = read_document(checkpoint.folder / "manifest.json")["files"]
            if any(sha256_file(checkpoint.folder / name) != entry["sha256"] for name, entry in files.items()):
                return False
        except (CorruptError, NotFoundError, OSError, KeyError, TypeError, AttributeError):
            return False
        _good.add(key)
    return True
