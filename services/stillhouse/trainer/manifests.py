"""Checkpoints as manifests, epochs, and the one recovery rule.

A claim of a job opens a new epoch: it creates `epochs/{epoch}/` exclusively, with `opened.json` saying which manifest
it starts from and which step journals it replays. It opens from the newest manifest that verifies in the past of the
highest epoch: that epoch's own manifests, then those that it rests on, back to the start of the job. The journals that
follow are replayed up to the first that is missing or damaged. So there is one lineage: what a zombie of an older
epoch writes later is on none. Queues are never read.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from stillhouse.core.blobs import (
    JobArtifacts,
    fsync_dir,
    make_dirs,
    read_json,
    sealed,
    sha256_bytes,
    sha256_file,
    staged_dir,
    unsealed,
    write_json,
)
from stillhouse.core.errors import CorruptError, LeaseLostError, NotFoundError
from stillhouse.core.failpoints import failpoint
from stillhouse.trainer.journal import read_step

SCHEMA_VERSION: Final = 1
MANIFEST: Final = "manifest.json"
OPENED: Final = "opened.json"
CLOSED: Final = "closed.json"
FORGIVEN: Final = ("draining", "paused", "queue_lost", "lease_lost")
"""Ends of a claim that are not the job's fault."""


@dataclass(frozen=True, slots=True)
class ManifestRef:
    """Names a committed checkpoint."""

    epoch: int
    name: str
    """Folder name, `{step}-{sha8}`."""
    sha256: str
    """sha256 of manifest.json."""

    @property
    def step(self) -> int:
        """Optimizer steps behind it."""
        return int(self.name.partition("-")[0])

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
        if ref.step == step:
            return ref
    with staged_dir(folder / f"{step:08d}") as staged:
        write_state(staged.path)
        failpoint("trainer.committing")
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
    if document["step"] != ref.step:
        raise CorruptError(f"{folder} is a checkpoint of step {document['step']}, its name says {ref.step}")
    for name, entry in document["files"].items():
        actual = sha256_file(folder / name) if (folder / name).is_file() else "missing"
        if actual != entry["sha256"]:
            raise CorruptError(f"{folder / name} has sha256 {actual[:12]}, the manifest says {entry['sha256'][:12]}")
    return document


def open_epoch(
    artifacts: JobArtifacts,
    epoch: int,
    trainer: str,
    on_damage: Callable[[str], None] = lambda _: None,
    *,
    lag: Callable[[int], int] = lambda _: 0,
) -> Opening:
    """Create the folder of a new epoch and decide what it starts from (see the module's text).

    `lag(step)` = how many steps the base must lie back at least if the first step to sample is `step`: a
    deterministic run needs the weights of those versions again, and gets them by the replay.

    Raises:
        LeaseLostError: the folder exists: another claim had the same or a higher epoch.
    """
    previous = artifacts.highest_epoch()
    if previous >= epoch:
        raise LeaseLostError(f"epoch {previous} is open already, cannot open {epoch}")
    opening = _opening(artifacts, previous, epoch, on_damage, lag)
    folder = artifacts.epoch(epoch)
    make_dirs(artifacts.epochs)
    fsync_dir(artifacts.root)  # whoever made `epochs` may have died before it was durable
    try:
        folder.mkdir()
    except FileExistsError:
        raise LeaseLostError(f"epoch {epoch} was opened by another claim at the same moment") from None
    failpoint("trainer.epoch_made")
    document = {
        "schema_version": SCHEMA_VERSION,
        "epoch": epoch,
        "trainer": trainer,
        "opened_at": time.time(),
        "opened_from": opening.base.as_json() if opening.base else None,
        "replay": [[ref.epoch, ref.step] for ref in opening.replay],
    }
    try:
        write_json(folder / OPENED, sealed(document))
        fsync_dir(artifacts.epochs)
    except OSError:  # no room, perhaps: as if the epoch never was, so that the claim may try again
        (folder / OPENED).unlink(missing_ok=True)
        folder.rmdir()
        raise
    failpoint("trainer.epoch_opened")
    return opening


def close_epoch(artifacts: JobArtifacts, epoch: int, reason: str, message: str = "") -> None:
    """Note in the epoch's folder how its claim ended, if the trainer lived to say it."""
    write_json(artifacts.epoch(epoch) / CLOSED, {"reason": reason, "message": message, "closed_at": time.time()})


def fruitless_claims(artifacts: JobArtifacts) -> tuple[int, str]:
    """(claims in a row, up to now, that trained no step and blame nobody else; what the last of them said)."""
    number, message = 0, ""
    for epoch in range(artifacts.highest_epoch(), 0, -1):
        closed = _read(artifacts.epoch(epoch) / CLOSED) or {}
        if closed.get("reason") in FORGIVEN or _journalled_steps(artifacts, epoch) or any(_refs(artifacts, epoch)):
            break
        message = message or str(closed.get("message", ""))
        number += 1
    return number, message


