"""/v1/fine_tuning/jobs: the same jobs for OpenAI's official client. See docs/openai.md."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Header, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field

from stillhouse.core.errors import MalformedError, MediaTypeError, NotFoundError, SpecError
from stillhouse.core.explain import Finding, explain
from stillhouse.core.queue.jobs import JobRecord
from stillhouse.core.schemas import Page
from stillhouse.core.schemas.openai import FineTuningCheckpoint, FineTuningEvent, FineTuningJob
from stillhouse.core.service import Context
from stillhouse.gateway import files, jobs, pausing
from stillhouse.gateway.checkpoints import list_checkpoints
from stillhouse.gateway.deps import ByCaller, Caller, Ctx, OwnJob, check_place
from stillhouse.gateway.events import newest_events, read_events
from stillhouse.gateway.openai.request import FineTuningRequest, RefusedError, to_spec, translated
from stillhouse.gateway.openai.views import fine_tuning_checkpoint, fine_tuning_event, fine_tuning_view
from stillhouse.gateway.problems import InvalidError
from stillhouse.gateway.routes.deadline import DeadlineRoute

EventId = Annotated[str, Field(pattern=r"^([0-9]{1,16}(-[0-9]{1,10})?)?$")]
SCAN = 100
"""Records read at once while looking for the caller's."""


class OpenAIRoute(DeadlineRoute):
    """Wrong requests get status 400, as OpenAI answers them, and name the field of the request."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def refusing(request: Request) -> Response:
            try:
                return await handler(request)
            except RequestValidationError as error:
                if any(item["type"] == "json_invalid" for item in error.errors()):
                    raise
                raise RefusedError(explain(error.errors(), error.body, FineTuningRequest)) from None
            except (MalformedError, MediaTypeError):
                raise
            except InvalidError as error:
                raise RefusedError(translated(error.findings)) from None
            except SpecError as error:
                raise RefusedError(translated([Finding(error.param, error.message)])) from None

        return refusing


router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["OpenAI"], route_class=OpenAIRoute)


class PageQuery(BaseModel):
    """Which part of a list."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    after: str = Field(default="", max_length=100)
    """Last id of the page before."""
    limit: int = Field(default=20, ge=1, le=1000)
    """Things in the answer, at most."""


class EventsQuery(PageQuery):
    """Which events."""

    after: EventId = ""
    """Id of the last event that is known."""
    order: Literal["asc", "desc"] = "desc"
    """desc = newest first, as OpenAI lists them; asc = what came `after`, to follow a job."""


@router.post("")
async def create_fine_tuning_job(
    ctx: Ctx,
    caller: ByCaller,
    body: Annotated[FineTuningRequest, Body()],
    idempotency_key: Annotated[str, Header(description="Repeat a request with the same key: one job")] = "",
) -> FineTuningJob:
    """Submit a distillation job in OpenAI's words; `model` is the student, `method` names the teacher."""
    rows = _num_rows(ctx, caller, body.training_file)
    if rows == 0:
        message = f"there is no file '{body.training_file}'"
        raise RefusedError([Finding("training_file", message, "upload it with POST /v1/files and use its id")])
    submission = jobs.Submission(to_spec(body, rows), caller, idempotency_key)
    record, _ = await jobs.submit(ctx, submission)
    return fine_tuning_view(record, rows)


@router.get("")
async def list_fine_tuning_jobs(ctx: Ctx, request: Request, caller: ByCaller) -> Page[FineTuningJob]:
    """The caller's jobs, newest first; `metadata[key]=value` selects."""
    wanted = {name[9:-1]: value for name, value in request.query_params.items() if name.startswith("metadata[")}
    plain = {name: value for name, value in request.query_params.items() if not name.startswith("metadata[")}
    query = _page_query(plain)
    if query.after:
        await check_place(ctx, caller, query.after)
    found: list[JobRecord] = []
    after = query.after
    while len(found) <= query.limit:
        page = await ctx.jobs.list(limit=SCAN, after=after)
        found += [record for record in page if _is_meant(record, caller, wanted)]
        if len(page) < SCAN:
            break
        after = page[-1].id
    data = [await asyncio.to_thread(_view, ctx, caller, record) for record in found[: query.limit]]
    return Page(data=data, has_more=len(found) > query.limit)


