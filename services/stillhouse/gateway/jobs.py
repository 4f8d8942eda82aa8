"""What users do to jobs: submit, retry and cancel. A job's life: see core/queue/jobs.py.

`job.json` beside the artifacts is written and fsynced before the record exists, so an accepted job survives the loss of
the queue server: the sweeper rebuilds records from it (sweeper.py).
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final

from stillhouse.core import checkpoints, tracing
from stillhouse.core.blobs import (
    JobArtifacts,
    new_id,
    sealed,
    sealed_line,
    sha256_bytes,
    unsealed,
    write_atomic,
    write_json,
)
from stillhouse.core.errors import ConflictError, CorruptError, NotFoundError, SpecError, StillhouseError
from stillhouse.core.evaluations import read_best, read_stop
from stillhouse.core.failpoints import failpoint
from stillhouse.core.queue import keys
from stillhouse.core.queue.client import REFUSALS
from stillhouse.core.queue.jobs import FINAL_FIELDS, JobRecord, final_document
from stillhouse.core.schemas import Kind, Preflight
from stillhouse.core.service import Context
from stillhouse.core.spec import JobSpec
from stillhouse.gateway import limits
from stillhouse.gateway.auth import Caller
from stillhouse.gateway.origins import Origin, choose, link
from stillhouse.gateway.reach import Reach
from stillhouse.gateway.rows import is_light
from stillhouse.gateway.validation import inspect, preflight

CANCELLABLE: Final = ("queued", "validating", "starting", "running", "stalled", "pausing", "resuming")
FINAL: Final = "final.json"
"""Beside job.json: how the job ended. Its presence means that nothing is left to do."""
_PREFLIGHTS: Final = ThreadPoolExecutor(max_workers=1, thread_name_prefix="preflight")
"""One at a time: each holds all rows of a job's files in memory and counts tokens on all cores."""
_CHECKING: Final = threading.Lock()
"""Small jobs are checked one after the other, too: threads that compute side by side take the event loop's turns."""
_ACCEPTING: Final[set[asyncio.Task[Any]]] = set()
"""Submissions under way; a task that nobody holds may be collected before it ends."""
_WRITERS: Final = ThreadPoolExecutor(max_workers=32, thread_name_prefix="accept")
"""Each mostly waits for the disk, which syncs what many ask for at once in about the time of one."""


@dataclass(frozen=True)
class Submission:
    """A job as it came."""

    spec: JobSpec
    caller: Caller
    idempotency_key: str
    kind: Kind = "distillation"
    origin: Origin | None = None
    """The checkpoint that it goes on from."""

    @cached_property
    def document(self) -> dict[str, Any]:
        """The spec as JSON, defaults filled in."""
        return self.spec.model_dump(mode="json")

    def token(self) -> str:
        """Names key and owner in Redis: callers do not share their keys. '' = no key was sent."""
        return sha256_bytes(f"{self.caller.owner}\n{self.idempotency_key}".encode()) if self.idempotency_key else ""

    @cached_property
    def text(self) -> str:
        """The document as text, the same for specs that mean the same."""
        return json.dumps(self.document, sort_keys=True)

    @cached_property
    def body_sha256(self) -> str:
        """Same for bodies that mean the same."""
        kind = "" if self.kind == "distillation" else f"{self.kind}\n"
        kind += f"{self.origin.job_id}/{self.origin.checkpoint}\n" if self.origin else ""
        return sha256_bytes((kind + self.text).encode())


async def look_at(ctx: Context, spec: JobSpec, caller: Caller) -> Preflight:
    """The static report about a job."""
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(
        _PREFLIGHTS, lambda: inspect(spec, ctx.models, Reach(ctx.artifacts, caller)).report()
    )


