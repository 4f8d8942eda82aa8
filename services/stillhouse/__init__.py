"""On-policy distillation as a service. `from stillhouse import Client` is the entrance for programs.

The names are imported when they are used: services start without the client.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from stillhouse.client.aio import AsyncClient
    from stillhouse.client.client import Client
    from stillhouse.client.errors import (
        ApiError,
        AuthenticationError,
        ConflictError,
        ForbiddenError,
        InvalidRequestError,
        NotFoundError,
        RateLimitError,
        ServerError,
    )
    from stillhouse.core.errors import DeadlineError, JobFailedError, StillhouseError, UnavailableError

__all__ = [
    "ApiError",
    "AsyncClient",
    "AuthenticationError",
    "Client",
    "ConflictError",
    "DeadlineError",
    "ForbiddenError",
    "InvalidRequestError",
    "JobFailedError",
    "NotFoundError",
    "RateLimitError",
    "ServerError",
    "StillhouseError",
    "UnavailableError",
]
_PLACES: Final = {"AsyncClient": "stillhouse.client.aio", "Client": "stillhouse.client.client"} | dict.fromkeys(
    ("DeadlineError", "JobFailedError", "StillhouseError", "UnavailableError"), "stillhouse.core.errors"
)
"""Where those are that are not in client/errors.py."""


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(_PLACES.get(name, "stillhouse.client.errors")), name)
    raise AttributeError(f"module 'stillhouse' has no attribute '{name}'")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
