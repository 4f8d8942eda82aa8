"""Stop strings: which token of a completion is its last, because the text up to it holds one of them.

The text of a completion is what its tokens decode to, special tokens included, so that a stop string may name one. A
token may be part of a character or hold several words, hence the rule is about texts: a completion ends with the first
token after which its text contains a stop string. Decoding everything after every token would say the same; here only
the last few tokens are decoded, which costs microseconds. No torch.

Engines know tokens only: `StoppingEngine` stands around one and cuts what comes out of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Final

import numpy as np
from tokenizers import Tokenizer

from stillhouse.core.models import ModelEntry
from stillhouse.core.vocabulary import tokenizer_of
from stillhouse.sampler.engines.base import Engine, Piece, SampleRequest

INCOMPLETE: Final = "\ufffd"
"""What bytes that are not (yet) a character decode to."""
MAX_PENDING: Final = 64
"""Tokens without an end of a character among them after which their text is taken as it is: they are no text."""


class StopMatcher:
    """Watches one completion for stop strings."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._reach = max(map(len, stops)) - 1
        """A stop string that a new token completes begins at most so many characters before its text."""
        self._tail = ""
        """The last `reach` characters of the text that no later token changes."""
        self._context: list[int] = []
        """The tokens that ended that text: decoders look at what stands before a token."""
        self._context_text = ""
        self._pending: list[int] = []
        """The tokens after them."""

    def feed(self, ids: Sequence[int]) -> int | None:
        """Read the next tokens; gives how many of them belong to the completion, if it ends among them, else None."""
        for number, token in enumerate(ids, start=1):
            if self._completes(token):
                return number
        return None

    def _completes(self, token: int) -> bool:
        self._pending.append(token)
        text = self._pending_text()
        if any(stop in self._tail + text for stop in self._stops):
            return True
        is_settled = bool(text) and not text.endswith(INCOMPLETE)
        if is_settled or len(self._pending) >= MAX_PENDING:
            self._tail = (self._tail + text)[-self._reach :] if self._reach else ""
            self._context, self._pending = self._pending, []
            self._context_text = self._decode(self._context)
        return False

    def _pending_text(self) -> str:
        """What the pending tokens add to the text."""
        whole = self._decode(self._context + self._pending)
        # a common prefix and not a length: a context that ends within a character decodes otherwise once it is complete
        return whole[_common(whole, self._context_text) :]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def _common(left: str, right: str) -> int:
    """Characters with which both begin."""
    pairs = zip(left, right, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))


class StoppingEngine:
    """An engine whose completions end at stop strings, too."""

    def __init__(self, engine: Engine, entry: ModelEntry) -> None:
        self._engine = engine
        self._entry = entry
        self.name = engine.name
        self.vocab_size = engine.vocab_size
        self.max_sequence_length = engine.max_sequence_length
        self.max_sequences = engine.max_sequences

    async def generate(self, requests: Sequence[SampleRequest], *, alone: bool = False) -> AsyncGenerator[Piece, None]:
        """As the engine's. What stopped is aborted, but not with `alone`: when that would arrive depends on the clock,
        and the last bits of the others on when it leaves their batch. There it writes on for nobody.
        """
        matchers = await self._matchers(requests)
        # what others wrote may hold a stop string already: nothing is left to write
        ended = [request for request in requests if request.stop and matchers[request.key].feed(request.written)]
        for request in ended:
            yield Piece(request.key, [], [], finish_reason="stop")
        open_keys = {request.key for request in requests} - {request.key for request in ended}
        wanted = [request for request in requests if request.key in open_keys]
        async with aclosing(self._engine.generate(wanted, alone=alone)) as pieces:
            async for piece in pieces:
                if piece.key not in open_keys:
                    continue  # it was cut
                number = matchers[piece.key].feed(piece.ids) if piece.key in matchers else None
                if number is not None:
                    if not piece.finish_reason and not alone:
                        self._engine.abort([piece.key])
                    piece = _cut(piece, number)
                if piece.finish_reason:
                    open_keys.discard(piece.key)
                yield piece
                if not open_keys:
                    return

    async def _matchers(self, requests: Sequence[SampleRequest]) -> dict[str, StopMatcher]:
        """By key, of the requests that have stop strings."""
        stopping = [request for request in requests if request.stop]
        if not stopping:
            return {}
        tokenizer = await asyncio.to_thread(tokenizer_of, self._entry)
        return {request.key: StopMatcher(tokenizer, request.stop) for request in stopping}

    def abort(self, keys: Iterable[str]) -> int:
        return self._engine.abort(keys)

    async def pause(self) -> None:
        await self._engine.pause()

    async def resume(self) -> None:
        await self._engine.resume()

    async def load_weights(
        self, arrays: Mapping[str, np.ndarray[Any, Any]], dtypes: Mapping[str, int], tag: int
    ) -> None:
        await self._engine.load_weights(arrays, dtypes, tag)

    async def close(self) -> None:
        await self._engine.close()


def _cut(piece: Piece, number: int) -> Piece:
    """The first `number` tokens of a piece, as an end."""
    return replace(
        piece,
        ids=piece.ids[:number],
        logprobs=piece.logprobs[:number],
        target_ids=None if piece.target_ids is None else piece.target_ids[:number],
        entropies=None if piece.entropies is None else piece.entropies[:number],
        finish_reason="stop",
        reason="",
        message="",
    )