def _page_query(given: dict[str, str]) -> PageQuery:
    try:
        return PageQuery.model_validate(given)
    except ValueError as error:
        raise SpecError(f"wrong query: {error}", param="limit") from None


def _is_meant(record: JobRecord, caller: Caller, wanted: dict[str, str]) -> bool:
    metadata = record.spec.get("metadata") or {}
    is_own = record.owner == caller.owner and record.kind == "distillation"
    return is_own and all(metadata.get(name) == value for name, value in wanted.items())


@router.get("/{job_id}")
async def get_fine_tuning_job(ctx: Ctx, caller: ByCaller, record: OwnJob) -> FineTuningJob:
    """A job."""
    return await asyncio.to_thread(_view, ctx, caller, record)


@router.post("/{job_id}/cancel")
async def cancel_fine_tuning_job(ctx: Ctx, caller: ByCaller, record: OwnJob) -> FineTuningJob:
    """End a job; its status is `running` until its trainer has stopped."""
    return _view(ctx, caller, await jobs.cancel(ctx, record.id))


@router.post("/{job_id}/pause")
async def pause_fine_tuning_job(ctx: Ctx, caller: ByCaller, record: OwnJob) -> FineTuningJob:
    """Halt a job at its next step; its status is `running` until its trainer has written a checkpoint."""
    return _view(ctx, caller, await pausing.pause(ctx, record.id))


@router.post("/{job_id}/resume")
async def resume_fine_tuning_job(ctx: Ctx, caller: ByCaller, record: OwnJob) -> FineTuningJob:
    """Let a paused job go on."""
    return _view(ctx, caller, await pausing.resume(ctx, record.id))


@router.get("/{job_id}/events")
async def list_fine_tuning_events(
    ctx: Ctx, record: OwnJob, query: Annotated[EventsQuery, Query()]
) -> Page[FineTuningEvent]:
    """What happened to a job."""
    read = read_events if query.order == "asc" else newest_events
    events = await read(ctx, record.id, query.after, query.limit + 1)
    data = [fine_tuning_event(event) for event in events[: query.limit]]
    return Page(data=data, has_more=len(events) > query.limit)


@router.get("/{job_id}/checkpoints")
async def list_fine_tuning_checkpoints(
    ctx: Ctx, record: OwnJob, query: Annotated[PageQuery, Query()]
) -> Page[FineTuningCheckpoint]:
    """Committed checkpoints, newest first; the finished student is the job's `fine_tuned_model`."""
    found = await asyncio.to_thread(list_checkpoints, record.id, ctx.artifacts.job(record.id), record)
    listed = [checkpoint for checkpoint in reversed(found) if checkpoint.kind == "checkpoint"]
    if query.after:
        ids = [checkpoint.id for checkpoint in listed]
        if query.after not in ids:
            raise NotFoundError(f"job {record.id} has no checkpoint '{query.after}' (any more)", param="after")
        listed = listed[ids.index(query.after) + 1 :]
    page = listed[: query.limit]
    points: dict[int, dict[str, Any]] = {}
    for step in {checkpoint.step for checkpoint in page}:
        points |= {point["step"]: point for point in await ctx.jobs.metrics(record.id, step_from=step, step_to=step)}
    data = [fine_tuning_checkpoint(checkpoint, points) for checkpoint in page]
    return Page(data=data, has_more=len(listed) > len(page))


def _view(ctx: Context, caller: Caller, record: JobRecord) -> FineTuningJob:
    file_id = record.spec["stages"][0]["data"].get("file")
    return fine_tuning_view(record, _num_rows(ctx, caller, file_id) if file_id else 0)


def _num_rows(ctx: Context, caller: Caller, file_id: str) -> int:
    """Rows of an uploaded file of the caller's; 0 = there is none."""
    try:
        return files.get_file(ctx.artifacts, file_id, caller).num_rows
    except NotFoundError:
        return 0