async def submit(ctx: Context, submission: Submission) -> tuple[JobRecord, bool]:
    """Accept a job: (its record as it was created, whether it was created by an earlier request with this key).

    Raises:
        SpecError: the job cannot work, or the key was used for another body.
        QuotaError: it is more than its owner may ask for.
    """
    if not re.fullmatch(r"[\x21-\x7e]{0,255}", submission.idempotency_key):
        raise SpecError("use 1-255 printable ASCII characters without spaces", param="Idempotency-Key")
    token = submission.token()
    # before anything is written: what cannot be recorded is refused
    earlier: Any = await (ctx.redis.get(keys.idempotency(token)) if token else ctx.redis.ping())
    if token and earlier is not None:
        return await _replay(ctx, earlier.decode(), submission), True
    record = JobRecord(
        id=new_id("job"),
        status="queued",
        spec=submission.document,
        created_at=round(time.time(), 3),
        stop_step=submission.spec.stop_step(),
        owner=submission.caller.owner,
        kind=submission.kind,
        priority=submission.spec.priority,
        traceparent=tracing.traceparent(),
        **_begun(submission.origin.as_json() if submission.origin else None),
    )
    # not cut off half-way by the route's deadline: what is on disk would become a job that nobody counted
    work = asyncio.create_task(_admit_and_create(ctx, submission, record))
    _ACCEPTING.add(work)
    work.add_done_callback(_ACCEPTING.discard)
    return await asyncio.shield(work)


async def _admit_and_create(ctx: Context, submission: Submission, record: JobRecord) -> tuple[JobRecord, bool]:
    """Count a job and create it. It counts from then on if it is on disk, where the sweeper finds it, too: also when
    the queue server's answer to its creation was lost."""
    await limits.admit(ctx, submission.caller, record, submission.spec)
    try:
        return await _create(ctx, submission, record)
    finally:
        if not ctx.artifacts.job(record.id).job_json.is_file():
            await limits.take_back(ctx, record, submission.spec)


async def _create(ctx: Context, submission: Submission, record: JobRecord) -> tuple[JobRecord, bool]:
    """Check a job and make it durable: (its record, whether a request with the same key was faster)."""
    token, body_sha256 = submission.token(), submission.body_sha256
    document = {
        "id": record.id,
        "created_at": record.created_at,
        "owner": record.owner,
        "kind": record.kind,
        "stop_step": record.stop_step,
        "idempotency": [token, body_sha256],
        **({"origin": submission.origin.as_json()} if submission.origin else {}),
        **({"traceparent": record.traceparent} if record.traceparent else {}),
    }
    await _check_and_write(ctx, submission, document)
    failpoint("gateway.job_json_written")
    try:
        made = await ctx.jobs.create(record, idempotency_key=token, body_sha256=body_sha256, message="queued")
    except REFUSALS:  # nothing was recorded, for certain: nothing stays, or the sweeper would bring the job back
        await asyncio.to_thread(shutil.rmtree, ctx.artifacts.job(record.id).root, ignore_errors=True)
        raise
    failpoint("gateway.record_written")
    if made and made != f"{record.id}:{body_sha256}":  # a request with the same key was faster
        await asyncio.to_thread(shutil.rmtree, ctx.artifacts.job(record.id).root, ignore_errors=True)
        return await _replay(ctx, made, submission), True
    ctx.log.info("job accepted", job_id=record.id, kind=record.kind)
    return record, False


async def _check_and_write(ctx: Context, submission: Submission, document: dict[str, Any]) -> None:
    """Static pre-flight, then job.json; in one go where few rows are to be read."""
    loop = asyncio.get_running_loop()

    def check() -> Mapping[str, checkpoints.Settled]:
        return preflight(submission.spec, ctx.models, Reach(ctx.artifacts, submission.caller))

    if is_light(submission.spec, ctx.artifacts):

        def check_and_write() -> None:
            with _CHECKING:
                references = check()
            _write_job_json(ctx, submission, document, references)

        await loop.run_in_executor(_WRITERS, check_and_write)
    else:
        references = await loop.run_in_executor(_PREFLIGHTS, check)
        await loop.run_in_executor(_WRITERS, _write_job_json, ctx, submission, document, references)


