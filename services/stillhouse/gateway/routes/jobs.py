"""/v1/jobs: submit, list, look at, cancel."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Body, Header, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from stillhouse.core.errors import NotFoundError
from stillhouse.core.queue.jobs import JobRecord
from stillhouse.core.schemas import Job, Page, Status
from stillhouse.core.service import Context
from stillhouse.core.spec import JobSpec
from stillhouse.gateway import jobs
from stillhouse.gateway.deps import Ctx, OwnJob
from stillhouse.gateway.routes.deadline import DeadlineRoute
from stillhouse.gateway.views import job_view

router = APIRouter(prefix="/v1/jobs", tags=["jobs"], route_class=DeadlineRoute)
SCAN = 100
"""Records read at once while filtering by status."""


class ListQuery(BaseModel):
    """Which jobs to list."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    limit: int = Field(default=20, ge=1, le=100)
    """Jobs in the answer, at most."""
    after: str = Field(default="", pattern=r"^(job_[a-z0-9]{8,40})?$")
    """Last id of the page before."""
    status: Status | None = None
    """Only jobs with this status."""
    order: Literal["asc", "desc"] = "desc"
    """By creation time; desc = newest first."""


@router.post("", status_code=201)
async def create_job(
    ctx: Ctx,
    request: Request,
    response: Response,
    spec: Annotated[JobSpec, Body()],
    idempotency_key: Annotated[str, Header(description="Repeat a request with the same key: one job, one answer")] = "",
) -> Job:
    """Submit a job. When this answers, the job is durable; what can be checked without the models was checked."""
    submission = jobs.Submission(spec, request.state.owner, idempotency_key)
    record, is_replay = await jobs.submit(ctx, submission)
    response.headers["Location"] = f"/v1/jobs/{record.id}"
    if is_replay:
        response.headers["Idempotent-Replayed"] = "true"
    return job_view(record)


@router.get("")
async def list_jobs(ctx: Ctx, query: Annotated[ListQuery, Query()]) -> Page[Job]:
    """Jobs by creation time, without their inline rows."""
    if query.after:
        await _exists(ctx, query.after)
    wanted = query.limit + 1  # one more tells whether there is another page
    found: list[JobRecord] = []
    after = query.after
    while len(found) < wanted:
        size = SCAN if query.status else wanted
        page = await ctx.jobs.list(limit=size, after=after, newest_first=query.order == "desc")
        found += [record for record in page if query.status in (None, record.status)]
        if len(page) < size:
            break
        after = page[-1].id
    data = [job_view(record, with_rows=False) for record in found[: query.limit]]
    return Page(data=data, has_more=len(found) > query.limit)


async def _exists(ctx: Context, job_id: str) -> None:
    try:
        await ctx.jobs.get(job_id)
    except NotFoundError as error:
        raise NotFoundError(error.message, param="after") from None


@router.get("/{job_id}")
async def get_job(record: OwnJob) -> Job:
    """A job."""
    return job_view(record)


@router.post("/{job_id}/cancel", status_code=202)
async def cancel_job(ctx: Ctx, record: OwnJob) -> Job:
    """End a job. It becomes `cancelling`, then `cancelled`; at once if no trainer has had it yet."""
    return job_view(await jobs.cancel(ctx, record.id))
