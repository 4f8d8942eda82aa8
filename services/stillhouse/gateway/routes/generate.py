"""/v1/generate: a few completions by a model, to be looked at."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Body, Request

from stillhouse.core.schemas import Generation
from stillhouse.core.spec_generate import GenerateRequest
from stillhouse.gateway import generating
from stillhouse.gateway.deps import ByCaller, Ctx

router = APIRouter(prefix="/v1/generate", tags=["generate"])


@router.post("")
async def generate(
    ctx: Ctx, caller: ByCaller, request: Request, body: Annotated[GenerateRequest, Body()]
) -> Generation:
    """Completions of one prompt by a registered model or a checkpoint of one of your jobs. Nothing is stored.

    409: the checkpoint is no model yet. 503 with Retry-After: no sampler is running. 429: too many such requests at
    once, or the model is too large for samplers. 504: it took more than 85 s.
    """
    return await generating.generate(ctx, request.app.state.generate_slots, caller, body)
