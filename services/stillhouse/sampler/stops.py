"""Stop strings: which token of a completion is its last, because the text up to it holds one of them.

The text of a completion is what its tokens decode to, special tokens included, so that a stop string may name one. A
token may be part of a character or hold several words, hence the rule is about texts: a completion ends with the first
token after which its text contains a stop string. Decoding everything after every token would say the same; here only
the last few tokens are decoded, which costs microseconds. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from tokenizers import Tokenizer

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
