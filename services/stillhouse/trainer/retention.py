"""Which checkpoints stay: the newest, the best, and whatever a claim may need to start from.

    committed -> kept: one of the newest `keep_last` (at least two) that verify, or newer than those; one of the best
                 `keep_best` by held-out evaluation; the end of a stage; the base of the newest epoch; for a
                 deterministic job the newest that lies `lag` steps back, whose replay gives the old versions again
              -> gone: renamed to tmp.gone.*, then deleted. So no reader finds half of one

What a job that has not ended names (core/checkpoints.py) stays, too, until it is a model, and so does what somebody
marked as best (core/pins.py); see core/removal.py for how both meet a deletion.

What is kept is hashed before anything goes: a checkpoint that rotted on disk is no reason to delete an older, good one.
Journals always stay: they are the ledger.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from stillhouse.core.blobs import Artifacts, JobArtifacts
from stillhouse.core.checkpoints import named, registration
from stillhouse.core.errors import CorruptError
from stillhouse.core.evaluations import best_metric, read_evaluations, value_of
from stillhouse.core.pins import pinned
from stillhouse.core.removal import GONE, put_aside, remove
from stillhouse.core.spec import JobSpec
from stillhouse.core.spec_evaluation import Mode
from stillhouse.trainer.manifests import ManifestRef, lineage, list_manifests, verify

KEEP_AT_LEAST: Final = 2
"""The newest may turn out to be damaged on disk."""
_good: set[tuple[Path, str]] = set()
"""Manifests that verified in this process, by folder and hash: a checkpoint of 2 GiB is hashed once, not per commit."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What a job's spec says about its checkpoints."""

    keep_last: int
    keep_best: int = 0
    best: tuple[str, Mode] = ("reverse_kl", "min")
    """By which measure of the evaluations, and which way."""
    ends: frozenset[int] = frozenset()
    """Steps with which stages end: other jobs and later stages may name their checkpoints."""
    lag: Callable[[int], int] = lambda _: 0
    """Steps that the base of a claim which goes on at a step must lie back; above 0 for deterministic jobs."""

    @classmethod
    def of(cls, spec: JobSpec) -> Policy:
        """The policy of a job."""
        ends = frozenset(span.stop_step for span in spec.spans())
        return cls(spec.checkpoint.keep_last, spec.checkpoint.keep_best, best_metric(spec), ends, spec.lag)


def retain(
    artifacts: JobArtifacts,
    policy: Policy,
    base: ManifestRef | None,
    on_damage: Callable[[str], None] = lambda _: None,
) -> int:
    """Delete the checkpoints of a running job that may go; `base` is what its epoch opened from. Returns how many."""
    gone = superfluous(artifacts, policy, on_damage)
    number = 0
    try:
        number = sum(delete(artifacts, ref) for ref in gone if ref != base)
    except CorruptError as error:  # who names what is not known: all of it stays
        on_damage(str(error))
    clear_gone(artifacts)
    return number


def superfluous(
    artifacts: JobArtifacts,
    policy: Policy,
    on_damage: Callable[[str], None] = lambda _: None,
    *,
    has_ended: bool = False,
) -> list[ManifestRef]:
    """The checkpoints that may go, oldest first; none as long as too few are known to be good."""
    past = lineage(artifacts, has_ended=has_ended)
    if past is None:  # a claim opens its epoch at this moment: what it opens from is not known
        return []
    on_disk = list_manifests(artifacts)
    known = [ref for ref in past.manifests if ref in on_disk]
    kept = _newest(artifacts, known, max(policy.keep_last, KEEP_AT_LEAST), on_damage)
    if len(kept) == len(known) and len(known) == len(on_disk):
        return []
    if sum(_is_good(artifacts, ref, lambda _: None) for ref in kept) < KEEP_AT_LEAST:
        return []  # a claim may have to go back further, even off the lineage
    kept |= _best(artifacts, known, policy, on_damage)
    kept |= {ref for ref in known if ref.step in policy.ends}
    if known and (lag := policy.lag(known[-1].step)):
        start = known[-1].step - lag
        kept |= {ref for ref in known if ref.step > start}  # what lies back far enough later on is among these
        kept |= _newest(artifacts, [ref for ref in known if ref.step <= start], 1, on_damage)
    if past.base is not None:
        kept.add(past.base)
    # where the lineage is not whole, what looks like a zombie's may be ours
    return [ref for ref in (on_disk if past.is_whole else known) if ref not in kept]


