"""How the judges and their worker processes talk: JSON after four bytes of length. Never pickle: data stays data."""

from __future__ import annotations

import asyncio
import json
from typing import Any, BinaryIO, Final

from stillhouse.core.errors import WireError

FRAME_MAX: Final = 32 << 20
"""Bytes of a frame: a million characters of text and an answer, each up to 12 bytes as JSON, and the row."""
_HEAD: Final = 4


def encode(message: dict[str, Any]) -> bytes:
    """A frame. ASCII only, so that a lone surrogate in a text travels like any other character.

    Raises:
        WireError: it is over FRAME_MAX or holds what JSON cannot say.
    """
    try:
        body = json.dumps(message, allow_nan=False).encode("ascii")
    except (TypeError, ValueError, RecursionError) as error:
        raise WireError(f"not JSON: {error}") from None
    if len(body) > FRAME_MAX:
        raise WireError(f"{len(body)} bytes for a verifier, at most {FRAME_MAX} are allowed")
    return len(body).to_bytes(_HEAD, "big") + body


def _size(head: bytes) -> int:
    size = int.from_bytes(head, "big")
    if size > FRAME_MAX:
        raise WireError(f"a frame of {size} bytes, at most {FRAME_MAX} are allowed")
    return size


def _decode(body: bytes) -> dict[str, Any]:
    try:
        message = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise WireError(f"a frame that is not JSON: {error}") from None
    if not isinstance(message, dict):
        raise WireError(f"a frame that holds a {type(message).__name__} instead of an object")
    return message


def read(stream: BinaryIO) -> dict[str, Any] | None:
    """The next message; None when the other side has closed the pipe."""
    head = stream.read(_HEAD)
    if len(head) < _HEAD:
        return None
    size = _size(head)
    body = stream.read(size)
    return _decode(body) if len(body) == size else None


async def read_async(stream: asyncio.StreamReader) -> dict[str, Any]:
    """The next message.

    Raises:
        asyncio.IncompleteReadError: the other side has closed the pipe.
    """
    size = _size(await stream.readexactly(_HEAD))
    return _decode(await stream.readexactly(size))
