"""Errors as `application/problem+json` (RFC 9457): one translation for everything that leaves the gateway.

Own fields beside the standard's: `code` (stable, for programs), `param` (path of the offending field), `request_id`,
and `errors` (every finding, each with param, message and fix). OpenAI's client reads `code` and `param` there too.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, Final

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from redis.exceptions import BusyLoadingError, OutOfMemoryError, ReadOnlyError, RedisError, ResponseError
from starlette.exceptions import HTTPException

from stillhouse.core.blobs import is_no_space
from stillhouse.core.errors import HTTP_STATUS, MalformedError, RateError, SpecError, StillhouseError, lookup
from stillhouse.core.explain import Finding, explain
from stillhouse.core.metrics import PROBLEMS
from stillhouse.core.spec import JobSpec
from stillhouse.core.spec_generate import GenerateRequest
from stillhouse.core.spec_score import ScoreRequest

MEDIA_TYPE: Final = "application/problem+json"
RETRY_AFTER_S: Final = 2
"""Told to callers on 429 and 503: a restart of the queue server or of a replica takes about as long."""
BODIES: Final[dict[str, type[BaseModel]]] = {"/v1/score": ScoreRequest, "/v1/generate": GenerateRequest}
"""Formats of bodies that are no job, by path: whose keys are proposed for an unknown one."""
OPENAI_PATHS: Final = ("/v1/fine_tuning/", "/v1/files")
"""Routes of OpenAI's clients."""
_PASSING: Final = {
    "MISCONF": "the queue server cannot write to its disk: free space there; nothing is lost",
    "NOREPLICAS": "the queue server has fewer replicas than its min-replicas-to-write asks for; try again",
    "MASTERDOWN": "the queue server is a replica without its primary: point redis_url at the primary",
    "TRYAGAIN": "the queue server is moving data; try again",
}
"""Answers of a queue server that refuse a right command for now."""
_CODES: Final = {400: "malformed", 404: "not_found", 405: "method_not_allowed", 408: "deadline", 503: "unavailable"}


class OpenAIError(BaseModel):
    """An error as OpenAI's clients read it."""

    message: str
    type: str
    param: str | None
    code: str


class Problem(BaseModel):
    """Body of every error answer."""

    type: str = Field(examples=["urn:stillhouse:error:invalid_request"])
    title: str
    """The HTTP status in words."""
    status: int
    detail: str
    """What is wrong and how to fix it."""
    instance: str
    """Path of the request."""
    code: str
    """Stable name of the kind of error."""
    param: str | None = None
    """Path of the offending field, for example stages.0.loss.objective."""
    request_id: str
    errors: list[dict[str, str]] = []
    """Every finding, where there can be several."""
    error: OpenAIError | None = None
    """The same for clients of OpenAI, on the routes that those use."""


class ProblemResponse(JSONResponse):
    """A problem in pure ASCII: it quotes what the user sent, which may not be encodable (lone surrogates)."""

    media_type = MEDIA_TYPE

    def render(self, content: Any) -> bytes:
        return json.dumps(content).encode()


class InvalidError(SpecError):
    """A request with one or more wrong fields."""

    def __init__(self, findings: Sequence[Finding]) -> None:
        super().__init__(findings[0].text(), param=findings[0].param)
        self.findings = list(findings)


def problem_response(error: BaseException, path: str, request_id: str) -> JSONResponse:
    """The answer to an error. Unknown errors say nothing about themselves: their traceback is in the log."""
    headers: Mapping[str, str] = {}
    findings: list[Finding] = []
    param = None
    if isinstance(error, RequestValidationError):
        error = _from_pydantic(error, BODIES.get(path, JobSpec))
    if isinstance(error, StillhouseError):
        status, code, detail, param = lookup(HTTP_STATUS, error, 500), error.code, error.message, error.param
        findings = error.findings if isinstance(error, InvalidError) else []
        if isinstance(error, RateError):
            headers = {"Retry-After": str(math.ceil(error.retry_after_s))}
        if len(findings) > 1:
            detail += f" (and {len(findings) - 1} more, see errors)"
    elif isinstance(error, HTTPException):
        status, headers = error.status_code, error.headers or {}
        code = _CODES.get(status, "invalid_request")
        detail = f"there is no {path}; see /docs for what there is" if status == 404 else str(error.detail)
    elif isinstance(error, (RedisError, asyncio.TimeoutError)):
        detail = queue_trouble(error)
        status, code = (503, "unavailable") if detail else (500, "internal")
    elif is_no_space(error):
        status, code, detail = 507, "no_space", "the disk of the artifacts is full; free some and try again"
    else:
        status, code, detail = 500, "internal", ""
    if status == 500:
        code, detail, param = "internal", "unexpected error; the log has the details under this request_id", None
    PROBLEMS.labels(code).inc()
    return _render(status, code, detail, param, findings, path, request_id, headers)


def queue_trouble(error: BaseException) -> str:
    """What is wrong with the queue server and what helps; '' = it calls our command wrong, trying again cannot help."""
    if isinstance(error, OutOfMemoryError):
        return "the queue server is out of memory: raise its maxmemory, or finish or cancel jobs; nothing is lost"
    if isinstance(error, ReadOnlyError):
        return "the queue server is a read-only replica: point redis_url at the primary, or wait for the failover"
    if isinstance(error, BusyLoadingError):
        return "the queue server is loading its data after a start; try again"
    if isinstance(error, ResponseError):
        return next((fix for start, fix in _PASSING.items() if str(error).startswith(start)), "")
    return "the queue server does not answer; try again"


def _render(
    status: int,
    code: str,
    detail: str,
    param: str | None,
    findings: Sequence[Finding],
    path: str,
    request_id: str,
    headers: Mapping[str, str],
) -> JSONResponse:
    problem = Problem(
        type=f"urn:stillhouse:error:{code}",
        title=HTTPStatus(status).phrase,
        status=status,
        detail=detail,
        instance=path,
        code=code,
        param=param,
        request_id=request_id,
        errors=[finding.as_json() for finding in findings],
    )
    if path.startswith(OPENAI_PATHS):
        problem.error = OpenAIError(message=detail, type=problem.type, param=param, code=code)
    extra = dict(headers)
    if status == 401:
        extra["WWW-Authenticate"] = 'Bearer realm="stillhouse"'
    if status in (429, 503):
        extra.setdefault("Retry-After", str(RETRY_AFTER_S))
    return ProblemResponse(
        problem.model_dump(exclude=None if problem.error else {"error"}), status_code=status, headers=extra
    )


def _from_pydantic(error: RequestValidationError, body_model: type[BaseModel]) -> StillhouseError:
    errors: list[Any] = list(error.errors())
    broken = next((item for item in errors if item["type"] == "json_invalid"), None)
    if broken is not None:
        return MalformedError(f"the body is not valid JSON: {broken['ctx']['error']} at character {broken['loc'][-1]}")
    return InvalidError(explain(errors, error.body, body_model))
