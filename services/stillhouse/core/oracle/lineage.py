"""The one lineage that counts, walked by the oracle's own code, and whether every epoch continued it by the rule.

An epoch rests on its own work, on the journals it replays, and on what lies behind the checkpoint it opened from. It
must open from the past of the highest epoch before it that did work; what an older epoch wrote after that one had
opened is on no lineage.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from stillhouse.core.oracle.read import Base, Checkpoint, Epoch
from stillhouse.core.oracle.report import Report


@dataclass
class Lineage:
    """What the weights of an epoch rest on."""

    head: int
    """The epoch."""
    steps: dict[int, int] = field(default_factory=dict)
    """Step -> epoch of its journal."""
    checkpoints: list[Checkpoint] = field(default_factory=list)
    """Those on it that lie on disk, oldest first."""
    epochs: set[int] = field(default_factory=set)
    """Epochs whose work may be on it."""
    limits: dict[int, int | None] = field(default_factory=dict)
    """Epoch on the way back -> step up to which its work counts; None = all of it."""
    is_cut: bool = False
    """An opened.json on the way back does not verify: what lies before is unknown."""

    @property
    def num_steps(self) -> int:
        return max(self.steps, default=-1) + 1

    @property
    def first_step(self) -> int:
        """First step that must be there: 0, or where the known part begins."""
        if not self.is_cut:
            return 0
        return self.checkpoints[0].step if self.checkpoints else min(self.steps, default=0)


def working_epochs(epochs: dict[int, Epoch]) -> list[int]:
    """Epochs that did work, highest first."""
    return [number for number in sorted(epochs, reverse=True) if epochs[number].is_opened]


def lineage_of(epochs: dict[int, Epoch], head: int) -> Lineage:
    """Walk back from an epoch to the start of the job."""
    lineage = Lineage(head)
    if head not in epochs:
        return lineage
    number, limit, base = head, None, None
    while True:
        epoch = epochs.get(number) or Epoch(number)
        lineage.limits[number] = limit
        lineage.epochs.add(number)
        lineage.checkpoints[:0] = [c for c in epoch.checkpoints if _counts(c, limit, base)]
        for step in epoch.journals:
            if limit is None or step < limit:
                lineage.steps.setdefault(step, number)
        for step, source in epoch.replay.items():
            if limit is None or step < limit:
                lineage.steps.setdefault(step, source)
        base = epoch.base
        if not epoch.is_readable or (base is not None and base.epoch >= number):
            lineage.is_cut = True
            break
        if base is None:
            break
        limit = base.step if limit is None else min(limit, base.step)
        number = base.epoch
    lineage.epochs |= _mentioned(epochs, lineage.epochs | set(lineage.steps.values()))
    return lineage


def _counts(checkpoint: Checkpoint, limit: int | None, base: Base | None) -> bool:
    if limit is None:
        return True
    return checkpoint.step < limit or (base is not None and checkpoint.name == base.name)


def _mentioned(epochs: dict[int, Epoch], start: set[int]) -> set[int]:
    """Epochs that the openings of some epochs name, and theirs: a replayed sample may be as old as those."""
    found: set[int] = set()
    left = set(start)
    while left:
        number = left.pop()
        found.add(number)
        epoch = epochs.get(number)
        if epoch is not None:
            named = set(epoch.replay.values()) | ({epoch.base.epoch} if epoch.base else set())
            left |= named - found
    return found


def check_openings(epochs: dict[int, Epoch], head: int, report: Report) -> None:
    """Every epoch opened from the past of the one before it."""
    for number, epoch in epochs.items():
        report.counts["epochs"] += 1
        if not epoch.is_opened:
            if epoch.journals or epoch.checkpoints:
                report.violate("lineage", f"epoch {number} holds work and has no opened.json", epoch=number)
        elif epoch.damage:
            on_way = number in lineage_of(epochs, head).limits
            say = report.violate if on_way else report.damaged
            say("lineage", f"epoch {number}: {epoch.damage}", epoch=number)
        else:
            _check_opening(epochs, epoch, report)


def _check_opening(epochs: dict[int, Epoch], epoch: Epoch, report: Report) -> None:
    number = epoch.number
    first = epoch.base.step if epoch.base else 0
    if epoch.replay_order != list(range(first, first + len(epoch.replay_order))):
        message = f"epoch {number} opened at step {first} and replays steps {epoch.replay_order}: not one unbroken run"
        report.violate("lineage", message, epoch=number)
    if early := sorted(step for step in epoch.journals if step < first):
        report.violate(
            "lineage", f"epoch {number} opened at step {first} and has a journal of step {early[0]}", epoch=number
        )
    for candidate in working_epochs(epochs):
        # an epoch that was made first and opened later did no work when this one opened
        if candidate >= number or epochs[candidate].opened_at > epoch.opened_at:
            continue
        if _continues(epochs, epoch, candidate, report):
            return
    if epoch.base is not None or epoch.replay:
        what = f"checkpoint {epoch.base.name} of epoch {epoch.base.epoch}" if epoch.base else "replayed journals"
        message = (
            f"epoch {number} opened from {what}, on which no earlier epoch rests: "
            "work that an older epoch did after a newer one had opened, or that never was"
        )
        report.violate("lineage", message, epoch=number)


def _continues(epochs: dict[int, Epoch], epoch: Epoch, candidate: int, report: Report) -> bool:
    """Whether the question is settled: the epoch opened from the candidate's past, or wrongly did not.

    Only a candidate whose own way back is damaged may be passed over.
    """
    past = lineage_of(epochs, candidate)
    base = epoch.base
    if base is None:
        is_behind = not past.is_cut
    else:
        limit = past.limits.get(base.epoch, -1)
        is_behind = limit is None or base.step <= limit
    if not is_behind:
        if past.is_cut:
            return False
        named = f"checkpoint {base.name} of epoch {base.epoch}" if base else "the start of the job"
        message = f"epoch {epoch.number} opened from {named}, which is not in the past of epoch {candidate} before it"
        report.violate("lineage", message, epoch=epoch.number)
        return True
    for step, source in epoch.replay.items():
        sources = {past.steps.get(step), epochs[candidate].replay.get(step)}
        if source not in sources:
            message = (
                f"epoch {epoch.number} replays step {step} of epoch {source}, on which epoch {candidate} does not rest"
            )
            report.violate("lineage", message, epoch=epoch.number, step=step)
    return True
