"""Which step, group and row belong to which stage of a job: counted here from the spec alone, by code of its own."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction

from stillhouse.core.blobs import JobArtifacts
from stillhouse.core.oracle.report import Report
from stillhouse.core.spec import JobSpec, StageSpec


@dataclass
class Rows:
    """Which row of the data is group g, as far as the data is known: a permutation of all rows in every pass, or with a
    mix of each domain's rows in passes of their own; within a step the rows of one teacher together, every other step
    the other way round.
    """

    teachers: list[list[str]] | None
    """Teachers of each row, the heaviest first; None = unknown."""
    seed: int | str
    """Of the stage: the job's for the first, "seed/stage/INDEX" for the others."""
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
            self._step = (step, sorted(drawn, key=self._domain_of, reverse=step % 2 == 1))
        return self._step[1][position]

    def pools(self, num_groups: int) -> list[tuple[list[int], int]]:
        """Rows that share their passes, and how many of the first groups are theirs."""
        if self.mix is None:
            return [(self._rows_of(""), num_groups)]
        drawn = Counter(self._turn(group)[0] for group in range(num_groups))
        return [(self._rows_of(domain), drawn[domain]) for domain in self.mix]

    def teachers_of(self, row: int) -> list[str] | None:
        """None = unknown."""
        return self.teachers[row] if self.teachers and row < len(self.teachers) else None

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
        return [row for row in range(self.number) if domain in ("", self._domain_of(row))]

    def _domain_of(self, row: int) -> str:
        """Its teacher, of a mixture the heaviest."""
        return "".join((self.teachers or [])[row][:1])

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


@dataclass(frozen=True)
class StagePlan:
    """What a stage should have done."""

    index: int
    spec: StageSpec
    first_step: int
    first_group: int
    rows: Rows

    @property
    def stop_step(self) -> int:
        return self.first_step + self.spec.schedule.steps

    @property
    def per_step(self) -> int:
        return self.spec.schedule.prompts_per_step

    def groups(self, step: int) -> range:
        """What a step consumes."""
        first = self.first_group + (step - self.first_step) * self.per_step
        return range(first, first + self.per_step)

    def row(self, group: int) -> int | None:
        """Row of a group; None = unknown."""
        return self.rows.row(group - self.first_group)


class Plan:
    """All stages of a job."""

    def __init__(self, artifacts: JobArtifacts, spec: JobSpec, report: Report) -> None:
        self.stages: list[StagePlan] = []
        step = group = 0
        for index, stage in enumerate(spec.stages):
            seed = str(spec.seed) if index == 0 else f"{spec.seed}/stage/{index}"
            teachers = row_teachers(artifacts, spec, stage, report)
            rows = Rows(teachers, seed, stage.data.shuffle, stage.schedule.prompts_per_step, stage.data.mix)
            self.stages.append(StagePlan(index, stage, step, group, rows))
            step += stage.schedule.steps
            group += stage.schedule.steps * stage.schedule.prompts_per_step

    def at(self, step: int) -> StagePlan:
        """The stage of a step; after the end the last."""
        begun = [stage for stage in self.stages if stage.first_step <= step]
        return begun[-1]

    def ends(self) -> list[int]:
        """Steps with which stages end."""
        return [stage.stop_step for stage in self.stages]


def row_teachers(artifacts: JobArtifacts, spec: JobSpec, stage: StageSpec, report: Report) -> list[list[str]] | None:
    """The teachers of each row of a stage's data, the heaviest first; None if its file is gone."""
    data = stage.data
    if data.rows is not None:
        return [_heaviest_first(row.teacher, spec) for row in data.rows]
    path = artifacts.root.parent.parent / "files" / f"{data.file}.jsonl"
    if not path.is_file():
        report.notes.append(f"the uploaded file {data.file} is gone: rows and coverage are not checked")
        return None
    with path.open("rb") as stream:
        return [_heaviest_first(json.loads(line).get("teacher"), spec) for line in stream if line.strip()]


def _heaviest_first(teacher: str | dict[str, float] | None, spec: JobSpec) -> list[str]:
    """The teachers that a row names, or the job's only one."""
    if isinstance(teacher, dict):
        return sorted(teacher, key=lambda name: (-teacher[name], name))
    return [teacher] if teacher else list(spec.teachers)[:1]
