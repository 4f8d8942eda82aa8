"""/v1/jobs: submit, list, look at, cancel, pause, resume, retry, delete."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Header, Query, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stillhouse.core.blobs import unsealed
from stillhouse.core.errors import NotFoundError
from stillhouse.core.explain import explain
from stillhouse.core.schemas import Job, Page, Preflight, Status
from stillhouse.core.spec import JobSpec
from stillhouse.gateway import deleting, jobs, pausing
from stillhouse.gateway.deps import ByCaller, Ctx, OwnJob, check_place
from stillhouse.gateway.problems import InvalidError
from stillhouse.gateway.routes.deadline import DeadlineRoute
from stillhouse.gateway.validation import misshapen
from stillhouse.gateway.views import job_view

router = APIRouter(prefix="/v1/jobs", tags=["jobs"], route_class=DeadlineRoute)


class ListQuery(BaseModel):
    """Which jobs to list."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    limit: int = Field(default=20, ge=1, le=100)
    """Jobs in the answer, at most."""
    after: str = Field(default="", pattern=r"^(job_[a-z0-9]{8,40})?$")
    """Last id of the page before."""
    status: Status | None = None
    """Only jobs with this status."""
    owner: str = Field(default="", max_length=200)
    """Only jobs of this owner; for administrators."""
    order: Literal["asc", "desc"] = "desc"
    """By creation time; desc = newest first."""


@router.post("", status_code=201, response_model=Job)
async def create_job(
    ctx: Ctx,
    caller: ByCaller,
    spec: Annotated[JobSpec, Body()],
    idempotency_key: Annotated[str, Header(description="Repeat a request with the same key: one job, one answer")] = "",
) -> Response:
    """Submit a job. When this answers, the job is durable; what can be checked without the models was checked."""
    submission = jobs.Submission(spec, caller, idempotency_key)
    record, is_replay = await jobs.submit(ctx, submission)
    headers = {"Location": f"/v1/jobs/{record.id}"} | ({"Idempotent-Replayed": "true"} if is_replay else {})
    return Response(job_view(record).model_dump_json(), 201, headers, "application/json")


@router.post(
    "/validate",
    response_model=Preflight,
    responses={202: {"model": Job, "description": "With live=true: a job of kind preflight, which looks at it live"}},
)
async def validate_job(
    ctx: Ctx,
    caller: ByCaller,
    body: Annotated[dict[str, Any], Body(description="A job, as for POST /v1/jobs; what is wrong is in the report")],
    live: Annotated[bool, Query(description="Load the models and probe them: a job of kind preflight")] = False,
    idempotency_key: Annotated[str, Header(description="With live=true: as for creating a job")] = "",
) -> Preflight | JSONResponse:
    """Look at a job without starting it: every check with verdict, evidence and fix, and what the job would cost.

    200 also when checks fail. With `live=true` a trainer loads the models and probes them, too: 202, a job whose
    `result.preflight` is the report; refused as creating it would be, if checks fail that need no models.
    """
    try:
        spec = JobSpec.model_validate(body)
    except ValidationError as error:
        findings = explain([{**each, "loc": ("body", *each["loc"])} for each in error.errors()], body)
        if live:
            raise InvalidError(findings) from None
        return misshapen(findings)
    if not live:
        return await jobs.look_at(ctx, spec, caller)
    submission = jobs.Submission(spec, caller, idempotency_key, "preflight")
    record, is_replay = await jobs.submit(ctx, submission)
    headers = {"Location": f"/v1/jobs/{record.id}"} | ({"Idempotent-Replayed": "true"} if is_replay else {})
    return JSONResponse(job_view(record).model_dump(mode="json"), 202, headers)


@router.get("/{job_id}/preflight")
async def get_preflight(ctx: Ctx, record: OwnJob) -> Preflight:
    """What the trainer found before the job began to train; 404 until it has looked."""
    path = ctx.artifacts.job(record.id).preflight
    try:
        return Preflight.model_validate(await asyncio.to_thread(unsealed, path))
    except NotFoundError:
        raise NotFoundError(f"no trainer has looked at job '{record.id}' yet; it is '{record.status}'") from None


@router.get("")
async def list_jobs(ctx: Ctx, caller: ByCaller, query: Annotated[ListQuery, Query()]) -> Page[Job]:
    """The caller's jobs by creation time, without their inline rows; an administrator's are everybody's.

    Pages stay in place while jobs come and go; `after` may name a job that was deleted lately.
    """
    if query.after:
        await check_place(ctx, caller, query.after)
    is_admin = "admin" in caller.scopes
    if query.owner and not is_admin and query.owner != caller.owner:
        return Page(data=[], has_more=False)
    found = await ctx.jobs.list(
        limit=query.limit + 1,  # one more tells whether there is another page
        after=query.after,
        newest_first=query.order == "desc",
        status=query.status or "",
        owner=(query.owner or None) if is_admin else caller.owner,
    )
    data = [job_view(record, with_rows=False) for record in found[: query.limit]]
    return Page(data=data, has_more=len(found) > query.limit)


@router.get("/{job_id}")
async def get_job(record: OwnJob) -> Job:
    """A job."""
    return job_view(record)


@router.post("/{job_id}/cancel", status_code=202)
async def cancel_job(ctx: Ctx, record: OwnJob) -> Job:
    """End a job. It becomes `cancelling`, then `cancelled`; at once if no trainer has had it yet."""
    return job_view(await jobs.cancel(ctx, record.id))


class RetryRequest(BaseModel):
    """How to go on."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    checkpoint: str = Field(default="", pattern=r"^(ckpt_[1-9][0-9]{0,8}-[0-9]{8}-[0-9a-f]{8})?$")
    """Id of the checkpoint to go on from; empty = the newest that verifies."""


@router.post("/{job_id}/retry", status_code=201)
async def retry_job(
    ctx: Ctx,
    record: OwnJob,
    caller: ByCaller,
    response: Response,
    body: Annotated[RetryRequest | None, Body()] = None,
    idempotency_key: Annotated[str, Header(description="As for creating a job")] = "",
) -> Job:
    """A new job of the same spec, `retry_of` a finished one, that goes on from its checkpoint: weights, optimizer,
    random states, step and place in the data. It stands by itself: the old job may be deleted.
    """
    submission = jobs.Submission(JobSpec.model_validate(record.spec), caller, idempotency_key)
    made, is_replay = await jobs.retry(ctx, record, (body or RetryRequest()).checkpoint, submission)
    response.headers["Location"] = f"/v1/jobs/{made.id}"
    if is_replay:
        response.headers["Idempotent-Replayed"] = "true"
    return job_view(made)


@router.delete("/{job_id}", status_code=204)
async def delete_job(ctx: Ctx, record: OwnJob) -> None:
    """Delete a finished job with everything that is kept of it; refused while another job needs a checkpoint of it."""
    await deleting.delete(ctx, record)


@router.post("/{job_id}/pause", status_code=202)
async def pause_job(ctx: Ctx, record: OwnJob) -> Job:
    """Put a job to rest. It becomes `pausing`, then, with its last step committed and its samplers and trainer free,
    `paused`; at once if no trainer has had it yet.
    """
    return job_view(await pausing.pause(ctx, record.id))


@router.post("/{job_id}/resume", status_code=202)
async def resume_job(ctx: Ctx, record: OwnJob) -> Job:
    """Let a paused job go on. It becomes `resuming`, and goes on from its last step when a trainer is free."""
    return job_view(await pausing.resume(ctx, record.id))
