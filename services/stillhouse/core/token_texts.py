"""Tokens as text, so that the texts of all tokens, joined, are the text of the whole. Needs `tokenizers`.

A token need not be text alone: a character of several bytes may take several tokens, and some decoders drop the space
before a first word. So a token is decoded after what is before it, and neighbours that are no text alone together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from tokenizers import Tokenizer

REPLACEMENT: Final = "\ufffd"
"""What stands for bytes that are no text."""
MAX_RUN: Final = 256
"""Tokens that are no text alone, looked at together: the work grows with the square. No character takes so many."""


def whole_text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of tokens, special ones shown."""
    return tokenizer.decode(list(ids), skip_special_tokens=False)


def texts_alone(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Each token as text by itself; bytes that are no text alone show as U+FFFD."""
    return tokenizer.decode_batch([[token] for token in ids], skip_special_tokens=False)


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Text that each token adds. A character of several tokens is the last one's, the others have ''."""
    alone = texts_alone(tokenizer, ids)
    texts: list[str] = []
    context: list[int] = []
    for first, last in _runs(alone):
        run = list(ids[first:last])
        texts += _added(tokenizer, context, run)
        context = run
    return texts


def _runs(alone: Sequence[str]) -> Iterator[tuple[int, int]]:
    """[first, last) of tokens to decode together: one that is text alone, or neighbours that are none."""
    first = 0
    while first < len(alone):
        last = first + 1
        if REPLACEMENT in alone[first]:
            while last < len(alone) and REPLACEMENT in alone[last] and last - first < MAX_RUN:
                last += 1
        yield first, last
        first = last


def _added(tokenizer: Tokenizer, context: list[int], run: list[int]) -> list[str]:
    """What each token of a run adds to the text after `context`: as much of the whole run's text as is certain then."""
    prefixes = [[*context, *run[:count]] for count in range(len(run) + 1)]
    before, *grown = tokenizer.decode_batch(prefixes, skip_special_tokens=False)
    whole, shown = grown[-1], len(before)
    texts = []
    for text in grown:
        certain = max(shown, _shared(text, whole))
        texts.append(whole[shown:certain])
        shown = certain
    return texts


def _shared(text: str, other: str) -> int:
    """Length of their common beginning."""
    pairs = zip(text, other, strict=False)
    return next((index for index, (ours, theirs) in enumerate(pairs) if ours != theirs), min(len(text), len(other)))
