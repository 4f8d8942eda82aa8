"""/v1/score: texts, judged token by token by a registered model."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Body, Request

from stillhouse.core.schemas import Scores
from stillhouse.core.spec_score import ScoreRequest
from stillhouse.gateway import scoring
from stillhouse.gateway.deps import Ctx

router = APIRouter(prefix="/v1/score", tags=["scores"])


@router.post("")
async def score(ctx: Ctx, request: Request, body: Annotated[ScoreRequest, Body()]) -> Scores:
    """Log-probability of every token of some texts, and the likeliest alternatives. Nothing is stored.

    503 with Retry-After: no teacher is running, or it still loads the model. 429: too many such requests at once.
    """
    return await scoring.score(ctx, request.app.state.score_slots, body)
