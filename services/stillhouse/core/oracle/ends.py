"""How the job went and ended: its states, its end, what it says it trained, and what it left behind."""

from __future__ import annotations

import json
import math
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

from stillhouse.core.blobs import JobArtifacts, read_jsonl, unsealed
from stillhouse.core.errors import CorruptError, NotFoundError
from stillhouse.core.evaluations import read_evaluations, read_stop, stopping
from stillhouse.core.oracle.checkpoints import check_export
from stillhouse.core.oracle.lineage import Lineage, lineage_of, working_epochs
from stillhouse.core.oracle.read import Epoch, read_document, read_journal
from stillhouse.core.oracle.report import Report
from stillhouse.core.queue.jobs import FINAL_FIELDS, STATUSES, TERMINAL, JobRecord
from stillhouse.core.spec import JobSpec

LED: Final = ("validating", "starting", "running")
"""States that a trainer walks through in this order under one claim."""


class EndChecks:
    """Checks the history of a job against its lineage."""

    def __init__(
        self,
        artifacts: JobArtifacts,
        spec: JobSpec,
        lineage: Lineage,
        epochs: dict[int, Epoch],
        record: JobRecord | None,
        report: Report,
    ) -> None:
        self._artifacts = artifacts
        self._spec = spec
        self._lineage = lineage
        self._epochs = epochs
        self._record = record
        self._report = report
        self._final = self._read_final()
        self.end = self._end()

    def _read_final(self) -> dict[str, Any] | None:
        try:
            return unsealed(self._artifacts.root / "final.json")
        except NotFoundError:
            return None
        except CorruptError as error:
            self._report.violate("final", error.message)
            return None

    def _end(self) -> dict[str, Any]:
        """The fields of the job's end, or of its present state; {} = nothing says."""
        if self._record is not None:
            return {name: getattr(self._record, name) for name in FINAL_FIELDS}
        return self._final or {}

    def check(self, committed_step: int, *, deep: bool) -> None:
        """Everything; `committed_step` = newest checkpoint of the lineage."""
        self._check_final()
        self._check_events()
        status = self.end.get("status", "")
        if status == "succeeded":
            self._check_success(committed_step, deep=deep)
        elif status == "failed":
            error = self.end.get("error") or {}
            if not (error.get("code") and error.get("message")):
                self._report.violate("reason", f"the job failed, and nothing says why: error is {error!r}")
        if status in TERMINAL:
            self._check_leftovers()
            if self._lineage.head > _number(self.end.get("epoch")):
                epoch = self.end.get("epoch")
                message = f"the job ended '{status}' in epoch {epoch}, and epoch {self._lineage.head} has opened"
                self._report.violate("final", message, epoch=self._lineage.head)
        self._check_record(committed_step)
        self._check_trained()
        self._check_evaluations()

    # -- the end -----------------------------------------------------------------------------------------------------

    def _check_final(self) -> None:
        if self._final is None:
            return
        missing = [name for name in FINAL_FIELDS if name not in self._final]
        status = self._final.get("status")
        if missing or status not in TERMINAL:
            self._report.violate("final", f"final.json says status {status!r} and lacks {missing}")
        if self._record is None:
            return
        for name in FINAL_FIELDS:
            mine, theirs = self._final.get(name), getattr(self._record, name)
            if json.dumps(mine, sort_keys=True) != json.dumps(theirs, sort_keys=True):
                self._report.violate("final", f"{name}: final.json says {mine!r}, the record {theirs!r}")

    def _check_success(self, committed_step: int, *, deep: bool) -> None:
        stop_step = self._stop_step()
        facts = {
            "steps journalled": self._lineage.num_steps,
            "newest checkpoint": committed_step,
            "committed_step of the end": self.end.get("committed_step"),
            "step of the end": self.end.get("step"),
        }
        for name, value in facts.items():
            if value != stop_step:
                self._report.violate("success", f"the job succeeded with {name} = {value}, its end is step {stop_step}")
        if self._spec.evaluation.data is not None:
            self._check_measured(stop_step)
        if self.end.get("error"):
            self._report.violate("success", f"the job succeeded, and carries the error {self.end['error']!r}")
        exported = (self.end.get("result") or {}).get("exported_step", stop_step)
        if exported != stop_step and self._spec.checkpoint.export == "last":
            self._report.violate("export", f"step {exported} was exported, the job ended at {stop_step}", step=exported)
        check_export(self._artifacts, self._spec, self._lineage, (exported, stop_step), self._report, deep=deep)

    def _stop_step(self) -> int:
        """Steps of the job: as planned, or fewer if its evaluations said so, and that was recorded."""
        planned = self._spec.stop_step()
        try:
            stop = read_stop(self._artifacts)
        except CorruptError as error:
            self._report.violate("final", error.message)
            return planned
        if stop is None:
            return planned
        before = [each for each in read_evaluations(self._artifacts) if each["step"] <= stop["step"]]
        if stopping(self._spec, before) is None:
            message = (
                f"the job was ended at step {stop['stop_step']}, and the evaluations up to {stop['step']} do not say so"
            )
            self._report.violate("final", message, step=stop["step"])
        if not stop["step"] < stop["stop_step"] < planned:
            message = (
                f"stop.json ends the job at step {stop['stop_step']} of {planned} by step {stop['step']}'s evaluation"
            )
            self._report.violate("final", message, step=stop["step"])
        return min(planned, stop["stop_step"])

    def _check_measured(self, stop_step: int) -> None:
        """The held-out prompts were measured before the first step, after the last of each stage, and when due between:
        each step once, also if its trainer died meanwhile."""
        every = self._spec.evaluation.every_steps
        due = {0, stop_step, *accumulate(stage.schedule.steps for stage in self._spec.stages)}
        due |= set(range(0, stop_step, every) if every else ())
        for step in sorted(step for step in due if step <= stop_step):
            if not (path := self._artifacts.evaluations / f"{step:08d}.json").is_file():
                self._report.violate("success", f"the job succeeded, and {path} is missing", step=step)

    def _check_record(self, committed_step: int) -> None:
        """What the end or the record says was done is there, unless a damaged file explains its loss."""
        if self._report.damage or self._lineage.is_cut or self._report.broken_rules() & {"journal", "checkpoint"}:
            return
        said = _number(self.end.get("committed_step"))
        # a deterministic claim may open from an older checkpoint, and replays what lies between
        is_replayed = self._spec.deterministic and said <= self._lineage.num_steps
        if said > committed_step and not is_replayed:
            message = f"checkpoint {said} was committed, the newest on the lineage is {committed_step}"
            self._report.violate("retention", message, step=said)
        said = _number(self.end.get("step"))
        if said > self._lineage.num_steps:
            message = f"{said} steps were trained, the lineage has journals of {self._lineage.num_steps}"
            self._report.violate("trained", message, step=said)

    # -- history -----------------------------------------------------------------------------------------------------

    def _check_events(self) -> None:
        end = ""
        walk = _Walk(self._report)
        for event in read_jsonl(self._artifacts.events):
            data = event.get("data")
            if not isinstance(data, dict):
                continue  # a history may lose its last second; a flipped bit in it proves nothing
            if event.get("type") == "job.rewound":
                self._check_rewound(data)
            if event.get("type") != "job.status":
                continue
            self._report.counts["status_events"] += 1
            status, epoch = data.get("status"), _number(data.get("epoch"))
            if status not in STATUSES:
                self._report.violate("status", f"a state named {status!r}")
            elif status in TERMINAL:
                if end:
                    self._report.violate("status", f"the job ended '{end}' and then '{status}'")
                end = status
            elif status in LED and end and epoch >= _number(self.end.get("epoch")):
                # an older epoch's word may come late: whoever said it was stopped by the fence
                self._report.violate("status", f"the job ended '{end}' and was '{status}' afterwards", epoch=epoch)
            walk.step(epoch, status)
        said = self.end.get("status")
        if end and said and end != said:
            self._report.violate("status", f"the events say the job ended '{end}', it is '{said}'")
        # whoever says "succeeded" has written final.json before
        if end == "succeeded" and not (self._artifacts.root / "final.json").exists():
            self._report.violate("final", "the events say the job succeeded, and there is no final.json")

    def _check_rewound(self, data: dict[str, Any]) -> None:
        """A takeover may fall behind what was trained only if a file of those steps is damaged."""
        was, now, epoch = (_number(data.get(name)) for name in ("from", "to", "epoch"))
        if now >= was or self._report.damage or self._lineage.is_cut:
            return
        before = next((number for number in working_epochs(self._epochs) if number < epoch), None)
        past = lineage_of(self._epochs, before) if before is not None else None
        for step in range(now, was):
            source = past.steps.get(step) if past is not None else None
            if source is None:
                message = f"epoch {epoch} continued at step {now} of {was}: step {step} was trained without a journal"
                self._report.violate("trained", message, epoch=epoch, step=step)
                return
            try:
                read_journal(self._artifacts.journal(source, step))
            except CorruptError as error:
                self._report.damaged("journal", error.message, epoch=source, step=step)
                return
        message = f"epoch {epoch} continued at step {now} of {was}, although the journals of those steps are there"
        self._report.violate("lineage", message, epoch=epoch, step=now)

    def _check_trained(self) -> None:
        """A metric of a step says that it was trained: its journal was durable before."""
        pasts: dict[int, Lineage] = {}
        for point in read_jsonl(self._artifacts.metrics):
            try:
                epoch, step = int(point["epoch"]), int(point["step"]) - 1
            except (KeyError, TypeError, ValueError):
                self._report.damaged("trained", f"a line of metrics.jsonl is no metric: {str(point)[:80]}")
                continue
            self._report.counts["metrics"] += 1
            past = pasts.get(epoch) or pasts.setdefault(epoch, lineage_of(self._epochs, epoch))
            if step not in past.steps and not past.is_cut:
                message = f"epoch {epoch} trained step {step}, and no journal holds what on"
                self._report.violate("trained", message, epoch=epoch, step=step)

    def _check_evaluations(self) -> None:
        for path in sorted(self._artifacts.evaluations.glob("*.json")):
            self._report.counts["evaluations"] += 1
            try:
                document = read_document(path)
            except (CorruptError, NotFoundError) as error:
                self._report.damaged("values", error.message)
                continue
            bad = [name for name, value in document.items() if isinstance(value, float) and not math.isfinite(value)]
            if bad:
                self._report.violate("values", f"{path}: {bad[0]} is {document[bad[0]]}")

    # -- leftovers ---------------------------------------------------------------------------------------------------

    def _check_leftovers(self) -> None:
        """Temporary files older than the end; a younger one may be of a write that is going on."""
        ended = self.end.get("finished_at")
        for path in sorted(self._artifacts.root.rglob("*")):
            if is_temporary(path) and ended is not None:
                try:
                    is_old = path.stat().st_mtime <= float(ended)
                except OSError:
                    continue
                if is_old:
                    self._report.violate("leftovers", f"{path} is left over; the job has ended")


def _number(value: Any) -> int:
    """A count in an event; 0 if it is none."""
    return value if isinstance(value, int) else 0


class _Walk:
    """The states that a trainer announces under one claim: never back, except from a stall. It may say one twice."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._last: dict[int, str] = {}
        self._stalled: set[int] = set()

    def step(self, epoch: int, status: Any) -> None:
        if status == "stalled":
            self._stalled.add(epoch)
        if status not in LED:
            return
        last = self._last.get(epoch)
        if last is not None and LED.index(status) < LED.index(last) and epoch not in self._stalled:
            self._report.violate("status", f"'{status}' came after '{last}' in epoch {epoch}", epoch=epoch)
        self._last[epoch] = status


def is_temporary(path: Path) -> bool:
    """A file or folder in the making, as core/blobs.py names them; what lies in such a folder is not counted again."""
    return path.name.startswith("tmp.") or (path.name.startswith(".") and path.name.endswith(".tmp"))
