"""Checkpoints of a job as they lie in its artifacts: what there is, which is the best, and what may be deleted."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

from stillhouse.core.blobs import Artifacts, JobArtifacts, read_json, sha256_file
from stillhouse.core.errors import ConflictError, CorruptError, NotFoundError
from stillhouse.core.pins import pin, pinned, unpin
from stillhouse.core.queue.jobs import JobRecord
from stillhouse.core.removal import remove
from stillhouse.core.schemas import Checkpoint
from stillhouse.gateway.needed import why_needed
from stillhouse.gateway.tar import files_of
from stillhouse.gateway.views import timestamp

EXPORT_ID: Final = "ckpt_export"
"""The finished student."""


def list_checkpoints(job_id: str, artifacts: JobArtifacts, record: JobRecord) -> list[Checkpoint]:
    """Committed checkpoints, oldest first, the export last."""
    marks = _marks(artifacts)
    best = marks[-1] if marks else record.best_checkpoint
    found = []
    for manifest in artifacts.epochs.glob("*/manifests/*/manifest.json"):
        epoch, name = manifest.parent.parent.parent.name, manifest.parent.name
        if not epoch.isdigit() or name.startswith("tmp."):
            continue
        try:
            document: dict[str, Any] = read_json(manifest)
            digest = sha256_file(manifest)
        except (NotFoundError, FileNotFoundError, CorruptError):  # deleted meanwhile, or damaged: nothing to offer
            continue
        found.append(
            Checkpoint(
                id=(checkpoint_id := f"ckpt_{epoch}-{name}"),
                job_id=job_id,
                kind="checkpoint",
                step=int(document["step"]),
                stage=_stage_name(record, int(document.get("stage", 0))),
                epoch=int(document["epoch"]),
                policy_version=int(document["policy_version"]),
                created_at=timestamp(document["created_at"]),
                size_bytes=int(document["size_bytes"]),
                sha256=digest,
                is_best=checkpoint_id == best,
                is_pinned=checkpoint_id in marks,
            )
        )
    found.sort(key=lambda checkpoint: (checkpoint.epoch, checkpoint.step))
    return found + _export(job_id, artifacts, record)


def _marks(artifacts: JobArtifacts) -> list[str]:
    try:
        return pinned(artifacts)
    except CorruptError:  # a list without marks is better than none; clean-up then leaves everything
        return []


def get_checkpoint(artifacts: JobArtifacts, record: JobRecord, checkpoint: str) -> Checkpoint:
    """One of them.

    Raises:
        NotFoundError: there is no such checkpoint (any more).
    """
    checkpoint_folder(record.id, artifacts, record, checkpoint)
    for found in list_checkpoints(record.id, artifacts, record):
        if found.id == checkpoint:
            return found
    raise _unknown(record.id, checkpoint)


def mark_best(artifacts: JobArtifacts, record: JobRecord, checkpoint: str) -> Checkpoint:
    """Mark one as best: it stays until the mark is taken back.

    Raises:
        NotFoundError: there is no such checkpoint (any more).
        ConflictError: it is the export, which is what the job ended with.
    """
    checkpoint_folder(record.id, artifacts, record, checkpoint)
    if checkpoint == EXPORT_ID:
        raise ConflictError("the export is what the job ended with and stays; mark a checkpoint of the list")
    pin(artifacts, checkpoint)
    try:
        return get_checkpoint(artifacts, record, checkpoint)  # only now: clean-up may have been faster
    except NotFoundError:
        unpin(artifacts, checkpoint)
        raise


def unmark_best(artifacts: JobArtifacts, record: JobRecord, checkpoint: str) -> Checkpoint:
    """Take the mark back; nothing if there is none.

    Raises:
        NotFoundError: there is no such checkpoint (any more).
    """
    checkpoint_folder(record.id, artifacts, record, checkpoint)
    unpin(artifacts, checkpoint)
    return get_checkpoint(artifacts, record, checkpoint)


def delete_checkpoint(artifacts: Artifacts, record: JobRecord, checkpoint: str) -> None:
    """Delete one that nothing needs. Blocks: what has to stay is verified first.

    Raises:
        NotFoundError: there is no such checkpoint (any more).
        ConflictError: it is needed; says what for.
    """
    folder = checkpoint_folder(record.id, artifacts.job(record.id), record, checkpoint)
    reason = "it is what the job made, and goes with the job" if checkpoint == EXPORT_ID else ""
    reason = reason or why_needed(artifacts, record, checkpoint, folder)

    def is_needed() -> bool:  # somebody may have come to need it meanwhile
        nonlocal reason
        reason = why_needed(artifacts, record, checkpoint, folder)
        return bool(reason)

    if not reason and remove(folder, is_needed):
        return
    if reason:
        raise ConflictError(f"checkpoint {checkpoint} stays: {reason}")
    raise _unknown(record.id, checkpoint)


def _unknown(job_id: str, checkpoint: str) -> NotFoundError:
    return NotFoundError(f"job {job_id} has no checkpoint '{checkpoint}' (any more); see /v1/jobs/{job_id}/checkpoints")


def _stage_name(record: JobRecord, index: int) -> str:
    stages = record.spec.get("stages", [])
    return str(stages[index].get("name", "")) if index < len(stages) else ""


def _export(job_id: str, artifacts: JobArtifacts, record: JobRecord) -> list[Checkpoint]:
    folder = artifacts.export(record.epoch)
    if not folder.is_dir():
        return []
    return [
        Checkpoint(
            id=EXPORT_ID,
            job_id=job_id,
            kind="export",
            step=record.step,
            stage=_stage_name(record, len(record.spec.get("stages", [])) - 1),
            epoch=record.epoch,
            policy_version=int((record.weights or {}).get("policy_version", record.step)),
            created_at=timestamp(folder.stat().st_mtime),
            size_bytes=sum(path.stat().st_size for path in files_of(folder)),
            sha256="",
        )
    ]


def checkpoint_folder(job_id: str, artifacts: JobArtifacts, record: JobRecord, checkpoint: str) -> Path:
    """Where a checkpoint lies.

    Raises:
        NotFoundError: there is no such checkpoint (any more).
    """
    # the pattern keeps ids from becoming paths elsewhere
    match = re.fullmatch(r"ckpt_([0-9]{1,9})-([a-z0-9-]{1,80})", checkpoint)
    folder = None
    if checkpoint == EXPORT_ID:
        folder = artifacts.export(record.epoch)
    elif match:
        folder = artifacts.manifests(int(match[1])) / match[2]
        folder = folder if (folder / "manifest.json").is_file() else None
    if folder is None or not folder.is_dir():
        raise _unknown(job_id, checkpoint)
    return folder
