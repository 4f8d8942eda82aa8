"""Commands that start, list, show, follow and steer jobs, on top of the REST client."""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from stillhouse.cli import follow, held_out, jobfile
from stillhouse.cli.checkpoints import print_checkpoints
from stillhouse.cli.console import (
    EXIT_INTERRUPTED,
    EXIT_UNWATCHED,
    CliError,
    confirm,
    console,
    count,
    done,
    duration,
    local_time,
    print_facts,
    print_json,
    print_table,
    say,
    size,
)
from stillhouse.client.client import Client
from stillhouse.core.errors import StillhouseError
from stillhouse.core.schemas import Job

NEXT: Final = {
    "cancel": "",
    "pause": "it goes on with: stillhouse resume {id}",
    "resume": "watch it: stillhouse watch {id}",
}
"""What to do after a verb."""


def submit(path: Path, *, name: str, is_watched: bool, as_json: bool) -> None:
    """Check, upload, create; then watch if asked to."""
    job_file = jobfile.load(path, name=name)
    with Client() as client:
        job = client.jobs.create(upload(client, job_file, is_quiet=as_json))
    _tell_new(job, is_watched=is_watched, as_json=as_json)


def upload(client: Client, job_file: jobfile.JobFile, *, is_quiet: bool) -> dict[str, Any]:
    """The job with its prompts uploaded."""

    def send(prompts: Path) -> str:
        sent = client.files.upload(prompts)
        if not is_quiet:
            say(f"uploaded {prompts.name}: {sent.num_rows} rows, {size(sent.size_bytes)}")
        return sent.id

    return job_file.upload(send)


def _tell_new(job: Job, *, is_watched: bool, as_json: bool) -> None:
    if as_json and not is_watched:
        print_json(job)
        return
    if not as_json:
        say(f"{job.id} {job.status}")
    if is_watched:
        watch(job.id, as_json=as_json)
    else:
        say(f"watch it: stillhouse watch {job.id}")


def watch(job_id: str, *, as_json: bool) -> None:
    """Follow a job; ends the process with the job's exit code unless it succeeded.

    Raises:
        CliError: it cannot be watched; an exit code of its own, since 1 would say that the job failed.
    """
    from stillhouse.cli.screen import LiveView
    from stillhouse.cli.views import JsonView, LineView

    try:
        # no retries in the client: the follower polls anyway, and shows at once that nobody answers
        with Client(retries=0) as client:
            follower = follow.Follower(client.jobs, job_id, services=client.services)
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


def show_jobs(*, as_json: bool, **filters: Any) -> None:
    """A table of jobs."""
    with Client() as client:
        found = client.jobs.list(**filters)
    if as_json:
        print_json(found)
        return
    if not found:
        is_filtered = filters["status"] or filters["owner"] or filters["after"]
        say("no such jobs" if is_filtered else "no jobs yet; start one with `stillhouse submit job.yaml`")
        return
    owners = len({job.get("owner") or "" for job in found}) > 1
    columns = ("id", "name", *(("owner",) if owners else ()), "status", ">step", ">ETA", "created", ">took")
    print_table(columns, [_row(job, with_owner=owners) for job in found])


def _row(job: Job, *, with_owner: bool) -> tuple[str, ...]:
    is_check = job.get("kind") == "preflight"
    return (
        job.id,
        job.name,
        *((job.get("owner") or "",) if with_owner else ()),
        f"{job.status} (check)" if is_check else job.status,
        "" if is_check else f"{job.progress.step}/{job.progress.total_steps}",
        "" if job.is_terminal else duration(job.progress.eta_s),
        local_time(job.created_at),
        duration(_seconds_between(job.started_at, job.finished_at)),
    )


def show_job(job_id: str, *, as_json: bool) -> None:
    """Everything about one job."""
    with Client() as client:
        job = client.jobs.get(job_id)
        evaluations = client.jobs.evaluations(job_id)
        checkpoints = client.jobs.checkpoints(job_id)
    if as_json:
        print_json({**job, "evaluations": evaluations, "checkpoints": checkpoints})
        return
    print_facts(_facts(job))
    if evaluations:
        say("\nheld out")
        held_out.print_evaluations(evaluations)
        print_facts(held_out.by_teacher(evaluations[0], evaluations[-1]))
    if checkpoints:
        say("\ncheckpoints")
        print_checkpoints(checkpoints)


def _facts(job: Job) -> list[tuple[str, str]]:
    progress, spec, error = job.progress, job.spec, job.error or {}
    # a job that failed the checks of its own start names the fix in its message
    failure = f"{error.get('message')} ({error.get('code')})" if error else ""
    phase = progress.phase if not job.is_terminal else ""
    took = duration(_seconds_between(job.started_at, job.finished_at)) if job.finished_at else ""
    return [
        ("id", job.id),
        ("name", job.name),
        ("status", " ".join(filter(None, (job.status, phase)))),
        ("reason", job.status_reason),
        ("note", job.status_message),
        ("error", failure),
        ("retry of", job.get("retry_of") or ""),
        ("owner", job.get("owner") or ""),
        ("priority", str(job.get("priority") or "")),
        ("student", spec["student"]["model"]),
        ("teachers", ", ".join(teacher["model"] for teacher in spec["teachers"].values())),
        ("step", f"{progress.step}/{progress.total_steps}"),
        ("ETA", "" if job.is_terminal else duration(progress.eta_s)),
        ("tokens", _tokens(job.usage or {})),
        ("best", job.get("best_checkpoint") or ""),
        ("created", local_time(job.created_at)),
        ("took", took),
        ("trainer", f"{job.trainer} (claim {job.epoch})" if job.trainer else ""),
    ]


def _tokens(usage: dict[str, Any]) -> str:
    names = ("sampled_tokens", "scored_tokens", "trained_tokens")
    return ", ".join(f"{name.removesuffix('_tokens')} {count(usage[name])}" for name in names if name in usage)


def steer(job_id: str, verb: str, *, as_json: bool) -> None:
    """Cancel, pause or resume a job."""
    with Client() as client:
        job: Job = getattr(client.jobs, verb)(job_id)
    if as_json:
        print_json(job)
        return
    say(f"{job_id} {job.status}")
    if NEXT[verb]:
        say(NEXT[verb].format(id=job_id))


def retry(job_id: str, *, checkpoint: str, is_watched: bool, as_json: bool) -> None:
    """Start a new job where an ended one has a checkpoint."""
    with Client() as client:
        job = client.jobs.retry(job_id, checkpoint=checkpoint or None)
    _tell_new(job, is_watched=is_watched, as_json=as_json)


def delete(job_id: str, *, is_sure: bool, as_json: bool) -> None:
    """Delete an ended job."""
    confirm(f"Delete {job_id} with its checkpoints and history?", is_sure=is_sure)
    with Client() as client:
        client.jobs.delete(job_id)
    done(f"deleted {job_id}", as_json=as_json, id=job_id, is_deleted=True)


def _seconds_between(start: str | None, end: str | None) -> float | None:
    if start is None:
        return None
    begin = datetime.fromisoformat(start)
    stop = datetime.fromisoformat(end) if end else datetime.now(begin.tzinfo)
    return (stop - begin).total_seconds()
