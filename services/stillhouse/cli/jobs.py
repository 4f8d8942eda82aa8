"""Commands about jobs, on top of the REST client."""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from stillhouse.cli import follow, held_out, jobfile
from stillhouse.cli.console import (
    EXIT_INTERRUPTED,
    EXIT_UNWATCHED,
    EXIT_USAGE,
    CliError,
    console,
    count,
    duration,
    number,
    print_json,
    print_table,
    say,
    size,
)
from stillhouse.client.client import Client
from stillhouse.core.errors import StillhouseError
from stillhouse.core.schemas import Job


def submit(path: Path, *, name: str, is_watched: bool) -> None:
    """Check, upload, create; then watch if asked to."""
    job_file = jobfile.load(path, name=name)

    def send(prompts: Path) -> str:
        sent = client.files.upload(prompts)
        say(f"uploaded {prompts.name}: {sent['num_rows']} rows, {size(sent['size_bytes'])}")
        return sent["id"]

    with Client() as client:
        job = client.jobs.create(job_file.upload(send))
    say(f"{job['id']} {job['status']}")
    if is_watched:
        watch(job["id"], as_json=False)
    else:
        say(f"watch it: stillhouse watch {job['id']}")


def watch(job_id: str, *, as_json: bool) -> None:
    """Follow a job; ends the process with the job's exit code unless it succeeded.

    Raises:
        CliError: it cannot be watched; an exit code of its own, since 1 would say that the job failed.
    """
    from stillhouse.cli.views import JsonView, LineView, LiveView

    try:
        # no retries in the client: the follower polls anyway, and shows at once that nobody answers
        with Client(retries=0) as client:
            follower = follow.Follower(client.jobs, job_id)
            if as_json:
                code = follow.follow(follower, JsonView())
            elif sys.stdout.isatty():
                with LiveView(console()) as view:
                    code = follow.follow(follower, view)
            else:
                code = follow.follow(follower, LineView())
    except KeyboardInterrupt:
        print(f"\nthe job goes on; come back with: stillhouse watch {job_id}", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except StillhouseError as error:
        raise CliError(
            f"cannot watch {job_id}: {error.message}",
            fix=f"`stillhouse ps` shows what runs here; a job goes on unwatched: stillhouse watch {job_id}",
            exit_code=EXIT_UNWATCHED,
        ) from error
    if code:
        sys.exit(code)


def show_jobs(*, limit: int, as_json: bool) -> None:
    """A table of jobs."""
    with Client() as client:
        found = list(client.jobs.list(limit=limit))
    if as_json:
        print_json(found)
        return
    if not found:
        say("no jobs yet; start one with `stillhouse submit job.yaml`")
        return
    print_table(
        ("id", "name", "status", ">step", ">ETA", "created", ">took"),
        [
            (
                job["id"],
                job["name"],
                job["status"],
                f"{job['progress']['step']}/{job['progress']['total_steps']}",
                "" if job["is_terminal"] else duration(job["progress"].get("eta_s")),
                _local(job["created_at"]),
                duration(_seconds_between(job["started_at"], job["finished_at"])),
            )
            for job in found
        ],
    )


def show_job(job_id: str, *, as_json: bool) -> None:
    """Everything about one job."""
    with Client() as client:
        job = client.jobs.get(job_id)
        evaluations = list(client.jobs.evaluations(job_id))
        checkpoints = list(client.jobs.checkpoints(job_id))
    if as_json:
        print_json({**job, "evaluations": evaluations, "checkpoints": checkpoints})
        return
    for label, text in _facts(job):
        if text:
            say(f"{label:<12}{text}")
    if evaluations:
        say("\nheld out")
        print_table(
            (">step", ">reverse KL", ">accuracy", ">teacher NLL", ">repeated 4-grams", ">tokens"),
            [
                (
                    str(row["step"]),
                    number(row.get("reverse_kl")),
                    number(row.get("accuracy"), 3),
                    number(row.get("teacher_nll_greedy")),
                    number(row.get("repeated_4grams"), 3),
                    count(row.get("num_tokens")),
                )
                for row in evaluations
            ],
        )
        for label, text in held_out.by_teacher(evaluations[0], evaluations[-1]):
            say(f"{label:<12}{text}")
    if checkpoints:
        say("\ncheckpoints")
        print_table(
            ("id", "kind", ">step", ">size", "created"),
            [
                (row["id"], row["kind"], str(row["step"]), size(row["size_bytes"]), _local(row["created_at"]))
                for row in checkpoints
            ],
        )


def _facts(job: Job) -> list[tuple[str, str]]:
    progress, spec, error = job["progress"], job["spec"], job.get("error") or {}
    teachers = ", ".join(teacher["model"] for teacher in spec["teachers"].values())
    usage = job.get("usage") or {}
    return [
        ("id", job["id"]),
        ("name", job["name"]),
        ("status", " ".join(filter(None, (job["status"], progress.get("phase") if not job["is_terminal"] else "")))),
        ("note", job["status_message"]),
        ("error", f"{error.get('message')} ({error.get('code')})" if error else ""),
        ("student", spec["student"]["model"]),
        ("teachers", teachers),
        ("step", f"{progress['step']}/{progress['total_steps']}"),
        ("ETA", "" if job["is_terminal"] else duration(progress.get("eta_s"))),
        ("tokens", ", ".join(f"{key.removesuffix('_tokens')} {count(usage[key])}" for key in _token_counts(usage))),
        ("created", _local(job["created_at"])),
        ("took", duration(_seconds_between(job["started_at"], job["finished_at"])) if job["finished_at"] else ""),
        ("trainer", f"{job['trainer']} (claim {job['epoch']})" if job["trainer"] else ""),
    ]


def _token_counts(usage: dict[str, Any]) -> list[str]:
    return [key for key in ("sampled_tokens", "scored_tokens", "trained_tokens") if key in usage]


def show_events(job_id: str, *, follow: bool, as_json: bool) -> None:
    """Events as lines; with `follow` until the job ends."""
    import json

    with Client() as client:
        try:
            for event in client.jobs.events(job_id, follow=follow):
                if as_json:
                    say(json.dumps(event.to_dict()))
                else:
                    level = "" if event["level"] == "info" else f"{event['level'].upper()} "
                    say(f"{_local(event['created_at'])}  {event['type']:<20} {level}{event['message']}")
        except KeyboardInterrupt:
            sys.exit(EXIT_INTERRUPTED)


def show_dead_letters(job_id: str, *, as_json: bool) -> None:
    """A table of the samples that were given up."""
    with Client() as client:
        letters = client.jobs.dead_letters(job_id)
    if as_json:
        print_json(letters)
        return
    if not letters:
        say(f"{job_id} has given up no sample")
        return
    rows = []
    for letter in letters:
        step = "-" if letter["step"] is None else str(letter["step"])
        who = f"{letter['service']} ({letter['attempts']}x)"
        rows.append(
            (letter["id"], step, str(letter["row"]), letter["teacher"], letter["reason"], who, letter["message"])
        )
    print_table(("sample", ">step", ">row", "teacher", "reason", "given up by", "message"), rows)


def cancel(job_id: str) -> None:
    """Ask for the stop of a job."""
    with Client() as client:
        job = client.jobs.cancel(job_id)
    say(f"{job_id} {job['status']}")


def download(job_id: str, *, checkpoint: str, output: Path | None) -> None:
    """Fetch the finished student or a checkpoint into a folder."""
    target = output or Path(f"{job_id}-{checkpoint or 'student'}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CliError(f"{target} exists already", fix="give another folder with -o", exit_code=EXIT_USAGE)
    with Client() as client:
        folder = Path(client.jobs.download(job_id, target, checkpoint=checkpoint or None))
    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    say(f"{folder}: {size(total)}")
    if not checkpoint:
        say(f"use it in jobs: stillhouse models add NAME {folder}")


def plot(job_id: str, output: Path) -> None:
    """Draw the curves of a job."""
    from stillhouse.cli import plot as implementation

    with Client() as client:
        job, points = client.jobs.get(job_id), list(client.jobs.metrics(job_id))
        evaluations = list(client.jobs.evaluations(job_id))
    implementation.plot(job, points, evaluations, output)
    say(f"wrote {output}")


def _local(timestamp: str) -> str:
    """`2026-11-23 20:15:02` of an RFC 3339 time, in the machine's zone."""
    return datetime.fromisoformat(timestamp).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _seconds_between(start: str | None, end: str | None) -> float | None:
    if start is None:
        return None
    begin = datetime.fromisoformat(start)
    stop = datetime.fromisoformat(end) if end else datetime.now(begin.tzinfo)
    return (stop - begin).total_seconds()
