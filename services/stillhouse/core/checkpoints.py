"""Checkpoints of jobs as models: what a job's references mean, and where such a model lies.

    job_ID              the newest checkpoint of a job: its export if it has ended well, else the newest committed one
    job_ID/ckpt_...     that checkpoint
    stage/NAME          the job's own student at the end of its stage NAME; stage/start: as the job began

What a reference means is settled once, in `references.json` beside the artifacts of the job that has it, and read by
every later claim: a job that is trained on must not change the teachers of another. As long as a job has not ended,
nothing of what it names is deleted.

A checkpoint becomes a model once, in the artifacts of the job that it is of (trainer/materialise.py):

    models/ckpt_....json    its registration; what it says of the path is below the job's folder
    models/ckpt_.../        what transformers loads; an export stays where it is
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from stillhouse.core.blobs import Artifacts, JobArtifacts, sealed, unsealed, write_json
from stillhouse.core.errors import CorruptError, NotFoundError
from stillhouse.core.models import ModelEntry, ModelRegistry, inspect_model
from stillhouse.core.spec_base import CHECKPOINT_PATTERN, STAGE_PREFIX

EXPORT: Final = "ckpt_export"
"""The finished student of a job."""
START: Final = f"{STAGE_PREFIX}start"
"""What the job began with."""
MAX_SHOWN: Final = 8
"""Checkpoints that an error lists, at most."""
# what these do not match never becomes a path
_REFERENCE: Final = re.compile(CHECKPOINT_PATTERN)
_COMMITTED: Final = re.compile(r"ckpt_([1-9][0-9]{0,8})-([0-9]{8}-[0-9a-f]{8})")


def parse(name: str) -> tuple[str, str] | None:
    """(id of the job, id of its checkpoint; empty = the newest) of a reference to another job; None = it is none."""
    if not _REFERENCE.fullmatch(name):
        return None
    job_id, _, checkpoint = name.partition("/")
    return job_id, checkpoint


def committed(job: JobArtifacts, checkpoint: str) -> Path | None:
    """The folder of a committed checkpoint; None = there is none of that id (any more)."""
    found = _COMMITTED.fullmatch(checkpoint)
    folder = job.manifests(int(found[1])) / found[2] if found else None
    return folder if folder is not None and (folder / "manifest.json").is_file() else None


def exported(job: JobArtifacts) -> Path | None:
    """The folder of the finished student; None = the job has not ended well, or not yet.

    Raises:
        CorruptError: how the job ended cannot be read.
    """
    try:
        final = unsealed(job.final)
    except NotFoundError:  # it is written last of all, just after the record that people wait for
        final = {"status": "succeeded", "epoch": job.highest_epoch()}
    folder = job.export(int(final["epoch"]))
    return folder if final["status"] == "succeeded" and folder.is_dir() else None


def locate(artifacts: Artifacts, reference: str) -> str:
    """The checkpoint that a reference to a job means now, as `job_ID/ckpt_...`.

    Raises:
        NotFoundError: there is no such job, or no such checkpoint (any more); says what there is.
    """
    parts = parse(reference)
    if parts is None:
        raise NotFoundError(f"'{reference}' names no checkpoint; write job_ID or job_ID/ckpt_...")
    job_id, checkpoint = parts
    job = artifacts.job(job_id)
    if not job.job_json.is_file():
        raise NotFoundError(f"there is no job '{job_id}' here; GET /v1/jobs lists them")
    checkpoint = checkpoint or newest(job)
    if not checkpoint:
        raise NotFoundError(f"job {job_id} has no checkpoint yet; wait for its first one")
    if not _is_there(job, checkpoint):
        have = ", ".join(_all(job)[-MAX_SHOWN:]) or "none"
        raise NotFoundError(f"job {job_id} has no checkpoint '{checkpoint}' (any more); it has {have}")
    return f"{job_id}/{checkpoint}"


def _is_there(job: JobArtifacts, checkpoint: str) -> bool:
    if registration(job, checkpoint).is_file():
        return True
    return (exported(job) if checkpoint == EXPORT else committed(job, checkpoint)) is not None


def newest(job: JobArtifacts) -> str:
    """The export, or the last commit behind the newest claim's weights: what a zombie committed later is not."""
    if exported(job):
        return EXPORT
    for epoch in range(job.highest_epoch(), 0, -1):
        if own := _of_epoch(job, epoch):
            return own[-1]
        try:
            base = unsealed(job.epoch(epoch) / "opened.json")["opened_from"]
        except (NotFoundError, CorruptError):  # it is being opened at this moment
            continue
        return f"ckpt_{base['epoch']}-{base['name']}" if base else ""
    return ""


