"""/v1/score: texts, judged token by token by a registered model."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Body, Depends, Request

from stillhouse.core.service import Context
from stillhouse.core.spec_score import ScoreRequest
from stillhouse.gateway import scoring
from stillhouse.gateway.deps import get_context
from stillhouse.gateway.schemas import Scores

router = APIRouter(prefix="/v1/score", tags=["scores"])
Ctx = Annotated[Context, Depends(get_context)]


@router.post("")
async def score(ctx: Ctx, request: Request, body: Annotated[ScoreRequest, Body()]) -> Scores:
    """Log-probability of every token of some texts, and the likeliest alternatives. Nothing is stored.

    503 with Retry-After: no teacher is running, or it still loads the model. 429: too many such requests at once.
    """
    return await scoring.score(ctx, request.app.state.score_slots, body)
