"""On-policy distillation as a service. `from stillhouse import Client` is the entrance for programs.

The names are imported when they are used: services start without the client.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from stillhouse.client.aio import AsyncClient as AsyncClient
    from stillhouse.client.calls import ApiError as ApiError
    from stillhouse.client.client import Client as Client

_PLACES: Final = {
    "ApiError": "stillhouse.client.calls",
    "AsyncClient": "stillhouse.client.aio",
    "Client": "stillhouse.client.client",
}
__all__ = ["ApiError", "AsyncClient", "Client"]


def __dir__() -> list[str]:
    return [*globals(), *_PLACES]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'stillhouse' has no attribute '{name}'")
