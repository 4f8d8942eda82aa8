"""What all resources share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from pydantic import BaseModel

from stillhouse.client.calls import Call
from stillhouse.client.errors import NotFoundError
from stillhouse.client.sender import Sender

if TYPE_CHECKING:
    from stillhouse.core.spec import JobSpec

PAGE: Final = 100
"""Entries asked for at once."""
EXPORT: Final = "ckpt_export"
"""Id of the finished student among the checkpoints."""


class Resource:
    """A group of calls."""

    def __init__(self, sender: Sender) -> None:
        self._sender = sender


def body_of(spec: Mapping[str, Any] | JobSpec) -> dict[str, Any]:
    """A job as JSON; of a JobSpec what was set, so that defaults stay the gateway's."""
    return spec.model_dump(mode="json", exclude_unset=True) if isinstance(spec, BaseModel) else dict(spec)


async def tell(callback: Callable[..., object] | None, *values: Any) -> None:
    """Call a user's function; with AsyncClient it may be a coroutine function."""
    if callback is not None:
        found = callback(*values)
        if inspect.isawaitable(found):
            await found


async def delete(sender: Sender, where: str) -> None:
    """DELETE; what a lost attempt has deleted is deleted."""
    try:
        await sender.send(Call("DELETE", where, object))
    except NotFoundError as error:
        if not error.is_repeat:
            raise
