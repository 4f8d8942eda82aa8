"""`stillhouse verify`: the oracle, for users. Nothing of ours is imported before it runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stillhouse.cli.options import RESULTS

if TYPE_CHECKING:
    from stillhouse.core.blobs import JobArtifacts
    from stillhouse.core.oracle.report import Finding, Report

SHOWN = 20
"""Findings that are printed; --json has all."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(rich_help_panel=RESULTS)(verify)


def verify(
    job: Annotated[str, typer.Argument(metavar="JOB", help="Id of a job, as `submit` and `jobs` print it.")],
    artifacts: Annotated[
        Path | None,
        typer.Option(
            help="Artifacts folder that holds jobs/JOB.  [default: that of this deployment]", show_default=False
        ),
    ] = None,
    is_shallow: Annotated[
        bool, typer.Option("--shallow", help="Do not hash weights or look for NaN: fast, and sees less.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for other programs.")] = False,
) -> None:
    """Check from its files that a job kept every promise: no sample lost, none trained twice, none too stale.

    Reads journals, checkpoints, events and final.json on disk and recomputes what they must say: seeds, rows, the
    chain of trained samples, hashes. Changes nothing, needs no running service, and works while the job runs.

    A violation means that the result cannot be trusted as it is. Damage is a file that does not verify and on which
    nothing rests, such as a checkpoint that was replaced after a crash. Exit code: 0 no violation, 1 violations.

    Example:  stillhouse verify job_3f9c0a12b4d5e6f70819
    """
    from stillhouse.cli.console import EXIT_FAILED, print_json
    from stillhouse.core.oracle.verify import verify_job

    report = verify_job(_folder(job, artifacts), deep=not is_shallow)
    if as_json:
        print_json(report.as_json())
    else:
        _show(report, is_deep=not is_shallow)
    if not report.ok:
        raise typer.Exit(EXIT_FAILED)


def _folder(job: str, artifacts: Path | None) -> JobArtifacts:
    """The job's folder; if there is none, the error says which jobs there are."""
    from stillhouse.cli.console import EXIT_USAGE, CliError
    from stillhouse.core.blobs import Artifacts
    from stillhouse.core.config import load_settings

    root = Artifacts(artifacts if artifacts is not None else load_settings().artifacts_dir())
    known = root.job_ids()
    if job in known:
        return root.job(job)
    if not known:
        raise CliError(
            f"no job lies in {root.root}",
            fix="name the folder with --artifacts DIR, or the deployment with STILLHOUSE_HOME",
            exit_code=EXIT_USAGE,
        )
    newest = sorted(known, key=lambda name: root.job(name).job_json.stat().st_mtime, reverse=True)[:5]
    raise CliError(
        f"no job '{job}' in {root.root}",
        fix=f"the newest jobs there are {', '.join(newest)}; `stillhouse jobs` lists them while services run",
        exit_code=EXIT_USAGE,
    )


def _show(report: Report, *, is_deep: bool) -> None:
    from stillhouse.cli.console import print_table, say, size
    from stillhouse.core.oracle.report import RULES

    counts = report.counts
    bytes_read = size(counts["bytes_hashed"])
    say(
        f"{report.job_id}: {report.status or 'not ended'}, {counts['epochs']} claims, {counts['steps']} steps, "
        f"{counts['samples_trained']} samples trained, {counts['samples_failed']} failed, {counts['tokens']} tokens"
    )
    say(
        f"read {counts['journals']} journals and {counts['manifests']} checkpoints, {bytes_read} hashed"
        + ("" if is_deep else "; weights were not read (--shallow)")
    )
    broken = report.broken_rules()
    skipped = _skipped(report, is_deep=is_deep)
    print_table(
        ("", "checked"),
        [("BROKEN" if rule in broken else "-" if rule in skipped else "ok", text) for rule, text in RULES.items()],
    )
    _list("violation", report.violations)
    _list("damaged, and nothing rests on it", report.damage)
    for note in report.notes:
        say(f"note: {note}")
    if not report.ok:
        say(f"{len(report.violations)} violations")
    elif skipped:
        say("no violation; '-' was not checked: " + ("the job did not succeed" if is_deep else "see --shallow"))
    else:
        say("every promise was kept")


def _skipped(report: Report, *, is_deep: bool) -> set[str]:
    """Rules that say nothing about this job as it is."""
    from stillhouse.core.oracle.report import RULES

    if "spec" in report.broken_rules():
        return set(RULES) - {"spec"}
    skipped = set() if is_deep else {"non_finite", "export"}
    if report.status != "succeeded":
        skipped |= {"success", "export"}
    if report.status not in ("succeeded", "failed", "cancelled"):
        skipped |= {"leftovers", "final"}
    return skipped


def _list(title: str, findings: list[Finding]) -> None:
    from stillhouse.cli.console import say

    for finding in findings[:SHOWN]:
        say(f"{title} [{finding.rule}]: {finding.message}")
    if len(findings) > SHOWN:
        say(f"... and {len(findings) - SHOWN} more; --json has all")
