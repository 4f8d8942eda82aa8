"""/v1/jobs/{id}/samples: what a job trained on, token by token."""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel, ConfigDict, Field

from stillhouse.core.schemas import Page, Sample
from stillhouse.gateway.deps import Ctx, OwnJob
from stillhouse.gateway.routes.deadline import DeadlineRoute
from stillhouse.gateway.sample_pages import Wanted, read_samples

router = APIRouter(prefix="/v1/jobs/{job_id}", tags=["history"], route_class=DeadlineRoute)


class SamplesQuery(BaseModel):
    """Which samples."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    step: int | None = Field(default=None, ge=1, le=1_000_000_000)
    """Only of this optimizer step; the first is 1."""
    teacher: str = Field(default="", max_length=200)
    """Only those that this teacher judged, in its words."""
    limit: int = Field(default=20, ge=1, le=100)
    """Samples in a page, at most; a page of very long ones ends earlier."""
    after: str = Field(default="", pattern=r"^([0-9]{1,12}/[0-9]{1,6})?$")
    """Id of the last sample of the page before."""
    order: Literal["asc", "desc"] = "desc"
    """Of the steps; desc = newest first. Inside a step, samples come as it was planned."""
    top: int = Field(default=5, ge=0, le=100)
    """Alternatives to each token, at most, where the job stored any."""


@router.get("/samples", response_model=Page[Sample])
async def get_samples(ctx: Ctx, record: OwnJob, query: Annotated[SamplesQuery, Query()]) -> Response:
    """What the steps trained on, with log-probabilities of the student as it wrote and of its teacher."""
    wanted = Wanted(**query.model_dump())
    # megabytes of JSON are written beside the event loop, too
    body = await asyncio.to_thread(lambda: read_samples(ctx, record, wanted).model_dump_json())
    return Response(body, media_type="application/json")
