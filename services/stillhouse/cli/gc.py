"""What `stillhouse gc` finds and deletes.

checkpoint   of an ended job, beyond what its spec keeps
zombie       a checkpoint on no lineage: written by a trainer that had lost the job
model        what was made of an ended job's checkpoint for jobs that named it, once all of those have ended; what is
             registered (`stillhouse models add`) stays
leftover     a half-written file or folder of a process that died, an hour old
spill        payloads of a teacher that is gone
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from stillhouse.cli.console import EXIT_USAGE, CliError, print_json, print_table, say, size
from stillhouse.core.blobs import Artifacts, JobArtifacts, unsealed
from stillhouse.core.checkpoints import named
from stillhouse.core.config import load_settings
from stillhouse.core.errors import CorruptError, NotFoundError
from stillhouse.core.models import ModelRegistry
from stillhouse.core.spec import JobSpec
from stillhouse.core.spill import dead_folders, remove_dead

LEFTOVER_S: Final = 3600.0
"""Nobody writes one file for so long; checkpoints of 100 GiB take minutes."""
DAY_S: Final = 86_400.0


@dataclass(frozen=True, slots=True)
class Item:
    """Something that may go."""

    job_id: str
    kind: str
    path: Path
    size_bytes: int
    delete: Callable[[], object]

    def as_json(self) -> dict[str, Any]:
        return {"job_id": self.job_id, "kind": self.kind, "path": str(self.path), "size_bytes": self.size_bytes}


def collect(job_id: str, *, is_dry: bool, artifacts: Path | None, older_than_days: float, as_json: bool) -> None:
    """Find, show and, unless `is_dry`, delete."""
    settings = load_settings()
    root = Artifacts(artifacts if artifacts is not None else settings.artifacts_dir())
    notes: list[str] = []
    registered = {Path(entry.path).resolve() for entry in ModelRegistry(settings.models_path()).all().values()}
    items = list(_of_jobs(root, job_id, older_than_days * DAY_S, notes, registered))
    if not job_id:
        items += [_leftover("", path) for path in _temporary(root.root / "files")]
        if artifacts is None:
            items += [
                Item("", "spill", folder, _bytes(folder), lambda folder=folder: remove_dead(folder))
                for folder in dead_folders(settings.spill_dir())
            ]
    if not is_dry:
        for item in items:
            item.delete()
    total = sum(item.size_bytes for item in items)
    if as_json:
        found = [item.as_json() for item in items]
        print_json({"items": found, "size_bytes": total, "is_deleted": not is_dry, "notes": notes})
        return
    if items:
        rows = [(item.job_id or "-", item.kind, item.path.name, size(item.size_bytes)) for item in items]
        print_table(("job", "kind", "what", ">size"), rows)
    for note in notes:
        say(f"note: {note}")
    say(f"{len(items)} things, {size(total)}" + (" would go (--dry-run)" if is_dry else " deleted"))


def _of_jobs(
    root: Artifacts, job_id: str, older_than_s: float, notes: list[str], registered: Container[Path]
) -> Iterator[Item]:
    known = root.job_ids()
    if job_id and job_id not in known:
        raise CliError(
            f"no job '{job_id}' in {root.root}",
            fix="name the folder with --artifacts DIR, or the deployment with STILLHOUSE_HOME",
            exit_code=EXIT_USAGE,
        )
    for name in [job_id] if job_id else known:
        job = root.job(name)
        try:
            yield from _checkpoints(name, job, older_than_s, notes)
            yield from _models(root, name, older_than_s, registered)
        except (CorruptError, NotFoundError, KeyError, TypeError, ValidationError) as error:
            notes.append(f"{name}: its checkpoints stay, what jobs need of it cannot be read: {error}")
        for path in _temporary(job.root):
            yield _leftover(name, path)


def _checkpoints(job_id: str, job: JobArtifacts, older_than_s: float, notes: list[str]) -> Iterator[Item]:
    # no torch behind these two, and nothing of them is needed by the other commands
    from stillhouse.trainer.manifests import lineage
    from stillhouse.trainer.retention import Policy, delete, is_named, superfluous

    spec = JobSpec.model_validate(unsealed(job.job_json)["spec"])
    ended_at = _ended_at(job)
    past = lineage(job, has_ended=ended_at is not None)
    if past is None:
        return
    policy = Policy.of(spec)
    is_due = ended_at is not None and time.time() - ended_at >= older_than_s
    damage: list[str] = []
    for ref in superfluous(job, policy, damage.append, has_ended=ended_at is not None):
        is_zombie = ref not in past.manifests
        folder = ref.folder(job)
        if (is_zombie or is_due) and not is_named(job, ref):
            kind = "zombie" if is_zombie else "checkpoint"
            yield Item(job_id, kind, folder, _bytes(folder), lambda ref=ref: delete(job, ref))
    notes += [f"{job_id}: {message}" for message in dict.fromkeys(damage)]


def _models(root: Artifacts, job_id: str, older_than_s: float, registered: Container[Path]) -> Iterator[Item]:
    job = root.job(job_id)
    ended_at = _ended_at(job)
    if ended_at is None or time.time() - ended_at < older_than_s:
        return
    from stillhouse.trainer.retention import delete_model

    needed = named(root)
    for folder in sorted(job.models.glob("ckpt_*/")):
        if f"{job_id}/{folder.name}" not in needed and folder.resolve() not in registered:
            yield Item(job_id, "model", folder, _bytes(folder), lambda folder=folder: delete_model(job, folder))


def _ended_at(job: JobArtifacts) -> float | None:
    """When the job ended; None if it may go on."""
    final = job.root / "final.json"
    try:
        return float(unsealed(final).get("finished_at") or final.stat().st_mtime)
    except NotFoundError:
        return None
    except CorruptError:  # it has ended, only how is not known
        return final.stat().st_mtime


def _temporary(folder: Path) -> Iterator[Path]:
    """Files and folders in the making that nobody touched for an hour."""
    for path in sorted(folder.rglob("*")):
        is_made = path.name.startswith("tmp.") if path.is_dir() else path.name.endswith(".tmp")
        is_inside = any(part.startswith("tmp.") for part in path.relative_to(folder).parts[:-1])
        if is_made and not is_inside and time.time() - _touched(path) > LEFTOVER_S:
            yield path


def _touched(path: Path) -> float:
    """When anything in it was last written."""
    try:
        return max(entry.stat().st_mtime for entry in (path, *path.rglob("*")))
    except FileNotFoundError:  # it goes away while we look
        return time.time()


def _leftover(job_id: str, path: Path) -> Item:
    def delete() -> None:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    return Item(job_id, "leftover", path, _bytes(path), delete)


def _bytes(path: Path) -> int:
    try:
        return sum(entry.stat().st_size for entry in (path, *path.rglob("*")) if entry.is_file())
    except FileNotFoundError:
        return 0
