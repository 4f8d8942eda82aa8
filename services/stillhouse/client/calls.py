"""A REST call as data: what is sent, what its answer is, and when it may be sent again."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Generic, TypeVar, cast
from urllib.parse import quote

import httpx

from stillhouse.client import answers
from stillhouse.core.errors import SpecError

T = TypeVar("T")
PAUSE_S: Final = 0.25
"""Pause before the first repeat; doubles each time, up to PAUSE_MAX_S, with jitter."""
PAUSE_MAX_S: Final = 4.0
RETRY_STATUS: Final = frozenset({429, 502, 503, 504})


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """A request whose answer is a `T`."""

    method: str
    path: str
    answer: type[T]
    """What the JSON of its answer is: a class of core/schemas, a Page of them; `str` and `bytes` = the body itself."""
    params: Mapping[str, Any] = field(default_factory=dict)
    """Query; None and '' are left out."""
    headers: Mapping[str, str] = field(default_factory=dict)
    json: Any = None
    file: Path | None = None
    """Body, streamed from disk."""
    may_repeat: bool = True
    """Doing it twice does what doing it once does, so it is repeated also when the answer got lost on the way."""
    retry_status: frozenset[int] = RETRY_STATUS
    """Answers after which it is sent again."""
    timeout_s: float | None = None
    """Longest silence of the gateway, where it is not that of other calls."""

    def after(self, last_id: str) -> Call[T]:
        """The same list, behind an entry."""
        return replace(self, params={**self.params, "after": last_id})

    def options(self, timeout_s: float) -> dict[str, Any]:
        """Arguments for httpx, without the body of a file."""
        silence = max(0.001, timeout_s)
        options: dict[str, Any] = {
            "params": {name: value for name, value in self.params.items() if value not in (None, "")},
            "headers": dict(self.headers),
            "timeout": httpx.Timeout(silence, connect=min(5.0, silence), pool=min(10.0, silence)),
        }
        if self.json is not None:
            options["json"] = self.json
        return options

    def read(self, response: httpx.Response) -> T:
        """A good answer.

        Raises:
            ValueError: it is no JSON.
        """
        if self.answer is bytes:
            return cast(T, response.content)
        if self.answer is str:
            return cast(T, response.text)
        return answers.read(self.answer, response.json() if response.content else None)


def path(template: str, *parts: str) -> str:
    """`/v1/jobs/{}/events` with its parts, each as one segment whatever is in it.

    Raises:
        SpecError: a part is empty; the path would be that of something else.
    """
    for part in parts:
        if not part or part in (".", ".."):
            raise SpecError(f"'{part}' is no name or id (for {template})")
    return template.format(*(quote(str(part), safe="") for part in parts))


def pause_s(attempt: int) -> float:
    """Pause before repeat number `attempt` (from 0): doubling, with jitter."""
    return min(PAUSE_S * 2 ** min(attempt, 10), PAUSE_MAX_S) * random.uniform(0.5, 1.0)
