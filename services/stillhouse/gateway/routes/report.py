"""GET /v1/jobs/{id}/report: what was asked, what happened, what came out; as JSON or as a page."""

from __future__ import annotations

import asyncio
from typing import Final

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse

from stillhouse.core.report.facts import make_report
from stillhouse.core.report.page import page
from stillhouse.core.schemas import Report
from stillhouse.gateway.deps import Ctx, OwnJob
from stillhouse.gateway.routes.deadline import DeadlineRoute

router = APIRouter(prefix="/v1/jobs/{job_id}", tags=["history"], route_class=DeadlineRoute)
HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:",
    "X-Content-Type-Options": "nosniff",
    "Vary": "Accept",
}
"""The page has no scripts and fetches nothing, whatever a prompt says."""
PAGE: Final = {"content": {"text/html": {"schema": {"type": "string"}}}}


@router.get("/report", response_model=Report, responses={200: PAGE})
async def get_report(ctx: Ctx, request: Request, record: OwnJob) -> Report | Response:
    """The report of a job as it is now; with `Accept: text/html` a page that needs nothing else."""
    report = await asyncio.to_thread(make_report, record, ctx.artifacts.job(record.id))
    if "text/html" in request.headers.get("accept", ""):
        return HTMLResponse(await asyncio.to_thread(page, report), headers=HEADERS)
    return report
