"""The checkpoints: hashes, numbers, order, and whether what a recovery needs is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, TypeGuard

from stillhouse.core.blobs import JobArtifacts, sha256_file
from stillhouse.core.errors import CorruptError, NotFoundError, StillhouseError
from stillhouse.core.oracle.identity import Identity
from stillhouse.core.oracle.lineage import Lineage
from stillhouse.core.oracle.read import Base, Checkpoint, Epoch, as_base, read_document
from stillhouse.core.oracle.report import Report
from stillhouse.core.oracle.safetensors import differing, non_finite
from stillhouse.core.oracle.stages import Plan
from stillhouse.core.oracle.steps import Sums, spec_sha256
from stillhouse.core.spec import JobSpec

NEEDED: Final = 2
"""Newest checkpoints of a lineage that a recovery needs: the last one may turn out to be damaged."""
WEIGHTS: Final = "model"
AVERAGE: Final = "average"


class CheckpointChecks:
    """Checks the checkpoints of a job: all by hash, those of the lineage also by what they say."""

    def __init__(
        self,
        artifacts: JobArtifacts,
        spec: JobSpec,
        plan: Plan,
        lineage: Lineage,
        report: Report,
        who: Identity,
        *,
        deep: bool,
    ) -> None:
        self._artifacts = artifacts
        self._spec = spec
        self._plan = plan
        self._lineage = lineage
        self._report = report
        self._who = who
        self._deep = deep
        self._needed = set(lineage.checkpoints[-NEEDED:])
        self.documents: dict[Checkpoint, dict[str, Any]] = {}
        """Manifests of the lineage that parse."""

    def read(self, epochs: dict[int, Epoch]) -> None:
        """Read and hash everything."""
        for epoch in epochs.values():
            for folder, why in epoch.broken:
                self._say_broken(epoch.number, folder, why)
            for checkpoint in epoch.checkpoints:
                self._verify(checkpoint)

    def ledgers(self) -> dict[int, dict[str, Any]]:
        """Ledgers of the lineage's checkpoints, by step."""
        return {c.step: d["ledger"] for c, d in self.documents.items() if _is_ledger(d.get("ledger"))}

    def check(self, epochs: dict[int, Epoch], sums: dict[int, Sums | None]) -> None:
        """Order, parents and ledgers of the lineage's checkpoints."""
        self._check_order(epochs)
        self._check_base(epochs)
        self._check_pair()
        for checkpoint, document in self.documents.items():
            self._check_facts(checkpoint, document)
            self._check_ledger(checkpoint, document, sums)

    def _say_broken(self, epoch: int, folder: Path, why: str) -> None:
        """A folder that is no checkpoint: bad if it would be one of the newest of the lineage."""
        step = int(folder.name[:8]) if folder.name[:8].isdigit() else -1
        is_live = epoch in self._lineage.limits
        limit = self._lineage.limits.get(epoch)
        newest = [c.step for c in self._lineage.checkpoints[-NEEDED:]]
        is_needed = is_live and (limit is None or step <= limit) and (len(newest) < NEEDED or step > min(newest))
        say = self._report.violate if is_needed and step >= 0 else self._report.damaged
        say("checkpoint", f"{folder} is not a checkpoint: {why}", epoch=epoch, step=max(step, 0))

    def _verify(self, checkpoint: Checkpoint) -> None:
        """Every file by hash, every number finite."""
        is_live = checkpoint in self._lineage.checkpoints
        say = self._report.violate if checkpoint in self._needed else self._report.damaged
        where: dict[str, Any] = {"epoch": checkpoint.epoch, "step": checkpoint.step}
        try:
            document = read_document(checkpoint.folder / "manifest.json")
            if is_live:
                self.documents[checkpoint] = document
            for name, entry in document["files"].items():
                self._verify_file(checkpoint.folder, name, entry)
        except (StillhouseError, KeyError, TypeError, AttributeError, OSError) as error:
            if not checkpoint.folder.exists():  # retention took it away this very moment
                self.documents.pop(checkpoint, None)
                return
            text = error.message if isinstance(error, StillhouseError) else f"{checkpoint.folder}: {error!r}"
            say("checkpoint", text, **where)
            return
        self._report.counts["manifests"] += 1
        if self._deep:
            say = self._report.violate if is_live else self._report.damaged
            check_finite(checkpoint.folder, self._report, say, where)

    def _verify_file(self, folder: Path, name: str, entry: dict[str, Any]) -> None:
        path = folder / name
        if not path.is_file():
            raise CorruptError(f"{path} is missing; the manifest names it")
        size = path.stat().st_size
        if size != entry["size_bytes"]:
            raise CorruptError(f"{path} has {size} bytes, the manifest says {entry['size_bytes']}")
        if self._deep:
            digest = sha256_file(path)
            self._report.counts["bytes_hashed"] += size
            if digest != entry["sha256"]:
                raise CorruptError(f"{path} has sha256 {digest[:12]}, the manifest says {entry['sha256'][:12]}")

    def _check_order(self, epochs: dict[int, Epoch]) -> None:
        """Steps rise, and each checkpoint names its predecessor, or what its epoch opened from, as its parent."""
        before: dict[int, Checkpoint] = {}
        for checkpoint in self._lineage.checkpoints:
            earlier = before.get(checkpoint.epoch)
            where: dict[str, Any] = {"epoch": checkpoint.epoch, "step": checkpoint.step}
            if earlier is not None and earlier.step >= checkpoint.step:
                message = f"epoch {checkpoint.epoch} holds two checkpoints of step {checkpoint.step}: "
                self._report.violate("versions", message + f"{earlier.name} and {checkpoint.name}", **where)
            document = self.documents.get(checkpoint)
            if document is not None:
                self._check_parent(epochs, checkpoint, document, earlier)
            before[checkpoint.epoch] = checkpoint
        steps = [checkpoint.step for checkpoint in self._lineage.checkpoints]
        if steps != sorted(steps):
            self._report.violate("versions", f"the checkpoints of the lineage are of steps {steps}: not in order")

    def _check_parent(
        self, epochs: dict[int, Epoch], checkpoint: Checkpoint, document: dict[str, Any], earlier: Checkpoint | None
    ) -> None:
        where: dict[str, Any] = {"epoch": checkpoint.epoch, "step": checkpoint.step}
        try:
            parent = as_base(document.get("parent"))
        except CorruptError as error:
            self._report.violate("versions", f"{checkpoint.name}: parent {error.message}", **where)
            return
        opened = epochs[checkpoint.epoch]
        if parent is not None and parent.epoch == checkpoint.epoch:
            # retention may have taken the parent; none may lie between
            is_right = parent.step < checkpoint.step and (earlier is None or parent.step >= earlier.step)
            is_right = is_right and (earlier is None or earlier.step != parent.step or earlier.sha256 == parent.sha256)
        else:
            is_right = opened.damage != "" or (parent == opened.base and earlier is None)
        if not is_right:
            found, expected = (ref.name if ref else "nothing" for ref in (parent, earlier or opened.base))
            message = (
                f"checkpoint {checkpoint.name} of epoch {checkpoint.epoch} says it follows {found}, "
                f"on disk before it is {expected}"
            )
            self._report.violate("versions", message, **where)
        before = parent.step if parent is not None else 0
        if missed := [end for end in self._plan.ends() if before < end < checkpoint.step]:
            message = (
                f"checkpoint {checkpoint.name} follows step {before}: the stage that ends with {missed[0]} has none"
            )
            self._report.violate("stage", message, **where)

    def _check_base(self, epochs: dict[int, Epoch]) -> None:
        """What the newest epoch opened from is what the next one may have to open from: it must lie there."""
        head = epochs.get(self._lineage.head)
        base = head.base if head is not None else None
        if base is None or head is None:
            return
        own = [c for c in head.checkpoints if c in self.documents]
        found = next((c for c in self._lineage.checkpoints if _is_same(c, base)), None)
        if found is None and len(own) < NEEDED and not self._is_broken(epochs, base):
            message = f"epoch {head.number} opened from {base.name} of epoch {base.epoch}, and that is gone"
            self._report.violate("retention", message, epoch=base.epoch, step=base.step)
        if found is not None and found.sha256 != base.sha256:
            message = f"{base.name} has sha256 {found.sha256[:12]}, epoch {head.number} opened from {base.sha256[:12]}"
            self._report.violate("checkpoint", message, epoch=base.epoch, step=base.step)

    def _check_pair(self) -> None:
        """Clean-up leaves two checkpoints of the lineage: the newest may turn out to be damaged.

        A fall-back over a damaged one leaves one, and so does that of a deterministic job to older versions.
        """
        left = self._lineage.checkpoints
        is_excused = self._spec.deterministic or self._report.damage or "checkpoint" in self._report.broken_rules()
        if len(left) != 1 or is_excused:
            return
        parent = self.documents.get(left[0], {}).get("parent")
        if parent is not None:
            message = f"{left[0].name} is the only checkpoint left; clean-up took the one before: {parent}"
            self._report.violate("retention", message, epoch=left[0].epoch, step=left[0].step)

    def _is_broken(self, epochs: dict[int, Epoch], base: Base) -> bool:
        epoch = epochs.get(base.epoch)
        return epoch is not None and any(folder.name == base.name for folder, _ in epoch.broken)

    def _check_facts(self, checkpoint: Checkpoint, document: dict[str, Any]) -> None:
        stage = self._plan.at(max(0, checkpoint.step - 1))  # that of a stage's end belongs to the one that ends
        expected = {
            "epoch": checkpoint.epoch,
            "step": checkpoint.step,
            "policy_version": checkpoint.step,
            "next_group": stage.groups(checkpoint.step).start,
            "stage": stage.index,
        }
        for name, value in expected.items():
            if document.get(name) != value:
                rule = {"next_group": "prefix", "stage": "stage"}.get(name, "versions")
                message = f"checkpoint {checkpoint.name}: {name} is {document.get(name)!r}, expected {value!r}"
                self._report.violate(rule, message, epoch=checkpoint.epoch, step=checkpoint.step)
        if not self._who.may_be_of(str(document.get("job_id")), checkpoint.epoch):
            message = f"checkpoint {checkpoint.name} says it is of job {document.get('job_id')!r}"
            self._report.violate("versions", message, epoch=checkpoint.epoch, step=checkpoint.step)
        if document.get("spec_sha256") != spec_sha256(self._spec):
            # a program of another version fills in other defaults
            self._report.notes.append(
                f"checkpoint {checkpoint.name} was made by a program that reads the spec otherwise"
            )

    def _check_ledger(self, checkpoint: Checkpoint, document: dict[str, Any], sums: dict[int, Sums | None]) -> None:
        ledger, step = document.get("ledger"), checkpoint.step
        where: dict[str, Any] = {"epoch": checkpoint.epoch, "step": step}
        if not _is_ledger(ledger):
            self._report.violate("ledger", f"checkpoint {checkpoint.name} has no ledger, got {ledger!r}", **where)
            return
        if step not in sums:
            if step >= self._lineage.first_step:
                message = f"checkpoint {checkpoint.name} is of step {step}, journals go to {self._lineage.num_steps}"
                self._report.violate("trained", message, **where)
            return
        skipped = ledger["skipped_steps"]
        if skipped != sorted(set(skipped)) or any(not 0 <= number < step for number in skipped):
            message = f"checkpoint {checkpoint.name} skipped steps {skipped} of {step}"
            self._report.violate("ledger", message, **where)
        expected = sums[step]
        if expected is None:
            return
        self._report.counts["ledgers"] += 1
        different = {n: (ledger[n], value) for n, value in expected.facts().items() if ledger[n] != value}
        if different:
            said = ", ".join(f"{name} {mine}, journals give {theirs}" for name, (mine, theirs) in different.items())
            message = f"checkpoint {checkpoint.name}: its weights were trained on something else: {said}"
            self._report.violate("ledger", message, **where)


