"""Server-sent events: read, and followed over connections that break."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any, Final, TypeVar

from stillhouse.client import answers
from stillhouse.client.calls import Call
from stillhouse.client.sender import OUTAGE_S, Sender, is_passing
from stillhouse.core.errors import StillhouseError, UnavailableError
from stillhouse.core.schemas import Page

T = TypeVar("T", bound=Any)
SILENCE_S: Final = 45.0
"""The gateway sends a comment every 15 s: three are missing before we connect again."""


class Reader:
    """Events from lines. What a broken connection leaves unfinished is not one: it comes again."""

    def __init__(self) -> None:
        self._data: list[str] = []

    def feed(self, line: str) -> Any:
        """Take a line; the JSON of an event when it ends one, else None."""
        if line.startswith("data:"):
            self._data.append(line[5:].removeprefix(" "))
        if line or not self._data:
            return None
        text, self._data = "\n".join(self._data), []
        return json.loads(text)


async def follow(
    sender: Sender,
    pages: Call[Page[T]],
    stream: Call[Any],
    kind: type[T],
    after: str,
    *,
    is_last: Callable[[T], bool],
    is_over: Callable[[], Awaitable[bool]],
) -> AsyncIterator[T]:
    """Entries after the one with id `after`, each once and in order, as they come.

    consumes:     the list `pages` as the `stream` of it; after a break it goes on behind the last entry that came whole
    waits for:    the next entry; a gateway that had answered and does not any more, up to OUTAGE_S
    unblocked by: the last entry; a stream that ends when all is over (the rest then comes as pages); an error that
                  waiting does not cure
    """
    patience, has_answered = sender.patience(), False
    while True:
        try:
            async with sender.stream(_behind(stream, after)) as answer:
                has_answered, patience.ends_at = True, time.monotonic() + OUTAGE_S
                reader = Reader()
                async for line in answer.lines():
                    found = reader.feed(line)
                    if found is not None:
                        item = answers.read(kind, found)
                        after, patience = item.id, sender.outage()
                        yield item
                        if is_last(item):
                            return
            if await is_over():
                break
            problem: StillhouseError = UnavailableError(f"the stream {pages.path} ends before its time")
        except StillhouseError as error:
            if not is_passing(error):
                raise
            problem = error
        if has_answered and patience.attempt == 0:
            patience = sender.outage()
        await sender.again(patience, problem)
    async for item in sender.pages(pages.after(after)):
        yield item


def _behind(stream: Call[Any], after: str) -> Call[Any]:
    headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": after} if after else {})
    return replace(stream, headers=headers, timeout_s=SILENCE_S)
