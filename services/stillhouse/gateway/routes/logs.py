"""/v1/jobs/{id}/logs: what the services logged about a job."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Header, Query, Response
from fastapi.sse import EventSourceResponse
from pydantic import BaseModel, ConfigDict, Field

from stillhouse.core.schemas import LogLine, Page
from stillhouse.gateway import logs
from stillhouse.gateway.deps import Ctx, OwnJob
from stillhouse.gateway.routes.deadline import DeadlineRoute

router = APIRouter(prefix="/v1/jobs/{job_id}", tags=["history"], route_class=DeadlineRoute)
LineId = Annotated[str, Field(pattern=r"^([0-9]{1,20}(-[0-9a-f]{1,8})?)?$")]


class LogsQuery(BaseModel):
    """Which lines."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    service: str = Field(default="", max_length=120)
    """Of this kind of service (sampler, teacher, trainer, gateway), or of this instance; empty = all."""
    tail: int = Field(default=100, ge=1, le=5000)
    """Lines in the answer, at most: the last ones, or with `after` the next ones."""
    after: LineId = ""
    """Id of the last line that is known."""
    follow: bool = False
    """Answer with server-sent events, and go on as lines come, until the job has ended."""


@router.get(
    "/logs",
    response_model=Page[LogLine],
    responses={
        200: {
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
            "description": "A page, or with follow=true lines as they come",
        }
    },
)
async def get_logs(
    ctx: Ctx,
    record: OwnJob,
    query: Annotated[LogsQuery, Query()],
    last_event_id: Annotated[LineId, Header(description="Resumes a stream after this line")] = "",
) -> Page[LogLine] | Response:
    """Log lines of all services that concern a job, oldest first; tracebacks of crashes among them."""
    if query.follow:
        after = last_event_id or query.after
        stream = logs.follow_logs(ctx, record.id, service=query.service, after=after, tail=query.tail)
        return EventSourceResponse(stream, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
    wanted = {"service": query.service, "after": query.after, "tail": query.tail}
    return await asyncio.to_thread(logs.read_logs, ctx, record.id, **wanted)