def _opening(
    artifacts: JobArtifacts, previous: int, epoch: int, on_damage: Callable[[str], None], lag: Callable[[int], int]
) -> Opening:
    for candidate in range(previous, 0, -1):
        past = _past(artifacts, candidate, on_damage)
        if past is None:  # it died before any work: as if it never was
            continue
        for ref in reversed(past.manifests):
            try:
                first_step = int(verify(artifacts, ref)["step"])
            except CorruptError as error:
                on_damage(str(error))
                continue
            replay = _readable(artifacts, past.journals, first_step, on_damage)
            if len(replay) >= lag(first_step + len(replay)):
                return Opening(epoch, ref, replay)
        if past.is_whole:
            return Opening(epoch, None, _readable(artifacts, past.journals, 0, on_damage))
    return Opening(epoch, None)


@dataclass(frozen=True, slots=True)
class _Past:
    """What an epoch's weights rest on: its own work and that of the epochs it was opened from."""

    journals: dict[int, JournalRef]
    """By step."""
    manifests: list[ManifestRef]
    """Oldest first."""
    is_whole: bool
    """It reaches back to the start of the job; else an opened.json on the way is damaged."""


def _past(artifacts: JobArtifacts, epoch: int, on_damage: Callable[[str], None]) -> _Past | None:
    """The past of an epoch; None if it did no work."""
    own_journals = {step: JournalRef(epoch, step) for step in _journalled_steps(artifacts, epoch)}
    own_manifests = sorted(_refs(artifacts, epoch), key=lambda ref: ref.name)
    try:
        opened = unsealed(artifacts.epoch(epoch) / OPENED)
    except NotFoundError:
        return None
    except CorruptError as error:
        on_damage(str(error))
        return _Past(own_journals, own_manifests, is_whole=False)
    earlier = _Past({}, [], is_whole=True)
    if opened["opened_from"] is not None:
        base = ManifestRef(**opened["opened_from"])
        earlier = _past(artifacts, base.epoch, on_damage) or _Past({}, [], is_whole=False)
        earlier = _until(earlier, base)
    replayed = {step: JournalRef(source, step) for source, step in opened["replay"]}
    return _Past({**earlier.journals, **replayed, **own_journals}, earlier.manifests + own_manifests, earlier.is_whole)


def _until(past: _Past, base: ManifestRef) -> _Past:
    """The part of a past that lies behind one of its manifests: what its epoch did later is on another lineage."""
    return _Past(
        {step: ref for step, ref in past.journals.items() if step < base.step},
        [ref for ref in past.manifests if ref.step < base.step] + [base],
        past.is_whole,
    )


def _readable(
    artifacts: JobArtifacts, journals: dict[int, JournalRef], first_step: int, on_damage: Callable[[str], None]
) -> list[JournalRef]:
    """The unbroken run of journals from `first_step` on that verify."""
    replay: list[JournalRef] = []
    while ref := journals.get(first_step + len(replay)):
        try:
            read_step(artifacts.journal(ref.epoch, ref.step))
        except (CorruptError, NotFoundError) as error:
            on_damage(str(error))
            break
        replay.append(ref)
    return replay


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return read_json(path)
    except (NotFoundError, CorruptError):
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


@dataclass(frozen=True, slots=True)
class LineageRefs:
    """The checkpoints behind the weights of a job."""

    manifests: list[ManifestRef]
    """Oldest first; some may be deleted."""
    base: ManifestRef | None
    """What the newest epoch opened from."""
    is_whole: bool
    """It reaches back to the start of the job."""


def lineage(artifacts: JobArtifacts, *, has_ended: bool = False) -> LineageRefs | None:
    """Of the newest epoch; None if that is being opened just now. When the job `has_ended` nobody opens one."""
    for epoch in range(artifacts.highest_epoch(), 0, -1):
        past = _past(artifacts, epoch, lambda _: None)
        if past is not None:
            opened = (_read(artifacts.epoch(epoch) / OPENED) or {}).get("opened_from") if past.is_whole else None
            return LineageRefs(past.manifests, ManifestRef(**opened) if opened else None, past.is_whole)
        if not has_ended:
            return None
    return None


def size_bytes(artifacts: JobArtifacts, ref: ManifestRef | None) -> int | None:
    """What a checkpoint takes on disk, which the next one will, too; None if that is not known."""
    document = _read(ref.folder(artifacts) / MANIFEST) if ref else None
    return int(document["size_bytes"]) if document else None


def list_manifests(artifacts: JobArtifacts) -> list[ManifestRef]:
    """All committed checkpoints, oldest first."""
    refs = [ref for epoch in range(1, artifacts.highest_epoch() + 1) for ref in _refs(artifacts, epoch)]
    return sorted(refs, key=lambda ref: (ref.epoch, ref.name))


def spec_sha256(spec: dict[str, Any]) -> str:
    """Hash of a job's spec, for manifests and model cards."""
    return sha256_bytes(json.dumps(spec, sort_keys=True).encode())