def _newest(
    artifacts: JobArtifacts, refs: list[ManifestRef], number: int, on_damage: Callable[[str], None]
) -> set[ManifestRef]:
    """The newest `number` that verify and all that are newer; every one, if fewer verify."""
    kept: set[ManifestRef] = set()
    for ref in reversed(refs):
        kept.add(ref)
        number -= _is_good(artifacts, ref, on_damage)
        if number == 0:
            break
    return kept


def _best(
    artifacts: JobArtifacts, refs: list[ManifestRef], policy: Policy, on_damage: Callable[[str], None]
) -> set[ManifestRef]:
    """The best `keep_best` by held-out evaluation that verify."""
    metric, mode = policy.best
    sign = 1 if mode == "min" else -1
    values = {int(each["step"]): value_of(each, metric) for each in read_evaluations(artifacts)}
    measured = [(sign * value, ref) for ref in refs if (value := values.get(ref.step)) is not None]
    best: set[ManifestRef] = set()
    for _, ref in sorted(measured, key=lambda pair: (pair[0], -pair[1].step)):
        if len(best) == policy.keep_best:
            break
        if _is_good(artifacts, ref, on_damage):
            best.add(ref)
    return best


def _is_good(artifacts: JobArtifacts, ref: ManifestRef, on_damage: Callable[[str], None]) -> bool:
    key = (ref.folder(artifacts), ref.sha256)
    if key not in _good:
        try:
            verify(artifacts, ref)
        except (CorruptError, OSError) as error:
            on_damage(str(error))
            return False
        _good.add(key)
    return True


def delete(artifacts: JobArtifacts, ref: ManifestRef) -> bool:
    """Delete a checkpoint, at once for every reader, and for good in the end; False = it stays, or is gone already.

    Raises:
        CorruptError: what the jobs name or somebody marked cannot be read.
    """
    return not _is_kept(artifacts, ref) and remove(ref.folder(artifacts), lambda: _is_kept(artifacts, ref))


def _is_kept(artifacts: JobArtifacts, ref: ManifestRef) -> bool:
    return is_named(artifacts, ref) or checkpoint_id(ref) in pinned(artifacts)


def checkpoint_id(ref: ManifestRef) -> str:
    """Its name on REST."""
    return f"ckpt_{ref.epoch}-{ref.name}"


def delete_model(artifacts: JobArtifacts, folder: Path) -> bool:
    """Delete what was made of a checkpoint, and its registration, as `delete` does: nobody finds half of a model under
    its name. A process that dies here leaves leftovers.

    Raises:
        CorruptError: what the jobs name cannot be read.
    """
    own, mark = registration(artifacts, folder.name), secrets.token_hex(4)
    doomed = folder.with_name(f"{GONE}{folder.name}.{mark}")
    apart = own.with_name(f"{own.name}.{mark}.tmp")
    name = f"{artifacts.root.name}/{folder.name}"
    if not put_aside({own: apart, folder: doomed}, lambda: name in named(Artifacts(artifacts.root.parent.parent))):
        return False
    apart.unlink(missing_ok=True)
    shutil.rmtree(doomed, ignore_errors=True)
    return True


def is_named(artifacts: JobArtifacts, ref: ManifestRef) -> bool:
    """Whether a job that has not ended needs this checkpoint to make a model of it.

    Raises:
        CorruptError: what the jobs name cannot be read.
    """
    checkpoint = checkpoint_id(ref)
    if registration(artifacts, checkpoint).is_file():
        return False
    return f"{artifacts.root.name}/{checkpoint}" in named(Artifacts(artifacts.root.parent.parent))


def clear_gone(artifacts: JobArtifacts) -> None:
    """Delete what a process died over."""
    for path in artifacts.epochs.glob(f"*/manifests/{GONE}*"):
        shutil.rmtree(path, ignore_errors=True)
