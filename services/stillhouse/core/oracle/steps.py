"""The journals of the lineage, step by step: what was planned, what ended, and the chain over what was trained."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import xxhash

from stillhouse.core.blobs import JobArtifacts
from stillhouse.core.errors import CorruptError
from stillhouse.core.oracle.identity import Identity
from stillhouse.core.oracle.lineage import Lineage
from stillhouse.core.oracle.read import read_journal
from stillhouse.core.oracle.report import Report
from stillhouse.core.oracle.samples import SampleCheck
from stillhouse.core.oracle.stages import Plan, StagePlan
from stillhouse.core.rollouts import scores_of
from stillhouse.core.spec import JobSpec
from stillhouse.v1 import journal_pb2, rollout_pb2


@dataclass
class Sums:
    """The ledger, computed again from the journals: see trainer/ledger.py for the chain."""

    chain: str = ""
    num_steps: int = 0
    num_samples: int = 0
    num_tokens: int = 0

    def add(self, step: int, scores: list[rollout_pb2.Score]) -> None:
        """Note the scored samples of a step, in the order of the journal."""
        digest = hashlib.sha256(f"{self.chain} {step}\n".encode())
        for score in scores:
            ids = score.rollout.completion_ids
            digest.update(f"{score.rollout.sample_id} {xxhash.xxh3_128_hexdigest(ids.data)}\n".encode())
            self.num_samples += 1
            self.num_tokens += len(ids.data) // 4
        self.chain = digest.hexdigest()
        self.num_steps += 1

    def facts(self) -> dict[str, Any]:
        return {
            "chain": self.chain,
            "num_steps": self.num_steps,
            "num_samples": self.num_samples,
            "num_tokens": self.num_tokens,
        }


class StepChecks:
    """Goes through the steps of a lineage in order."""

    def __init__(
        self, artifacts: JobArtifacts, spec: JobSpec, plan: Plan, lineage: Lineage, report: Report, who: Identity
    ) -> None:
        self._artifacts = artifacts
        self._plan = plan
        self._lineage = lineage
        self._report = report
        self._who = who
        self._seen_rows: dict[int, Counter[int]] = {stage.index: Counter() for stage in plan.stages}
        """By stage."""
        self._ended: set[str] = set()
        self._samples = [SampleCheck(spec, stage, lineage, report) for stage in plan.stages]
        self.sums: dict[int, Sums | None] = {}
        """Steps behind the weights -> the ledger they must carry; None = a journal before is not readable."""

    def run(self, restart: dict[int, dict[str, Any]]) -> None:
        """Check every step; `restart` = ledgers by step to go on from where a journal is not readable."""
        first, end = self._lineage.first_step, self._lineage.num_steps
        sums = Sums() if first == 0 else _from_ledger(restart.get(first))
        self.sums[first] = _copy(sums)
        for step in range(first, end):
            scores = self._read(step)
            if scores is None:
                sums = _from_ledger(restart.get(step + 1))
            else:
                scored = [score for score in scores if score.WhichOneof("result") not in (None, "failed")]
                if sums is not None:
                    sums.add(step, scored)
                self._count(scores, scored)
            self.sums[step + 1] = _copy(sums)
        for stage in self._plan.stages:
            self._check_coverage(stage, first, end)

    def _count(self, scores: list[rollout_pb2.Score], scored: list[rollout_pb2.Score]) -> None:
        self._report.counts["steps"] += 1
        self._report.counts["samples_trained"] += len(scored)
        self._report.counts["samples_failed"] += len(scores) - len(scored)
        self._report.counts["tokens"] += sum(len(score.rollout.completion_ids.data) // 4 for score in scored)

    def _read(self, step: int) -> list[rollout_pb2.Score] | None:
        """The scores of a step after all checks of them; None if its journal is not readable."""
        epoch = self._lineage.steps.get(step)
        if epoch is None:
            message = f"step {step} has no journal, and steps up to {self._lineage.num_steps - 1} do"
            self._report.violate("journal", message, step=step)
            return None
        path = self._artifacts.journal(epoch, step)
        try:
            header, scores = read_journal(path)
        except CorruptError as error:
            self._report.violate("journal", error.message, epoch=epoch, step=step)
            return None
        self._report.counts["journals"] += 1
        self._report.counts["bytes_hashed"] += path.stat().st_size
        self._check_header(header, epoch, step)
        self._check_samples(scores, epoch, step)
        self._check_batches(header, scores, epoch, step)
        return scores

    def _check_header(self, header: journal_pb2.StepHeader, epoch: int, step: int) -> None:
        where: dict[str, Any] = {"epoch": epoch, "step": step}
        is_ours = self._who.may_be_of(header.job_id, epoch)
        if not is_ours or (header.epoch, header.step) != (epoch, step):
            found = (header.job_id, header.epoch, header.step)
            message = f"the journal of step {step} in epoch {epoch} says it is {found}, of job {self._who.job_id}"
            self._report.violate("journal", message, **where)
        stage = self._plan.at(step)
        if header.stage != stage.index:
            message = f"the journal of step {step} says it is of stage {header.stage}, it is of stage {stage.index}"
            self._report.violate("stage", message, **where)
        expected = list(stage.groups(step))
        if list(header.groups) != expected:
            message = f"step {step} consumed groups {_short(header.groups)}, planned were {_short(expected)}"
            self._report.violate("prefix", message, **where)
        if header.next_group != expected[-1] + 1:
            message = f"step {step} says that group {header.next_group} is next, it is {expected[-1] + 1}"
            self._report.violate("prefix", message, **where)

    def _check_samples(self, scores: list[rollout_pb2.Score], epoch: int, step: int) -> None:
        where: dict[str, Any] = {"epoch": epoch, "step": step}
        stage = self._plan.at(step)
        size = stage.spec.schedule.group_size
        expected = [f"{group}/{index}" for group in stage.groups(step) for index in range(size)]
        found = [score.rollout.sample_id for score in scores]
        twice = sorted(name for name, number in Counter(found).items() if number > 1)
        twice += sorted(self._ended.intersection(found) - set(twice))
        for name in twice:
            message = f"sample {name} ended more than once; the last time in step {step} of epoch {epoch}"
            self._report.violate("duplicate", message, sample=name, **where)
        self._ended.update(found)
        if lost := [name for name in expected if name not in set(found)]:
            message = f"step {step}: {len(lost)} planned samples never ended: {_short(lost)}"
            self._report.violate("complete", message, sample=lost[0], **where)
        if strange := [name for name in found if name not in set(expected)]:
            message = f"step {step}: {len(strange)} samples that were not planned for it: {_short(strange)}"
            self._report.violate("complete", message, sample=strange[0], **where)
        if not lost and not strange and not twice and found != expected:
            self._report.violate("prefix", f"step {step}: samples in the order {_short(found)}", **where)
        rows = {}
        for score in scores:
            self._samples[stage.index].check(score, epoch, step)
            rows[score.rollout.group] = score.rollout.row
        self._seen_rows[stage.index].update(rows.values())

    def _check_batches(
        self, header: journal_pb2.StepHeader, scores: list[rollout_pb2.Score], epoch: int, step: int
    ) -> None:
        planned = Counter((name, batch.teacher) for batch in header.micro_batches for name in batch.sample_ids)
        every = {score.rollout.sample_id for score in scores}
        scored = {
            (score.rollout.sample_id, each.rollout.teacher)
            for score in scores
            if score.WhichOneof("result") not in (None, "failed")
            for each in scores_of(score)
        }
        # a sample that failed when it was scored again stays in the plan, and the learner leaves it out
        wrong = [each for each in planned if planned[each] > 1 or each[0] not in every]
        wrong += sorted(scored - planned.keys())
        if wrong:
            name, teacher = wrong[0]
            message = f"step {step}: the micro-batches of teacher '{teacher}' hold {name} {planned[wrong[0]]} times"
            self._report.violate("plan", message, epoch=epoch, step=step, sample=name)

    def _check_coverage(self, stage: StagePlan, first: int, end: int) -> None:
        """Whole passes over the data of a stage take every row equally often."""
        seen, steps = self._seen_rows[stage.index], min(end, stage.stop_step) - stage.first_step
        if not stage.rows.number or first > stage.first_step or steps <= 0:
            return
        for rows, drawn in stage.rows.pools(steps * stage.per_step):
            turns, rest = divmod(drawn, len(rows))
            wrong = [row for row in rows if not turns <= seen[row] <= turns + (1 if rest else 0)]
            if wrong:
                message = (
                    f"{turns} passes over {len(rows)} rows: {len(wrong)} rows were not taken {turns} times, "
                    f"row {wrong[0]} was taken {seen[wrong[0]]} times"
                )
                self._report.violate("coverage", message)


def _from_ledger(ledger: dict[str, Any] | None) -> Sums | None:
    """Go on from what a checkpoint says is behind it."""
    if ledger is None:
        return None
    return Sums(**{name: ledger[name] for name in ("chain", "num_steps", "num_samples", "num_tokens")})


def _copy(sums: Sums | None) -> Sums | None:
    return None if sums is None else Sums(**sums.facts())


def _short(values: Any) -> str:
    items = list(values)
    shown = ", ".join(str(item) for item in items[:6])
    return f"[{shown}{', ...' if len(items) > 6 else ''}]"


def spec_sha256(spec: JobSpec) -> str:
    """Hash of a spec as checkpoints name it."""
    return hashlib.sha256(json.dumps(spec.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()