def _all(job: JobArtifacts) -> list[str]:
    own = [checkpoint for epoch in range(1, job.highest_epoch() + 1) for checkpoint in _of_epoch(job, epoch)]
    return [*own, EXPORT] if exported(job) else own


def _of_epoch(job: JobArtifacts, epoch: int) -> list[str]:
    """Ids of the checkpoints of an epoch, oldest first."""
    names = sorted(path.parent.name for path in job.manifests(epoch).glob("[0-9]*/manifest.json"))
    return [f"ckpt_{epoch}-{name}" for name in names]


def registration(job: JobArtifacts, checkpoint: str) -> Path:
    """The file that says what model a checkpoint is, once it is one. For ids that `parse` gave."""
    return job.models / f"{checkpoint}.json"


# -- what a job's references mean ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Settled:
    """What a reference means, once and for all."""

    model: str
    """Name of a registered model, or `job_ID/ckpt_...`."""
    sha256: str = ""
    """Of its files, as in a `ModelEntry`; empty = the checkpoint is no model yet."""


def read_references(job: JobArtifacts) -> dict[str, Settled]:
    """Reference -> what it means in this job, as far as that is settled.

    Raises:
        CorruptError: the file is damaged.
    """
    try:
        document = unsealed(job.references)
    except NotFoundError:
        return {}
    return {reference: Settled(**settled) for reference, settled in document["references"].items()}


def settle(job: JobArtifacts, references: Mapping[str, Settled]) -> None:
    """Write down what references mean. Blocks for an fsync."""
    known = {**read_references(job), **references}
    write_json(job.references, sealed({"references": {name: asdict(known[name]) for name in known}}))


def named(artifacts: Artifacts) -> set[str]:
    """Checkpoints (`job_ID/ckpt_...`) that are named by a job which has not ended: nobody may delete them.

    Raises:
        CorruptError: what a job names cannot be read.
    """
    found: set[str] = set()
    for path in (artifacts.root / "jobs").glob("*/references.json"):
        job = artifacts.job(path.parent.name)
        if not job.final.exists():
            found |= {settled.model for settled in read_references(job).values() if parse(settled.model)}
    return found


# -- checkpoints that are models -------------------------------------------------------------------------------------


class Models(ModelRegistry):
    """All that services load by name: registered models, and checkpoints that have become models."""

    def __init__(self, path: Path, artifacts: Artifacts) -> None:
        super().__init__(path)
        self.artifacts = artifacts

    def get(self, name: str) -> ModelEntry:
        """The entry of a registered model, or of a checkpoint `job_ID/ckpt_...`.

        Raises:
            NotFoundError: lists what there is.
            CorruptError: the registration of the checkpoint is damaged.
        """
        if "/" not in name:
            return super().get(name)
        entry = self.made(name)
        if entry is None:
            raise NotFoundError(f"'{name}' is no model here: a trainer makes one of a checkpoint when a job names it")
        return entry

    def made(self, name: str) -> ModelEntry | None:
        """The entry of a checkpoint `job_ID/ckpt_...`; None = it is no model yet."""
        job_id, checkpoint = parse(name) or ("", "")
        if not checkpoint:
            return None
        path = registration(self.artifacts.job(job_id), checkpoint)
        try:
            stat = path.stat()
        except FileNotFoundError:
            return None
        return _read(name, path, (stat.st_mtime_ns, stat.st_size))

    def register(self, name: str, folder: Path) -> ModelEntry:
        """Make a checkpoint a model: what lies in `folder`, below its job's artifacts. Blocks: hashes all of it."""
        job_id, checkpoint = parse(name) or ("", "")
        job = self.artifacts.job(job_id)
        entry = inspect_model(checkpoint, folder, source=f"a checkpoint of {job_id}")
        path = str(folder.resolve().relative_to(job.root.resolve()))  # the artifacts may lie elsewhere for others
        write_json(registration(job, checkpoint), sealed({"model": {**entry.model_dump(mode="json"), "path": path}}))
        return self.get(name)


@lru_cache(maxsize=1024)
def _read(name: str, path: Path, stamp: tuple[int, int]) -> ModelEntry:
    """A registration; `stamp` makes one that was written again a new one."""
    root = path.parent.parent.resolve()
    try:
        document = unsealed(path)["model"]
        folder = (root / document["path"]).resolve()
        entry = ModelEntry.model_validate({**document, "path": str(folder)})
    except (KeyError, TypeError, ValidationError) as error:
        raise CorruptError(f"{path} is no registration of a checkpoint: {error}") from None
    if not folder.is_relative_to(root):
        raise CorruptError(f"{path} names {folder}, which is not below {root}")
    return entry.model_copy(update={"name": name})
