"""/v1/jobs/{id}/dead_letters: samples that were given up, and another try at them."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Body, Query
from pydantic import BaseModel, ConfigDict, Field

from stillhouse.core import dead_letters
from stillhouse.core.errors import ConflictError, NotFoundError, UnavailableError
from stillhouse.core.pulls import leader
from stillhouse.core.queue import keys
from stillhouse.core.queue.jobs import JobRecord
from stillhouse.core.queue.streams import PAYLOAD
from stillhouse.core.schemas import DeadLetter, LetterRetries, LetterRetry, Page
from stillhouse.core.service import Context
from stillhouse.core.spec import ScheduleSpec
from stillhouse.gateway.deps import Ctx, OwnJob
from stillhouse.gateway.routes.deadline import DeadlineRoute
from stillhouse.v1 import rollout_pb2, trainer_pb2

router = APIRouter(prefix="/v1/jobs/{job_id}", tags=["history"], route_class=DeadlineRoute)
MOST_QUEUED = 10_000
"""Letters read from the queue: a job with more in flight fails by max_failed_fraction."""
RETRY_S = 15.0
"""Time in which the trainer has put samples back; less than what a request may take."""


class LettersQuery(BaseModel):
    """Which dead letters."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    after: str = Field(default="", max_length=200)
    """Id (sample) of the last letter of the page before."""
    limit: int = Field(default=100, ge=1, le=1000)
    """Letters in a page, at most."""


@router.get("/dead_letters")
async def get_dead_letters(ctx: Ctx, record: OwnJob, query: Annotated[LettersQuery, Query()]) -> Page[DeadLetter]:
    """Samples that could not be sampled or scored, by step: from the job's journals, and those given up just now."""
    artifacts = ctx.artifacts.job(record.id)

    def tell(error: str) -> None:
        ctx.log.warning("a journal cannot be read", job_id=record.id, error=error)

    live = await _queued(ctx, record)  # before the journals: what leaves the queue meanwhile is in them
    found = {letter.sample_id: letter for letter in live}
    found |= {letter.sample_id: letter for letter in await asyncio.to_thread(dead_letters.journalled, artifacts, tell)}
    letters = sorted(found.values(), key=lambda letter: letter.order)
    if query.after:
        if query.after not in found:
            raise NotFoundError(f"job {record.id} has no dead letter '{query.after}' (any more)", param="after")
        letters = [letter for letter in letters if letter.order > found[query.after].order]
    page = letters[: query.limit]
    return Page(data=[_view(letter) for letter in page], has_more=len(letters) > len(page))


class LettersBody(BaseModel):
    """Which dead letters to try again."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    ids: list[Annotated[str, Field(pattern=r"^[A-Za-z0-9_./-]{1,200}$")]] = Field(min_length=1, max_length=1000)
    """Ids of dead letters (samples)."""


@router.post("/dead_letters/retry")
async def retry_dead_letters(ctx: Ctx, record: OwnJob, body: Annotated[LettersBody, Body()]) -> LetterRetries:
    """Have samples that failed tried again. That works until their step is put together: then it is trained without
    them. What was scored before stays; the answer says of each whether it is tried, and if not, why.

    409: nothing of the job is in flight, or it is deterministic.
    """
    if record.is_terminal:  # its trainer may lead it a moment longer
        raise ConflictError(f"job {record.id} is '{record.status}': nothing of it is in flight any more")
    entries = await _dead(ctx, record)  # what fails again meanwhile stays
    try:
        trainer = await leader(ctx, record.id)
    except UnavailableError as error:
        raise ConflictError(f"no trainer leads job {record.id}, which is '{record.status}': {error.message}") from None
    request = trainer_pb2.RetrySamplesRequest(job_id=record.id, epoch=record.epoch, sample_ids=body.ids)
    answer = await trainer.unary("RetrySamples", request, timeout_s=RETRY_S)
    gone = [entry_id for entry_id, sample_id in entries if answer.refusals.get(sample_id) == ""]
    if gone:
        await ctx.redis.xdel(keys.dead(record.id, record.epoch), *gone)
    found = [LetterRetry(id=name, is_retried=not why, message=why) for name, why in answer.refusals.items()]
    return LetterRetries(data=sorted(found, key=lambda letter: body.ids.index(letter.id)))


async def _dead(ctx: Context, record: JobRecord) -> list[tuple[bytes, str]]:
    """(entry, sample) of what the queue holds."""
    entries: Any = await ctx.redis.xrange(keys.dead(record.id, record.epoch), count=MOST_QUEUED)
    return [
        (entry_id, rollout_pb2.Score.FromString(fields[PAYLOAD.encode()]).rollout.sample_id)
        for entry_id, fields in entries
    ]


async def _queued(ctx: Context, record: JobRecord) -> list[dead_letters.DeadLetter]:
    if record.is_terminal:
        return []
    entries: Any = await ctx.redis.xrange(keys.dead(record.id, record.epoch), count=MOST_QUEUED)
    schedules = [ScheduleSpec.model_validate(stage["schedule"]) for stage in record.spec["stages"]]
    return dead_letters.queued([fields[PAYLOAD.encode()] for _, fields in entries], record.epoch, schedules)


def _view(letter: dead_letters.DeadLetter) -> DeadLetter:
    step = None if letter.step is None else letter.step + 1
    names = ("epoch", "row", "teacher", "reason", "message", "service", "attempts", "is_journalled")
    return DeadLetter(id=letter.sample_id, step=step, **{name: getattr(letter, name) for name in names})
