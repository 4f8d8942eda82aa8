"""/v1/jobs/{id}/...: what happened to a job and what came out of it."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import PlainTextResponse
from fastapi.sse import EventSourceResponse
from pydantic import BaseModel, ConfigDict, Field

from stillhouse.core.blobs import read_json
from stillhouse.core.errors import CorruptError, SpecError
from stillhouse.core.schemas import Event, MetricPoint, Page
from stillhouse.core.service import Context
from stillhouse.gateway import history
from stillhouse.gateway.condense import condensed
from stillhouse.gateway.deps import Ctx, OwnJob
from stillhouse.gateway.events import read_events
from stillhouse.gateway.routes.deadline import DeadlineRoute
from stillhouse.gateway.views import event_view, metric_view

router = APIRouter(prefix="/v1/jobs/{job_id}", tags=["history"], route_class=DeadlineRoute)
EventId = Annotated[str, Field(pattern=r"^([0-9]{1,16}(-[0-9]{1,10})?)?$")]


class EventsQuery(BaseModel):
    """Which events."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    after: EventId = ""
    """Id of the last event that is known."""
    limit: int = Field(default=100, ge=1, le=1000)
    """Events in a page, at most."""


class MetricsQuery(BaseModel):
    """Which metrics."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    names: str = Field(default="", max_length=4096)
    """Metric names, separated by commas; empty = all."""
    step_from: int = Field(default=0, ge=0)
    """First step."""
    step_to: int | None = Field(default=None, ge=0)
    """Last step."""
    resolution: int | None = Field(default=None, ge=1, le=100_000)
    """Most points in the answer: neighbouring steps become one point with their means. Left out: every step is one."""


def _stream_docs(media_type: str, what: str) -> dict[int | str, dict[str, Any]]:
    return {200: {"content": {media_type: {"schema": {"type": "string"}}}, "description": what}}


@router.get(
    "/events",
    response_model=Page[Event],
    responses=_stream_docs("text/event-stream", "A page, or with `Accept: text/event-stream` events as they happen"),
)
async def get_events(
    ctx: Ctx,
    request: Request,
    record: OwnJob,
    query: Annotated[EventsQuery, Query()],
    last_event_id: Annotated[EventId, Header(description="Resumes a stream after this event")] = "",
) -> Page[Event] | Response:
    """A job's history, oldest first. A stream ends after the job's last event."""
    if "text/event-stream" in request.headers.get("accept", ""):
        stream = request.app.state.tails.stream(record.id, last_event_id or query.after)
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return EventSourceResponse(stream, headers=headers)
    events = await read_events(ctx, record.id, query.after, query.limit + 1)
    return Page(data=[event_view(event) for event in events[: query.limit]], has_more=len(events) > query.limit)


@router.get(
    "/metrics",
    response_model=Page[MetricPoint],
    responses=_stream_docs("text/csv", "All points, or with `Accept: text/csv` a table"),
)
async def get_metrics(
    ctx: Ctx, request: Request, record: OwnJob, query: Annotated[MetricsQuery, Query()]
) -> Page[MetricPoint] | Response:
    """Metrics by step; of steps that were trained again after a takeover the newest."""
    if query.step_to is not None and query.step_to < query.step_from:
        raise SpecError(f"step_to {query.step_to} is below step_from {query.step_from}", param="step_to")
    names = {name.strip() for name in query.names.split(",") if name.strip()}
    stored = await history.read_metrics(ctx, record.id, query.step_from, query.step_to)
    if query.resolution is not None:
        stored = condensed(stored, query.resolution)
    points = [metric_view(point, names) for point in stored]
    if "text/csv" in request.headers.get("accept", ""):
        return PlainTextResponse(history.metrics_csv(points), media_type="text/csv")
    return Page(data=points)


@router.get("/evaluations")
async def get_evaluations(ctx: Ctx, record: OwnJob) -> Page[dict[str, Any]]:
    """Held-out measurements by step, as the trainer wrote them."""
    return Page(data=await asyncio.to_thread(_evaluations, ctx, record.id))


def _evaluations(ctx: Context, job_id: str) -> list[dict[str, Any]]:
    found = []
    for path in ctx.artifacts.job(job_id).evaluations.glob("*.json"):
        try:
            found.append((int(path.stem), read_json(path)))
        except (ValueError, CorruptError) as error:
            ctx.log.warning("evaluation cannot be read", job_id=job_id, file=path.name, error=str(error))
    return [document for _, document in sorted(found, key=lambda item: item[0])]
