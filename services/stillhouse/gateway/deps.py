"""What route functions get from the application."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Final

from fastapi import Depends, Request

from stillhouse.core.errors import NotFoundError
from stillhouse.core.queue.jobs import JobRecord
from stillhouse.core.schemas import JobId
from stillhouse.core.service import Context

SCOPES: Final = frozenset({"read", "write", "admin"})


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sends a request."""

    owner: str
    """Whose objects it makes and sees; '' where authentication is off."""
    scopes: frozenset[str] = field(default=SCOPES)

    def may_see(self, owner: str) -> bool:
        """Objects of others do not exist for a caller, unless it administers the deployment."""
        return "admin" in self.scopes or owner == self.owner


def get_context(request: Request) -> Context:
    """The connections of this process."""
    return request.app.state.ctx


def get_caller(request: Request) -> Caller:
    """Who calls, as the outermost layer found out."""
    return Caller(request.state.owner)


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


Ctx = Annotated[Context, Depends(get_context)]
ByCaller = Annotated[Caller, Depends(get_caller)]
OwnJob = Annotated[JobRecord, Depends(own_job)]
