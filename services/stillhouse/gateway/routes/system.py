"""Models, verifiers, recipes, services, health and metrics."""

from __future__ import annotations

import asyncio
import os
from typing import Final

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from redis.exceptions import RedisError

from stillhouse.core import recipes
from stillhouse.core.errors import UnavailableError
from stillhouse.core.metrics import exported
from stillhouse.core.schemas import Health, Model, Page, Recipe, Services, Verifier
from stillhouse.core.service import VERSION
from stillhouse.core.verifiers import verifiers
from stillhouse.gateway import queues
from stillhouse.gateway.deps import ByCaller, Ctx
from stillhouse.gateway.routes.deadline import DeadlineRoute
from stillhouse.gateway.views import verifier_view

router = APIRouter(prefix="/v1", tags=["system"], route_class=DeadlineRoute)
open_router = APIRouter(tags=["health"])
_METRICS: Final = exported("gateway")
READY_TIMEOUT_S: Final = 2.0
"""A probe wants an answer, not patience."""


@router.get("/models")
async def list_models(ctx: Ctx, caller: ByCaller) -> Page[Model]:
    """Models that jobs may name as student or teacher, where they are loaded, and the caller's jobs that use them."""
    entries = ctx.models.all()
    return Page(data=await queues.models(ctx, caller, [entries[name] for name in sorted(entries)]))


@router.get("/models/{name}")
async def get_model(ctx: Ctx, caller: ByCaller, name: str) -> Model:
    """A model."""
    return (await queues.models(ctx, caller, [ctx.models.get(name)]))[0]


@router.get("/verifiers")
async def list_verifiers() -> Page[Verifier]:
    """Verifiers that rows and rewards may name, as installed beside the gateway."""
    return Page(data=[verifier_view(info) for info in verifiers().values()])


@router.get("/recipes")
async def list_recipes() -> Page[Recipe]:
    """Presets that stages may name, with the source of every value."""
    return Page(data=[Recipe.model_validate(recipes.described(name)) for name in recipes.recipes()])


@router.get("/recipes/{name}")
async def get_recipe(name: str) -> Recipe:
    """A recipe."""
    return Recipe.model_validate(recipes.described(name))


@router.get("/services")
async def list_services(ctx: Ctx, caller: ByCaller) -> Services:
    """Live processes of the deployment, and the work that waits for them. Jobs of others are not named."""
    return await queues.services(ctx, caller)


@open_router.get("/healthz")
async def healthz() -> Health:
    """The process is alive; says nothing about others."""
    return Health(status="ok", version=VERSION)


@open_router.get("/readyz")
async def readyz(ctx: Ctx) -> Health:
    """Requests can be served: the queue server answers and the artifacts folder can be written."""
    if ctx.stop.is_set():
        raise UnavailableError("this gateway is shutting down")
    try:
        async with asyncio.timeout(READY_TIMEOUT_S):
            await ctx.redis.ping()
    except (RedisError, OSError, TimeoutError):
        raise UnavailableError("the queue server does not answer") from None
    root = ctx.artifacts.root
    if not os.access(root, os.W_OK):
        raise UnavailableError("the artifacts folder cannot be written")
    return Health(status="ready", version=VERSION)


@open_router.get("/metrics", response_class=Response)
async def metrics() -> Response:
    """Prometheus metrics of this process."""
    return Response(generate_latest(_METRICS), media_type=CONTENT_TYPE_LATEST)
