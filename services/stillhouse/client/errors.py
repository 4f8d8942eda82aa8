"""What the gateway refused, by kind.

    >>> try:
    ...     client.jobs.get("job_gone00000000")
    ... except NotFoundError as error:
    ...     print(error.detail)
    no job 'job_gone00000000'

A gateway that does not answer at all is an `UnavailableError`, a wait that took too long a `DeadlineError`
(core/errors.py). Everything is a `StillhouseError`.
"""

from __future__ import annotations

from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Final

import httpx

from stillhouse.core import errors


class ApiError(errors.StillhouseError):
    """The gateway refused a request."""

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        *,
        param: str | None = None,
        request_id: str = "",
        errors: Any = (),
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(detail, param=param)
        self.status = status
        """HTTP status."""
        self.code = code
        """Stable name of the kind of error."""
        self.detail = detail
        """What is wrong and how to fix it."""
        self.request_id = request_id
        """Finds the request in the gateway's log."""
        self.errors = list(errors)
        """Every finding {param, message, fix}, where there were several."""
        self.retry_after_s = retry_after_s
        """When the gateway wants to be asked again, seconds; None = it does not say."""
        self.is_repeat = False
        """An earlier attempt of this call may have been carried out: its answer got lost on the way."""

    def __reduce__(self):
        state = {**self.__dict__}
        return (_rebuild, (type(self), state))


def _rebuild(cls: type[ApiError], state: dict[str, Any]) -> ApiError:
    made = cls(state["status"], state["code"], state["detail"])
    made.__dict__.update(state)
    return made


class InvalidRequestError(ApiError, ValueError):
    """400, 413, 415, 422: what was sent cannot be accepted; `param` and `errors` say where."""


class AuthenticationError(ApiError):
    """401: the API key is missing or wrong."""


class ForbiddenError(ApiError):
    """403: the API key is right and not allowed to do this."""


class NotFoundError(ApiError, errors.NotFoundError):
    """404: there is no such thing (any more), or it belongs to somebody else."""


class ConflictError(ApiError, errors.ConflictError):
    """409: it does not fit the present state, for example cancelling a finished job."""


class RateLimitError(ApiError):
    """429: a limit or quota is reached; `retry_after_s` says when to come back."""


class ServerError(ApiError):
    """5xx: the gateway could not do it."""


_KINDS: Final[dict[int, type[ApiError]]] = {
    **dict.fromkeys((400, 413, 415, 422), InvalidRequestError),
    401: AuthenticationError,
    403: ForbiddenError,
    404: NotFoundError,
    409: ConflictError,
    429: RateLimitError,
}


def read_error(response: httpx.Response) -> ApiError:
    """The error in an answer; also of a proxy that knows nothing of our problems."""
    try:
        body = response.json()
    except ValueError:
        body = {}
    if not isinstance(body, dict) or "code" not in body:
        body = {"code": "http", "detail": f"HTTP {response.status_code} from {response.url}: {response.text[:200]}"}
    status = response.status_code
    return _KINDS.get(status, ServerError if status >= 500 else ApiError)(
        status,
        body["code"],
        body.get("detail", ""),
        param=body.get("param"),
        request_id=body.get("request_id") or response.headers.get("x-request-id", ""),
        errors=body.get("errors") or (),
        retry_after_s=_retry_after_s(response.headers.get("retry-after", "")),
    )


def _retry_after_s(value: str) -> float | None:
    """Retry-After as seconds or as a date (RFC 9110, 10.2.3)."""
    if value.strip().isdigit():
        return float(value)
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return None
