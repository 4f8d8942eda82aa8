"""What the oracle says of a job."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, Final

RULES: Final[dict[str, str]] = {
    "spec": "job.json holds a spec that this program accepts",
    "lineage": "every epoch continues the past of the epoch before it; no work of a closed epoch is built upon",
    "journal": "every step of the lineage has one journal, and it verifies",
    "prefix": "each step consumes exactly its groups, in order: P of its stage, after those of the steps before",
    "stage": "a step is of its stage: by its journal, by what wrote its samples, by the checkpoint after it; a stage "
    "ends with a checkpoint",
    "complete": "every planned sample ended: scored, or failed",
    "duplicate": "no sample ended twice",
    "reason": "a failure says why",
    "plan": "the micro-batches of a step hold each scored sample once for each of its teachers",
    "seed": "a sample's seed follows from the job's seed, its group and its index",
    "rows": "a group's prompt is the row that the seeded order gives",
    "origin": "a text is whose the job's seed says; only the student's own have a policy version and log-probabilities",
    "kind": "a score is of the kind that the loss asks for",
    "teachers": "each teacher that a sample's row names has said its word on it, once, and no other has",
    "reward": "where the loss asks for an outcome reward, every scored sample has one, from 0 to 1",
    "coverage": "each pass over the data takes every row once",
    "spans": "every token has a policy version, of an epoch on the lineage, and versions never go back",
    "staleness": "a sample is trained at most max_staleness versions after the weights that began it",
    "weights": "a policy version names the same weights everywhere",
    "values": "lengths agree, numbers are finite, log-probabilities are at most 0",
    "ledger": "each scored sample was trained exactly once: the chain beside the weights equals the journals'",
    "trained": "nothing was trained before its journal was durable",
    "versions": "checkpoints follow one another, each named by the next as its parent",
    "checkpoint": "the checkpoints that a recovery needs verify by hash",
    "retention": "clean-up left every checkpoint that a recovery needs",
    "non_finite": "no checkpoint and no export holds NaN or infinity",
    "status": "the job's states follow one another as allowed; an end is final",
    "success": "succeeded means: every step committed, and the student exported",
    "export": "the exported weights are the committed ones",
    "final": "final.json and the record say the same",
    "leftovers": "a finished job leaves no temporary files",
}
"""Rule -> what holds if it is not broken."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it must be."""

    rule: str
    """Key of RULES."""
    message: str
    """Names the objects and both sides."""
    epoch: int | None = None
    step: int | None = None
    sample: str = ""
    """Sample id, where it is about one."""


@dataclass
class Report:
    """The answer of `verify_job`."""

    job_id: str
    status: str = ""
    """As the record or final.json says; empty = neither exists."""
    epoch: int = 0
    """The epoch whose lineage was checked: the highest that did work."""
    violations: list[Finding] = field(default_factory=list)
    damage: list[Finding] = field(default_factory=list)
    """Files that do not verify, and on which nothing rests."""
    notes: list[str] = field(default_factory=list)
    """What could not be checked, and why."""
    counts: Counter[str] = field(default_factory=Counter)
    """epochs, steps, samples_trained, samples_failed, tokens, journals, manifests, ledgers, bytes_hashed, ..."""

    @property
    def ok(self) -> bool:
        """No violation."""
        return not self.violations

    def violate(self, rule: str, message: str, **where: Any) -> None:
        """Add a violation."""
        assert rule in RULES, f"unknown rule '{rule}'"
        self.violations.append(Finding(rule, message, **where))

    def damaged(self, rule: str, message: str, **where: Any) -> None:
        """Add damage."""
        assert rule in RULES, f"unknown rule '{rule}'"
        self.damage.append(Finding(rule, message, **where))

    def broken_rules(self) -> set[str]:
        """The rules that are violated."""
        return {finding.rule for finding in self.violations}

    def as_json(self) -> dict[str, Any]:
        """For other programs."""
        return {
            "job_id": self.job_id,
            "ok": self.ok,
            "status": self.status,
            "epoch": self.epoch,
            "counts": dict(sorted(self.counts.items())),
            "violations": [asdict(finding) for finding in self.violations],
            "damage": [asdict(finding) for finding in self.damage],
            "notes": list(self.notes),
        }

    def text(self, limit: int = 20) -> str:
        """The violations in lines, for assertion messages."""
        lines = [f"{self.job_id}: {len(self.violations)} violations, {len(self.damage)} damaged files"]
        lines += [f"  [{finding.rule}] {finding.message}" for finding in self.violations[:limit]]
        return "\n".join(lines)