def _write_job_json(
    ctx: Context, submission: Submission, document: dict[str, Any], references: Mapping[str, checkpoints.Settled]
) -> None:
    """Make an accepted job durable: `document` and its spec."""
    job = ctx.artifacts.job(document["id"])
    try:
        if submission.origin:  # before job.json, which makes the folder a job
            references = link(submission.origin, ctx.artifacts.job(submission.origin.job_id), job)
        texts = {name: json.dumps(value, sort_keys=True) for name, value in document.items()}
        write_atomic(job.job_json, sealed_line({**texts, "spec": submission.text}))
        if references:
            checkpoints.settle(job, references)
        for settled in references.values():  # named only now, so retention may have been faster
            if checkpoints.parse(settled.model):
                checkpoints.locate(ctx.artifacts, settled.model)
    except (OSError, StillhouseError):  # a full disk; a past that is deleted, or damaged, just now
        shutil.rmtree(job.root, ignore_errors=True)  # no half job stays
        raise


async def _replay(ctx: Context, made: str, submission: Submission) -> JobRecord:
    """The record as the first request made it, so that the answer is the same again, byte for byte."""
    job_id, _, made_sha256 = made.partition(":")
    if made_sha256 != submission.body_sha256:
        raise SpecError(
            f"this key was used for job {job_id} with another body; use a new key for a new job",
            param="Idempotency-Key",
        )
    try:
        record = initial_record(unsealed(ctx.artifacts.job(job_id).job_json))
        return replace(record, spec=submission.document)  # job.json has its keys in another order
    except (NotFoundError, CorruptError):
        return await ctx.jobs.get(job_id)


async def retry(ctx: Context, record: JobRecord, checkpoint: str, submission: Submission) -> tuple[JobRecord, bool]:
    """A new job of the spec of a finished one that goes on from its checkpoint; '' = the newest. As `submit` otherwise.

    Raises:
        ConflictError: it has not ended, or nothing is left to do.
        NotFoundError: there is no such checkpoint.
    """
    if not record.is_terminal:
        raise ConflictError(f"job {record.id} is '{record.status}': only a finished job is retried; cancel it first")
    if record.kind != "distillation":
        raise ConflictError(f"job {record.id} trains nothing: send POST /v1/jobs/validate?live=true again")
    origin = await _chosen_before(ctx, record, checkpoint, submission)
    if origin is None:
        origin = await asyncio.get_running_loop().run_in_executor(
            _PREFLIGHTS, choose, ctx.artifacts.job(record.id), record, checkpoint
        )
    tracing.current().link(record.traceparent)
    made, is_replay = await submit(ctx, replace(submission, origin=origin))
    if not is_replay:
        message = f"goes on from {origin.checkpoint} of job {record.id}, at step {origin.step}"
        facts = {"from": record.id, "checkpoint": origin.checkpoint, "step": origin.step}
        await ctx.jobs.event(made.id, "job.retried", message, **facts)
    return made, is_replay


async def _chosen_before(ctx: Context, record: JobRecord, checkpoint: str, submission: Submission) -> Origin | None:
    """The checkpoint that an earlier request with this key chose; by now another may be newer, or that one gone."""
    token = submission.token()
    earlier: Any = await ctx.redis.get(keys.idempotency(token)) if token else None
    if earlier is None:
        return None
    try:
        made = await asyncio.to_thread(unsealed, ctx.artifacts.job(earlier.decode().partition(":")[0]).job_json)
    except (NotFoundError, CorruptError):
        return None
    origin = Origin.from_json(made["origin"]) if "origin" in made else None
    is_same = origin is not None and origin.job_id == record.id and checkpoint in ("", origin.checkpoint)
    return origin if is_same else None


def initial_record(document: dict[str, Any]) -> JobRecord:
    """The record that a job.json stands for, before anything happened to the job."""
    fields = {name: document[name] for name in ("id", "created_at", "owner", "spec", "stop_step")}
    return JobRecord(
        status="queued",
        kind=document.get("kind", "distillation"),
        priority=int(document["spec"].get("priority", 0)),
        traceparent=document.get("traceparent", ""),
        **fields,
        **_begun(document.get("origin")),
    )


