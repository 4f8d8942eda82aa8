"""What route functions get from the application."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import Depends, Request

from stillhouse.core.errors import NotFoundError
from stillhouse.core.queue.jobs import JobRecord
from stillhouse.core.schemas import JobId
from stillhouse.core.service import Context
from stillhouse.gateway.auth import Caller


# async although nothing is awaited: FastAPI runs plain functions in threads, two hops for each request
async def get_context(request: Request) -> Context:
    """The connections of this process."""
    return request.app.state.ctx


async def get_caller(request: Request) -> Caller:
    """Who calls, as the outermost layer found out."""
    return request.state.caller


def require(scope: str) -> Callable[[Request], Coroutine[Any, Any, None]]:
    """A dependency of routes that need more than their method says; see the layer Edge for what that is."""

    async def check(request: Request) -> None:
        (await get_caller(request)).require(scope)

    return check


async def own_job(
    ctx: Annotated[Context, Depends(get_context)], caller: Annotated[Caller, Depends(get_caller)], job_id: JobId
) -> JobRecord:
    """The job of a path `/{job_id}`.

    Raises:
        NotFoundError: there is none, or it is another owner's.
    """
    record = await ctx.jobs.get(job_id)
    if not caller.may_see(record.owner):
        raise NotFoundError(f"no job '{job_id}'")
    return record


async def check_place(ctx: Context, caller: Caller, job_id: str) -> None:
    """A page of jobs goes on behind a job that its reader may see, or that is deleted.

    Raises:
        NotFoundError: it is another owner's: that it exists is not told.
    """
    try:
        owner = (await ctx.jobs.get(job_id)).owner
    except NotFoundError:
        return  # the list says so, unless it knows the place
    if not caller.may_see(owner):
        raise NotFoundError(f"no job '{job_id}'", param="after")


Ctx = Annotated[Context, Depends(get_context)]
ByCaller = Annotated[Caller, Depends(get_caller)]
OwnJob = Annotated[JobRecord, Depends(own_job)]