def check_finite(folder: Path, report: Report, say: Any, where: dict[str, Any]) -> int:
    """Look for NaN and infinity in the safetensors files of a folder; returns how many files were read."""
    paths = sorted(folder.glob("*.safetensors"))
    for path in paths:
        try:
            bad = non_finite(path)
        except (CorruptError, OSError) as error:
            say("checkpoint", f"{path}: {error}", **where)
            continue
        report.counts["tensors_files"] += 1
        if bad:
            name, number = next(iter(bad.items()))
            say("non_finite", f"{path}: {number} numbers of '{name}' are not finite", **where)
    return len(paths)


def committed_parts(folder: Path, stem: str) -> list[Path]:
    """The files that hold a set of tensors, in the order of their rows: one, or one per rank that trained."""
    return [*folder.glob(f"{stem}.safetensors"), *sorted(folder.glob(f"{stem}-*-of-*.safetensors"))]


def check_export(
    artifacts: JobArtifacts, spec: JobSpec, lineage: Lineage, steps: tuple[int, int], report: Report, *, deep: bool
) -> None:
    """The export of a job that succeeded: there, readable, finite, and equal to the checkpoint of its step; `steps` =
    that one, and the job's last.

    A job that averages its weights exports the average. An adapter is compared, weights that it is merged into are not.
    """
    folder = artifacts.export(lineage.head)
    exported, stop_step = steps
    where: dict[str, Any] = {"epoch": lineage.head, "step": exported}
    weights = [path for part in (folder, folder / "adapter") for path in sorted(part.glob("*.safetensors"))]
    if not weights:
        report.violate("success", f"the job succeeded, and {folder} holds no exported student", **where)
        return
    if not deep:
        return
    for part in (folder, folder / "adapter"):
        check_finite(part, report, report.violate, where)
    last = next((c for c in lineage.checkpoints if c.step == exported), None)
    is_averaged = exported == stop_step and spec.stages[-1].optimizer.ema_decay is not None
    stem = AVERAGE if is_averaged else WEIGHTS
    committed = committed_parts(last.folder, stem) if last is not None else []
    if not committed:
        return
    number = 0
    for path in weights:
        try:
            compared, different = differing(path, committed)
        except (CorruptError, NotFoundError, OSError):
            continue  # said above, or with the checkpoint
        number += compared
        if different:
            message = f"{path}: '{different[0]}' is not what checkpoint {committed[0].parent.name} holds"
            report.violate("export", message, **where)
    report.counts["tensors_compared"] += number


def _is_same(checkpoint: Checkpoint, base: Base) -> bool:
    return (checkpoint.epoch, checkpoint.name) == (base.epoch, base.name)


def _is_ledger(value: Any) -> TypeGuard[dict[str, Any]]:
    if not isinstance(value, dict) or not isinstance(value.get("skipped_steps"), list):
        return False
    return all(name in value for name in ("chain", "num_steps", "num_samples", "num_tokens"))
