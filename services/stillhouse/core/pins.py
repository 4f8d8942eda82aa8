"""Checkpoints that somebody marked as best: `pinned.json` beside the artifacts of a job. Nothing deletes them.

Who marks one writes its id here first and then looks whether it is there; who deletes one moves it out of sight first
and then looks here.
"""

from __future__ import annotations

from pathlib import Path

from stillhouse.core.blobs import JobArtifacts, locked, sealed, unsealed, write_json
from stillhouse.core.errors import NotFoundError


def pinned(job: JobArtifacts) -> list[str]:
    """Ids (`ckpt_...`), in the order in which they were marked.

    Raises:
        CorruptError: the file is damaged.
    """
    try:
        return [str(checkpoint) for checkpoint in unsealed(job.pinned)["checkpoints"]]
    except NotFoundError:
        return []


def pin(job: JobArtifacts, checkpoint: str) -> None:
    """Mark one as best. Blocks for an fsync."""
    with locked(_lock(job)):
        _write(job, [*_others(job, checkpoint), checkpoint])


def unpin(job: JobArtifacts, checkpoint: str) -> None:
    """Take a mark back; nothing if there is none."""
    with locked(_lock(job)):
        others = _others(job, checkpoint)
        if others != pinned(job):
            _write(job, others)


def _others(job: JobArtifacts, checkpoint: str) -> list[str]:
    return [each for each in pinned(job) if each != checkpoint]


def _write(job: JobArtifacts, checkpoints: list[str]) -> None:
    write_json(job.pinned, sealed({"checkpoints": checkpoints}))


def _lock(job: JobArtifacts) -> Path:
    """Two marks at once must both stay."""
    return job.pinned.with_name(f"{job.pinned.name}.lock")