def _begun(origin: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a record says of the checkpoint that the job begins with."""
    return {"retry_of": origin["job_id"], "step": origin["step"], "committed_step": origin["step"]} if origin else {}


async def cancel(ctx: Context, job_id: str) -> JobRecord:
    """End a job: at once if no trainer has it for certain, otherwise by asking its trainer (`cancelling`).

    Raises:
        ConflictError: it is finished.
    """
    record = await ctx.jobs.get(job_id)
    if record.status == "cancelling":
        return record
    is_ended_here = True
    is_paused = record.status == "paused"  # nobody leads it, nor will before it is resumed
    try:
        await ctx.jobs.request(
            job_id,
            allowed=("paused",) if is_paused else ("queued",),
            only_epoch=record.epoch if is_paused else 0,
            status="cancelled",
            status_reason="user",
            status_message="cancelled while it was paused" if is_paused else "cancelled before it started",
            finished_at=round(time.time(), 3),
        )
    except ConflictError:
        await ctx.jobs.request(
            job_id,
            allowed=(*CANCELLABLE, "paused", "cancelling"),
            status="cancelling",
            status_reason="user",
            status_message="waiting for the trainer to stop",
        )
        is_ended_here = False
        failpoint("gateway.cancel_requested")
    record = await ctx.jobs.get(job_id)
    if is_ended_here or not record.is_terminal:  # else its trainer was faster than we, and has told it
        await ctx.jobs.event(job_id, "job.status", f"{record.status} on request", status=record.status)
    if record.is_terminal:
        await asyncio.to_thread(write_final, ctx, record)
    return record


def write_final(ctx: Context, record: JobRecord) -> None:
    """Note beside the artifacts how a job ended, unless its trainer did."""
    folder = ctx.artifacts.job(record.id).root
    if folder.is_dir() and not (folder / FINAL).exists():
        write_json(folder / FINAL, sealed(final_document(record)))


def read_final(artifacts: JobArtifacts, stop_step: int) -> dict[str, Any] | None:
    """How a job ended, from its final.json; None = it has not ended.

    A damaged one still says that nothing is left to do. The rest is told from what lies beside it: a finished student
    over a checkpoint of the last step is success, anything else is an end that nobody knows any more.
    """
    try:
        return unsealed(artifacts.root / FINAL)
    except NotFoundError:
        return None
    except CorruptError as error:
        epoch = artifacts.highest_epoch()
        facts: dict[str, Any] = {"epoch": epoch, "status_reason": "corrupt", "status_message": error.message}
        export = artifacts.export(epoch)
        if export.is_dir() and any(artifacts.manifests(epoch).glob(f"{stop_step:08d}-*/manifest.json")):
            path = str(export.relative_to(artifacts.root))
            result = {"steps": stop_step, "export": "ckpt_export", "export_path": path}
            return {**facts, "status": "succeeded", "step": stop_step, "committed_step": stop_step, "result": result}
        message = f"how the job ended is not known any more: {error.message}"
        return {**facts, "status": "failed", "error": {"code": "corrupt", "message": message, "service": "gateway"}}


def with_evaluations(artifacts: JobArtifacts, record: JobRecord) -> JobRecord:
    """A record made of job.json, with what evaluations did: ended the job early, named its best checkpoint."""
    stop = None
    with suppress(CorruptError):  # the trainer refuses to go on without it; how a job ended is known anyway
        stop = read_stop(artifacts)
    best = read_best(artifacts)
    return replace(
        record,
        stop_step=record.stop_step if stop is None else min(record.stop_step, int(stop["stop_step"])),
        best_checkpoint=str(best["checkpoint"]) if best else "",
    )


def final_fields(document: dict[str, Any]) -> dict[str, Any]:
    """What a final.json says about the record."""
    return {name: document[name] for name in FINAL_FIELDS if document.get(name) is not None}
