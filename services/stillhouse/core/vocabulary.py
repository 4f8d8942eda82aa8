"""Tokenizers of registered models, and whether two models speak the same tokens. Needs `tokenizers`."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Final

from tokenizers import Tokenizer

from stillhouse.core.blobs import read_json
from stillhouse.core.models import ModelEntry, read_vocabulary

TOKENIZER_FILE: Final = "tokenizer.json"
PROBES: Final = (
    "The quick brown fox doesn't jump; 3.14159 + 27 = ?",
    "  two  spaces,\ttab,\r\nline ends\n\n\n",
    "naïve Zoë, Straße, Ελλάδα, привет, 日本語, العربية, 😀👩‍🚀",
    "def f(x_1):\n    return {'a': [x_1 ** 2, None]}  # <b>&amp;</b> https://example.org/?q=1",
)
"""Texts on whose tokens two tokenizers must agree: words, digits, white space, scripts, characters of several bytes."""


def tokenizer_of(entry: ModelEntry) -> Tokenizer:
    """A model's tokenizer, for whole texts. The first time it reads the file, up to a second: call it in a thread."""
    with _LOADING:
        return _load(str(Path(entry.path) / TOKENIZER_FILE), entry.files.get(TOKENIZER_FILE, ""))


def difference(student: ModelEntry, teacher: ModelEntry) -> str | None:
    """The first thing in which the tokenizers of two models differ, for people; None = a teacher's scores of the
    student's tokens mean what they seem to.

    Compared are the vocabularies (special tokens first), then, where those are equal, what becomes of `PROBES`.
    """
    if student.tokenizer_sha256 != teacher.tokenizer_sha256:
        return _other_vocabulary(student, teacher)
    if student.files.get(TOKENIZER_FILE) == teacher.files.get(TOKENIZER_FILE):
        return None
    return _other_rules(student, teacher)


def _other_vocabulary(student: ModelEntry, teacher: ModelEntry) -> str:
    ours, theirs = (_tokens_by_id(entry) for entry in (student, teacher))
    special = {token for entry in (student, teacher) for token in _special_ids(entry)}
    differing = [token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)]
    # special tokens first: they are few, and what templates and ends of completions rest on
    first = min(differing, key=lambda token: (token not in special, token))
    kind = "special token" if first in special else "token"
    sizes = f"{len(ours):,} and {len(theirs):,} tokens" if len(ours) != len(theirs) else f"{len(ours):,} tokens each"
    return (
        f"{kind} {first} is {_quoted(ours, first)} for '{student.name}' and {_quoted(theirs, first)} for "
        f"'{teacher.name}' ({sizes}; ids that differ: {len(differing):,})"
    )


def _other_rules(student: ModelEntry, teacher: ModelEntry) -> str | None:
    """Equal vocabularies may still cut texts differently, or read the same tokens as other texts."""
    ours, theirs = tokenizer_of(student), tokenizer_of(teacher)
    for probe in PROBES:
        ids, their_ids = (tokenizer.encode(probe, add_special_tokens=False).ids for tokenizer in (ours, theirs))
        if ids != their_ids:
            place = next(i for i in range(len(ids) + 1) if ids[: i + 1] != their_ids[: i + 1])
            return (
                f"the vocabularies are equal, but {probe!r} becomes other tokens: from position {place} on "
                f"{ids[place : place + 4]} for '{student.name}' and {their_ids[place : place + 4]} for '{teacher.name}'"
            )
        text, their_text = ours.decode(ids), theirs.decode(ids)
        if text != their_text:
            return (
                f"the vocabularies are equal, but the tokens of {probe!r} read {text!r} for '{student.name}' and "
                f"{their_text!r} for '{teacher.name}'"
            )
    return None


def _tokens_by_id(entry: ModelEntry) -> dict[int, str]:
    return {index: token for token, index in read_vocabulary(Path(entry.path) / TOKENIZER_FILE).items()}


def _special_ids(entry: ModelEntry) -> set[int]:
    added = read_json(Path(entry.path) / TOKENIZER_FILE).get("added_tokens") or []
    return {int(token["id"]) for token in added}


def _quoted(tokens: Mapping[int, str], token: int) -> str:
    return repr(tokens[token]) if token in tokens else "nothing"


_LOADING: Final = threading.Lock()
"""Those who need the same tokenizer at once load it once."""


@lru_cache(maxsize=8)
def _load(path: str, sha256: str) -> Tokenizer:
    """`sha256` makes a tokenizer that was registered again a new one."""
    tokenizer = Tokenizer.from_file(path)
    # what a file says about cutting and filling up is for training
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
