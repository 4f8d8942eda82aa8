"""Checkpoints as manifests, epochs, and the one recovery rule.

A claim of a job opens a new epoch: it creates `epochs/{epoch}/` exclusively, with `opened.json` saying which manifest
it starts from and which step journals it replays. It opens from the highest epoch's newest manifest that verifies, or,
if that epoch has none, from what that epoch opened from. So there is one lineage: what a zombie of an older epoch
writes later is on none. Queues are never read.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from stillhouse.core.blobs import JobArtifacts, fsync_dir, read_json, sha256_bytes, sha256_file, staged_dir, write_json
from stillhouse.core.errors import CorruptError, LeaseLostError, NotFoundError

SCHEMA_VERSION: Final = 1
MANIFEST: Final = "manifest.json"


@dataclass(frozen=True, slots=True)
class ManifestRef:
    """Names a committed checkpoint."""

    epoch: int
    name: str
    """Folder name, `{step}-{sha8}`."""
    sha256: str
    """sha256 of manifest.json."""

    def folder(self, artifacts: JobArtifacts) -> Path:
        return artifacts.manifests(self.epoch) / self.name

    def as_json(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "name": self.name, "sha256": self.sha256}


@dataclass(frozen=True, slots=True)
class JournalRef:
    """Names the journal of one step."""

    epoch: int
    step: int


@dataclass(frozen=True, slots=True)
class Opening:
    """What an epoch starts from."""

    epoch: int
    base: ManifestRef | None
    """None = the weights the job started from."""
    replay: list[JournalRef] = field(default_factory=list)
    """Steps after `base`, in order, that are trained again from their journals."""


def commit(
    artifacts: JobArtifacts,
    epoch: int,
    step: int,
    facts: dict[str, Any],
    write_state: Callable[[Path], None],
) -> ManifestRef:
    """Write a checkpoint: state files, then the manifest that names them by hash, then one rename.

    `facts` must hold everything else a resume needs (`next_group`, `parent`, versions). A step that is already
    committed in this epoch is returned as it is.
    """
    folder = artifacts.manifests(epoch)
    for ref in _refs(artifacts, epoch):
        if int(ref.name.split("-")[0]) == step:
            return ref
    with staged_dir(folder / f"{step:08d}") as staged:
        write_state(staged.path)
        files = {
            str(path.relative_to(staged.path)): {"sha256": sha256_file(path), "size_bytes": path.stat().st_size}
            for path in sorted(staged.path.rglob("*"))
            if path.is_file()
        }
        document = {
            "schema_version": SCHEMA_VERSION,
            "epoch": epoch,
            "step": step,
            "policy_version": step,
            "created_at": time.time(),
            "size_bytes": sum(entry["size_bytes"] for entry in files.values()),
            "files": files,
            **facts,
        }
        write_json(staged.path / MANIFEST, document)
        digest = sha256_file(staged.path / MANIFEST)
        staged.target = folder / f"{step:08d}-{digest[:8]}"
    return ManifestRef(epoch, staged.target.name, digest)


def verify(artifacts: JobArtifacts, ref: ManifestRef) -> dict[str, Any]:
    """The manifest, after checking its name and every file by hash.

    Raises:
        CorruptError: names the file and both hashes.
    """
    folder = ref.folder(artifacts)
    path = folder / MANIFEST
    if not path.is_file():
        raise CorruptError(f"{folder} has no {MANIFEST}")
    digest = sha256_file(path)
    if digest != ref.sha256:
        raise CorruptError(f"{path} has sha256 {digest[:12]}, expected {ref.sha256[:12]}")
    document = read_json(path)
    for name, entry in document["files"].items():
        actual = sha256_file(folder / name) if (folder / name).is_file() else "missing"
        if actual != entry["sha256"]:
            raise CorruptError(f"{folder / name} has sha256 {actual[:12]}, the manifest says {entry['sha256'][:12]}")
    return document


def open_epoch(
    artifacts: JobArtifacts, epoch: int, trainer: str, on_corrupt: Callable[[str], None] = lambda _: None
) -> Opening:
    """Create the folder of a new epoch and decide what it starts from (see the module's text).

    Raises:
        LeaseLostError: the folder exists: another claim had the same or a higher epoch.
    """
    previous = artifacts.highest_epoch()
    if previous >= epoch:
        raise LeaseLostError(f"epoch {previous} is open already, cannot open {epoch}")
    opening = _opening(artifacts, previous, epoch, on_corrupt)
    folder = artifacts.epoch(epoch)
    artifacts.epochs.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir()
    except FileExistsError:
        raise LeaseLostError(f"epoch {epoch} was opened by another claim at the same moment") from None
    write_json(
        folder / "opened.json",
        {
            "epoch": epoch,
            "trainer": trainer,
            "opened_at": time.time(),
            "opened_from": opening.base.as_json() if opening.base else None,
            "replay": [[ref.epoch, ref.step] for ref in opening.replay],
        },
    )
    fsync_dir(artifacts.epochs)
    return opening


def _opening(artifacts: JobArtifacts, previous: int, epoch: int, on_corrupt: Callable[[str], None]) -> Opening:
    if previous == 0:
        return Opening(epoch, None)
    opened = _read_opened(artifacts, previous)
    if opened is None:  # it died between mkdir and opened.json, before any work: as if it never was
        return _opening(artifacts, previous - 1, epoch, on_corrupt)
    base, first_step = _base(artifacts, previous, opened, on_corrupt)
    steps = {step: JournalRef(source, step) for source, step in opened["replay"] if step >= first_step}
    steps.update(
        {step: JournalRef(previous, step) for step in _journalled_steps(artifacts, previous) if step >= first_step}
    )
    replay: list[JournalRef] = []
    while first_step + len(replay) in steps:
        replay.append(steps[first_step + len(replay)])
    return Opening(epoch, base, replay)


def _base(
    artifacts: JobArtifacts, previous: int, opened: dict[str, Any], on_corrupt: Callable[[str], None]
) -> tuple[ManifestRef | None, int]:
    """(manifest to start from, first step after it)."""
    for ref in sorted(_refs(artifacts, previous), key=lambda ref: ref.name, reverse=True):
        try:
            return ref, int(verify(artifacts, ref)["step"])
        except CorruptError as error:
            on_corrupt(str(error))
    if opened["opened_from"] is None:
        return None, 0
    ref = ManifestRef(**opened["opened_from"])
    return ref, int(verify(artifacts, ref)["step"])


def _read_opened(artifacts: JobArtifacts, epoch: int) -> dict[str, Any] | None:
    try:
        return read_json(artifacts.epoch(epoch) / "opened.json")
    except NotFoundError:
        return None


def _refs(artifacts: JobArtifacts, epoch: int) -> Iterator[ManifestRef]:
    folder = artifacts.manifests(epoch)
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        manifest = path / MANIFEST
        if path.name[:8].isdigit() and manifest.is_file():
            digest = sha256_file(manifest)
            if path.name == f"{path.name[:8]}-{digest[:8]}":
                yield ManifestRef(epoch, path.name, digest)


def _journalled_steps(artifacts: JobArtifacts, epoch: int) -> list[int]:
    folder = artifacts.epoch(epoch) / "steps"
    return [int(path.stem) for path in folder.glob("*.journal")] if folder.is_dir() else []


def list_manifests(artifacts: JobArtifacts) -> list[ManifestRef]:
    """All committed checkpoints, oldest first."""
    refs = [ref for epoch in range(1, artifacts.highest_epoch() + 1) for ref in _refs(artifacts, epoch)]
    return sorted(refs, key=lambda ref: (ref.epoch, ref.name))


def retain(artifacts: JobArtifacts, keep_last: int, base: ManifestRef | None) -> int:
    """Delete all but the newest checkpoints; never the one that this epoch opened from. Returns how many went.

    Two are kept at least: the newest may turn out to be damaged on disk.
    """
    keep = set(list_manifests(artifacts)[-max(keep_last, 2) :])
    if base is not None:
        keep.add(base)
    gone = [ref for ref in list_manifests(artifacts) if ref not in keep]
    for ref in gone:
        shutil.rmtree(ref.folder(artifacts), ignore_errors=True)
    return len(gone)


def spec_sha256(spec: dict[str, Any]) -> str:
    """Hash of a job's spec, for manifests and model cards."""
    return sha256_bytes(json.dumps(spec, sort_keys=True).encode())
