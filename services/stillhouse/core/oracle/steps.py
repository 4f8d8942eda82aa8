"""The journals of the lineage, step by step: what was planned, what ended, and the chain over what was trained."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import xxhash

from stillhouse.core.blobs import JobArtifacts
from stillhouse.core.errors import CorruptError
from stillhouse.core.oracle.lineage import Lineage
from stillhouse.core.oracle.read import read_journal
from stillhouse.core.oracle.report import Report
from stillhouse.core.oracle.samples import SampleCheck
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


@dataclass
class Rows:
    """Which row of the data is group g, as far as the data is known: a permutation of all rows in every pass, or with a
    mix of each domain's rows in passes of their own; within a step the rows of one teacher together, every other step
    the other way round.
    """

    teachers: list[str] | None
    """Teacher of each row; None = unknown."""
    seed: int | str
    is_shuffled: bool
    per_step: int = 1
    mix: Mapping[str, float] | None = None
    _step: tuple[int, list[int]] = (-1, [])
    """The step that was asked for last, and its rows."""
    _orders: dict[str, tuple[int, list[int]]] = field(default_factory=dict)
    """Domain ("" = all rows) -> its newest pass and the order of that."""
    _turns: list[tuple[str, int]] = field(default_factory=list)
    """Of each group so far: its domain, and how many groups that had before."""
    _counts: Counter[str] = field(default_factory=Counter)
    """Groups that each domain has had."""

    @property
    def number(self) -> int:
        """Rows of the data; 0 = unknown."""
        return len(self.teachers or ())

    def row(self, group: int) -> int | None:
        """Row of a group; None = unknown."""
        if not self.teachers:
            return None
        step, position = divmod(group, self.per_step)
        if step != self._step[0]:
            drawn = [self._drawn(step * self.per_step + index) for index in range(self.per_step)]
            self._step = (step, sorted(drawn, key=self.teachers.__getitem__, reverse=step % 2 == 1))
        return self._step[1][position]

    def pools(self, num_groups: int) -> list[tuple[list[int], int]]:
        """Rows that share their passes, and how many of the first groups are theirs."""
        if self.mix is None:
            return [(self._rows_of(""), num_groups)]
        drawn = Counter(self._turn(group)[0] for group in range(num_groups))
        return [(self._rows_of(domain), drawn[domain]) for domain in self.mix]

    def _drawn(self, group: int) -> int:
        domain, number = ("", group) if self.mix is None else self._turn(group)
        turn, rows = self._orders.get(domain) or (-1, self._rows_of(domain))
        if number // len(rows) != turn:
            turn, rows = number // len(rows), self._rows_of(domain)
            if self.is_shuffled:
                label = f"{domain}/{turn}" if domain else f"{turn}"
                random.Random(f"{self.seed}/pass/{label}").shuffle(rows)
            self._orders[domain] = (turn, rows)
        return rows[number % len(rows)]

    def _rows_of(self, domain: str) -> list[int]:
        """Rows of a domain in the data's order; "" = all."""
        return [row for row, teacher in enumerate(self.teachers or ()) if domain in ("", teacher)]

    def _turn(self, group: int) -> tuple[str, int]:
        """The domain of a group, and how many groups that had before."""
        while len(self._turns) <= group:
            self._give_turn()
        return self._turns[group]

    def _give_turn(self) -> None:
        """To the domain that lacks most of its share of all groups up to this one; of equals to the first by name."""
        shares = {name: Fraction(str(share)) for name, share in (self.mix or {}).items()}
        due = (len(self._turns) + 1) / sum(shares.values(), Fraction())
        domain = min(shares, key=lambda name: (self._counts[name] - due * shares[name], name))
        self._turns.append((domain, self._counts[domain]))
        self._counts[domain] += 1


