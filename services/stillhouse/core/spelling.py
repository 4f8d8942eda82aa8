"""Which bytes each token of a tokenizer stands for: what models with different tokenizers have in common is the text.

Needs `tokenizers`; imported by what compares or reads texts only. A token's bytes need not be whole characters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer

from stillhouse.core.blobs import sha256_file
from stillhouse.core.errors import SpecError
from stillhouse.core.models import ModelEntry
from stillhouse.core.vocabulary import TOKENIZER_FILE

PROBE: Final = 'Why? "It\'s 12%":\n\tif x_1 == [y]:  go(A)\n\nThe End.'
"""Ordinary text: capitals, runs of blanks, tabs and line ends, which some tokenizers rewrite."""
_BLANK: Final = "\u2581"
"""Stands for a blank in the vocabularies of sentencepiece."""
_BYTE: Final = re.compile(r"<0x([0-9A-F]{2})>")
"""A single byte there."""
_PIECE_DECODERS: Final = frozenset({"Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"})
"""Steps of a decoder for such vocabularies."""


class Spelling:
    """A tokenizer as a way to write text. Thread-safe."""

    def __init__(self, path: Path) -> None:
        """Read a tokenizer.json.

        Raises:
            SpecError: it is no tokenizer, or its tokens are not pieces of text.
        """
        try:
            self._tokenizer: Any = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers has no class of its own for this
            raise SpecError(f"{path} is no tokenizer that tokenizers can read: {error}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        # what looks like a special token in a text is text
        self._tokenizer.encode_special_tokens = True
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids: Final = frozenset(number for number, token in added.items() if token.special)
        """Tokens that stand for no text: ends, roles, padding."""
        spell = _speller(path)
        self._bytes = {number: spell(token) for token, number in self._tokenizer.get_vocab().items()}
        self._bytes |= {number: token.content.encode() for number, token in added.items()}
        self.adds_blank: Final = b"".join(self._bytes[number] for number in self.write("a")) == b" a"
        """Texts get a blank in front, which is none of theirs (sentencepiece's dummy prefix)."""

    def write(self, text: str) -> list[int]:
        """[U] the text in this tokenizer's way, without the tokens that it puts around texts."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def spell(self, ids: Sequence[int]) -> list[bytes]:
        """[T] the bytes of each token of a text that begins with the first; an id without a token has none.

        A special token in it is spelled out: there is no other way to say it to another model.
        """
        pieces = [self._bytes.get(number, b"") for number in ids]
        if self.adds_blank and pieces and pieces[0].startswith(b" "):
            pieces[0] = pieces[0][1:]
        return pieces

    def rewrites(self) -> str:
        """How it changes ordinary text, for people; empty = it does not."""
        found = b"".join(self.spell(self.write(PROBE))).decode(errors="replace")
        return "" if found == PROBE else f"it reads {PROBE!r} as {found!r}"


def spelling_of(entry: ModelEntry) -> Spelling:
    """A registered model's. The first time it reads the file, up to two seconds: call it in a thread.

    Raises:
        SpecError: the file cannot be read, is not the registered one, or its tokens are not pieces of text.
    """
    return _load(entry.name, Path(entry.path) / TOKENIZER_FILE, entry.files[TOKENIZER_FILE])


@lru_cache(maxsize=8)
def _load(name: str, path: Path, sha256: str) -> Spelling:
    again = f"register it again with `stillhouse models add {name} {path.parent}`"
    try:
        if (found := sha256_file(path)) != sha256:
            raise SpecError(
                f"{path} changed since the model was registered (sha256 {found[:12]}, then {sha256[:12]}); {again}"
            )
        return Spelling(path)
    except OSError as error:
        raise SpecError(f"{path} cannot be read: {error}; {again}") from error


def _speller(path: Path) -> Any:
    """The function from a token's name in the vocabulary to its bytes."""
    kinds = set(_kinds(json.loads(path.read_bytes()).get("decoder")))
    if "ByteLevel" in kinds:
        return _byte_level
    if kinds and kinds <= _PIECE_DECODERS:
        return _piece_with_bytes if "ByteFallback" in kinds else _piece
    raise SpecError(
        f"{path} has a decoder of {sorted(kinds) or 'no kind'}; which bytes a token stands for is known of byte-level "
        "and of sentencepiece tokenizers"
    )


def _kinds(decoder: dict[str, Any] | None) -> Iterator[str]:
    for part in (decoder or {}).get("decoders", [decoder] if decoder else []):
        yield part["type"]


def _piece(token: str) -> bytes:
    return token.replace(_BLANK, " ").encode()


def _piece_with_bytes(token: str) -> bytes:
    byte = _BYTE.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else _piece(token)


def _byte_level(token: str) -> bytes:
    try:
        return bytes(_BYTE_OF[character] for character in token)
    except KeyError:  # no byte-level token, although it lies among them
        return token.encode()


def _byte_alphabet() -> dict[str, int]:
    """Character -> the byte it stands for in byte-level vocabularies: printable Latin-1 is itself, the other bytes are
    the characters from 256 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF: Final = _byte_alphabet()
