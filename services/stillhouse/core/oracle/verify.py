"""The oracle: reads what a job left, and says whether every promise held. Knows nothing of the code that wrote it.

It walks the lineage, the journals and the checkpoints by its own code: a mistake in the trainer's must not hide itself.
What a file cannot show is not seen: an entry that was lost in a queue and sampled again, or a job that never came.

    verify_job(artifacts, record) -> Report     report.ok, report.violations, report.as_json()
"""

from __future__ import annotations

from dataclasses import replace

from pydantic import ValidationError

from stillhouse.core.blobs import JobArtifacts, unsealed
from stillhouse.core.errors import CorruptError
from stillhouse.core.oracle.checkpoints import CheckpointChecks
from stillhouse.core.oracle.ends import EndChecks
from stillhouse.core.oracle.identity import Identity, identity
from stillhouse.core.oracle.lineage import Lineage, check_openings, lineage_of, working_epochs
from stillhouse.core.oracle.read import Epoch, read_epochs, read_journal
from stillhouse.core.oracle.report import Report
from stillhouse.core.oracle.stages import Plan
from stillhouse.core.oracle.steps import StepChecks
from stillhouse.core.queue.jobs import JobRecord
from stillhouse.core.spec import JobSpec


def verify_job(artifacts: JobArtifacts, record: JobRecord | None = None, *, deep: bool = True) -> Report:
    """Check one job; reads only, and works while it runs.

    `record` is what the queue server says of it. `deep` hashes every file of every checkpoint and looks for numbers
    that are not finite; without it only journals and manifests are hashed.

    Raises:
        NotFoundError: there is no job.json: no such job was accepted.
    """
    report = Report(artifacts.root.name)
    try:
        document = unsealed(artifacts.job_json)
        spec = JobSpec.model_validate(document["spec"])
        who = identity(document)
    except (CorruptError, KeyError, ValidationError) as error:
        report.violate("spec", f"{artifacts.job_json}: {error}")
        return report
    if who.job_id != artifacts.root.name:
        report.violate("spec", f"{artifacts.job_json} is of job {who.job_id}")
        who = replace(who, job_id=artifacts.root.name)
    if who.note:
        report.notes.append(who.note)
    _verify(artifacts, spec, record, report, who, deep=deep)
    return report


def _verify(
    artifacts: JobArtifacts, spec: JobSpec, record: JobRecord | None, report: Report, who: Identity, *, deep: bool
) -> None:
    epochs = read_epochs(artifacts)
    head = next(iter(working_epochs(epochs)), 0)
    lineage = lineage_of(epochs, head)
    report.epoch = head
    check_openings(epochs, head, report)
    plan = Plan(artifacts, spec, report)
    checkpoints = CheckpointChecks(artifacts, spec, plan, lineage, report, who, deep=deep)
    checkpoints.read(epochs)
    steps = StepChecks(artifacts, spec, plan, lineage, report, who)
    steps.run(checkpoints.ledgers())
    checkpoints.check(epochs, steps.sums)
    _read_others(artifacts, epochs, lineage, report)
    ends = EndChecks(artifacts, spec, lineage, epochs, record, report)
    report.status = str(ends.end.get("status") or "")
    if not report.status:
        report.notes.append("neither record nor final.json: whether the job ended is not known")
    elif record is None:
        report.notes.append("without the live record, final.json is taken at its word")
    committed = [checkpoint.step for checkpoint in lineage.checkpoints]
    ends.check(committed[-1] if committed else 0, deep=deep)


def _read_others(artifacts: JobArtifacts, epochs: dict[int, Epoch], lineage: Lineage, report: Report) -> None:
    """Journals that are on no lineage: nothing rests on them, so they only have to be told."""
    for epoch in epochs.values():
        for step in sorted(epoch.journals):
            if lineage.steps.get(step) == epoch.number:
                continue
            report.counts["journals_discarded"] += 1
            try:
                read_journal(artifacts.journal(epoch.number, step))
            except CorruptError as error:
                report.damaged("journal", error.message, epoch=epoch.number, step=step)


__all__ = ["Report", "verify_job"]