def row_teachers(artifacts: JobArtifacts, spec: JobSpec, report: Report) -> list[str] | None:
    """The teacher of each row of the job's data; None if its file is gone."""
    data, names = spec.stages[0].data, list(spec.teachers)
    only = names[0] if len(names) == 1 else ""  # where there is no choice, rows need not say it
    if data.rows is not None:
        return [only or row.teacher or "" for row in data.rows]
    path = artifacts.root.parent.parent / "files" / f"{data.file}.jsonl"
    if not path.is_file():
        report.notes.append(f"the uploaded file {data.file} is gone: rows and coverage are not checked")
        return None
    with path.open("rb") as stream:
        return [only or json.loads(line).get("teacher") or "" for line in stream if line.strip()]


class StepChecks:
    """Goes through the steps of a lineage in order."""

    def __init__(self, artifacts: JobArtifacts, spec: JobSpec, lineage: Lineage, report: Report, job_id: str) -> None:
        self._artifacts = artifacts
        self._spec = spec
        self._lineage = lineage
        self._report = report
        self._job_id = job_id
        schedule = spec.stages[0].schedule
        self._per_step, self._size = schedule.prompts_per_step, schedule.group_size
        teachers, data = row_teachers(artifacts, spec, report), spec.stages[0].data
        self._rows = Rows(teachers, spec.seed, data.shuffle, self._per_step, data.mix)
        self._seen_rows: Counter[int] = Counter()
        self._ended: set[str] = set()
        self._sample = SampleCheck(spec, lineage, report, self._rows)
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
        self._check_coverage(first, end)

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
        self._check_plan(header, scores, epoch, step)
        return scores

    def _check_header(self, header: journal_pb2.StepHeader, epoch: int, step: int) -> None:
        where: dict[str, Any] = {"epoch": epoch, "step": step}
        found = (header.job_id, header.epoch, header.step)
        if found != (self._job_id, epoch, step):
            message = f"the journal of step {step} in epoch {epoch} says it is {found}, of job {self._job_id}"
            self._report.violate("journal", message, **where)
        expected = list(range(step * self._per_step, (step + 1) * self._per_step))
        if list(header.groups) != expected:
            message = f"step {step} consumed groups {_short(header.groups)}, planned were {_short(expected)}"
            self._report.violate("prefix", message, **where)
        if header.next_group != expected[-1] + 1:
            message = f"step {step} says that group {header.next_group} is next, it is {expected[-1] + 1}"
            self._report.violate("prefix", message, **where)

    def _check_samples(self, scores: list[rollout_pb2.Score], epoch: int, step: int) -> None:
        where: dict[str, Any] = {"epoch": epoch, "step": step}
        groups = range(step * self._per_step, (step + 1) * self._per_step)
        expected = [f"{group}/{index}" for group in groups for index in range(self._size)]
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
            self._sample.check(score, epoch, step)
            rows[score.rollout.group] = score.rollout.row
        self._seen_rows.update(rows.values())

    def _check_plan(
        self, header: journal_pb2.StepHeader, scores: list[rollout_pb2.Score], epoch: int, step: int
    ) -> None:
        planned = Counter(name for batch in header.micro_batches for name in batch.sample_ids)
        every = {score.rollout.sample_id for score in scores}
        scored = {score.rollout.sample_id for score in scores if score.WhichOneof("result") not in (None, "failed")}
        # a sample that failed when it was scored again stays in the plan, and the learner leaves it out
        wrong = [name for name in planned if planned[name] > 1 or name not in every]
        wrong += sorted(scored - planned.keys())
        if wrong:
            message = f"step {step}: the micro-batches hold {wrong[0]} {planned[wrong[0]]} times"
            self._report.violate("plan", message, epoch=epoch, step=step, sample=wrong[0])

    def _check_coverage(self, first: int, end: int) -> None:
        """Whole passes take every row equally often."""
        if not self._rows.number or first or not end:
            return
        for rows, drawn in self._rows.pools(end * self._per_step):
            turns, rest = divmod(drawn, len(rows))
            wrong = [row for row in rows if not turns <= self._seen_rows[row] <= turns + (1 if rest else 0)]
            if wrong:
                message = (
                    f"{turns} passes over {len(rows)} rows: {len(wrong)} rows were not taken {turns} times, "
                    f"row {wrong[0]} was taken {self._seen_rows[wrong[0]]} times"
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
