"""The REST application, wired in one place.

Order of the layers, outermost first: Edge (request id, authentication, rates, log, errors) -> JsonBody (limits) ->
routes.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import FastAPI, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from redis.exceptions import RedisError
from starlette.exceptions import HTTPException

from stillhouse.core.config import Settings
from stillhouse.core.errors import StillhouseError
from stillhouse.core.service import VERSION, Context
from stillhouse.gateway import generating
from stillhouse.gateway.auth import Authenticator
from stillhouse.gateway.following import Tails
from stillhouse.gateway.limits import RateLimiter
from stillhouse.gateway.middleware import Edge, JsonBody
from stillhouse.gateway.problems import MEDIA_TYPE, Problem, problem_response
from stillhouse.gateway.routes import (
    checkpoints,
    dead_letters,
    files,
    fine_tuning,
    generate,
    history,
    jobs,
    keys,
    logs,
    report,
    samples,
    score,
    system,
)
from stillhouse.gateway.scoring import Slots

ROUTES = (
    jobs,
    history,
    report,
    samples,
    logs,
    checkpoints,
    dead_letters,
    files,
    score,
    generate,
    keys,
    fine_tuning,
    system,
)
"""Modules whose routes need a key, in the order in which the document lists them."""
_bearer = HTTPBearer(auto_error=False, description="stillhouse_... (the gateway checks it before any route)")


async def _documents_the_key(_: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)]) -> None:
    """Puts the key into the OpenAPI document; Edge is what checks it."""


def create_app(ctx: Context, settings: Settings) -> FastAPI:
    """The application on given connections. Starts nothing in the background: see __main__.py."""
    app = FastAPI(
        title="Stillhouse",
        summary="On-policy distillation as a service",
        version=VERSION,
        docs_url="/docs",
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
        responses={"default": {"model": Problem, "description": "Problem (RFC 9457)"}},
    )
    app.state.ctx = ctx
    app.state.tails = Tails(ctx)
    app.state.score_slots = Slots()
    app.state.generate_slots = Slots(generating.MAX_RUNNING, "generate")
    for routes in ROUTES:
        app.include_router(routes.router, dependencies=[Security(_documents_the_key)])
    app.include_router(system.open_router)
    for kind in (StillhouseError, RequestValidationError, HTTPException, RedisError, TimeoutError, OSError):
        app.add_exception_handler(kind, _on_error)
    app.add_middleware(JsonBody, settings=settings)
    # added last = outermost
    app.add_middleware(Edge, authenticator=Authenticator(settings), rates=RateLimiter(ctx), log=ctx.log)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


async def _on_error(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, RedisError):
        request.app.state.ctx.log.error("queue server failed", path=request.url.path, error=str(error))
    response = problem_response(error, request.url.path, request.state.request_id)
    if response.status_code == 500:
        request.app.state.ctx.log.error("request failed", path=request.url.path, exc_info=error)
    elif isinstance(error, OSError) and response.status_code == 507:
        request.app.state.ctx.log.error("no space left", path=request.url.path, error=str(error))
    return response


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document, with errors as they really are: its own 422 is not what leaves this gateway."""
    if app.openapi_schema is None:
        document = FastAPI.openapi(app)
        for path in document["paths"].values():
            for operation in path.values():
                responses = operation["responses"]
                responses.pop("422", None)
                problem = responses["default"]["content"]
                problem[MEDIA_TYPE] = problem.pop("application/json")
        for name in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(name, None)
    return app.openapi_schema or {}
