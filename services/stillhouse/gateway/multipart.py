"""A form with a file, as browsers and OpenAI's client send it, read as it arrives: nothing is held but a block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from stillhouse.core.errors import MalformedError, SpecError

MEDIA_TYPE: Final = "multipart/form-data"
MAX_FIELD_BYTES: Final = 1024
"""Longest value of a field, and longest name of a file."""
MAX_FIELDS: Final = 16
"""Parts of a form."""


@dataclass
class _Part:
    """The part of the form that is being read."""

    header: bytes = b""
    value: bytes = b""
    headers: dict[bytes, bytes] = field(default_factory=dict)
    name: str = ""
    is_file: bool = False
    data: bytearray = field(default_factory=bytearray)


class Form:
    """Feed it blocks; `fields` holds the values so far, the file `file` goes to `take` as it comes.

    Raises (feed, finish):
        MalformedError: it is no such form.
        SpecError: it has no file, or a field is too long.
    """

    def __init__(self, content_type: str, take: Callable[[bytes], None]) -> None:
        boundary = parse_options_header(content_type)[1].get(b"boundary", b"")
        if not 0 < len(boundary) <= 200:
            raise MalformedError("the content type is multipart/form-data without a boundary")
        self.fields: dict[str, str] = {}
        self.filename = ""
        self._take = take
        self._part = _Part()
        self._parts = 0
        self._has_file = False
        self._is_complete = False
        callbacks: Any = {
            name: getattr(self, f"_{name}")
            for name in (
                "on_part_begin",
                "on_header_field",
                "on_header_value",
                "on_header_end",
                "on_headers_finished",
                "on_part_data",
                "on_part_end",
                "on_end",
            )
        }
        self._parser = MultipartParser(boundary, callbacks)

    def feed(self, block: bytes) -> None:
        """Take the next bytes."""
        try:
            self._parser.write(block)
        except FormParserError as error:
            raise MalformedError(f"the body is no multipart/form-data: {error}") from None

    def finish(self) -> None:
        """The body is over."""
        if not self._is_complete:
            raise MalformedError("the body ends in the middle of a form")
        if not self._has_file:
            raise SpecError("the form has no file; send one as 'file'", param="file")

    def _on_part_begin(self) -> None:
        self._part = _Part()
        self._parts += 1
        if self._parts > MAX_FIELDS:
            raise SpecError(f"the form has more than {MAX_FIELDS} parts")

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._part.header += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._part.value += data[start:end]

    def _on_header_end(self) -> None:
        self._part.headers[self._part.header.lower()] = self._part.value
        self._part.header = self._part.value = b""

    def _on_headers_finished(self) -> None:
        part = self._part
        options = parse_options_header(part.headers.get(b"content-disposition", b""))[1]
        part.name = options.get(b"name", b"").decode("utf-8", "replace")
        part.is_file = part.name == "file"
        if part.is_file:
            if self._has_file:
                raise SpecError("the form has two files; send one", param="file")
            self._has_file = True
            self.filename = options.get(b"filename", b"").decode("utf-8", "replace")[:MAX_FIELD_BYTES]

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        part = self._part
        if part.is_file:
            self._take(data[start:end])
        elif len(part.data) + end - start > MAX_FIELD_BYTES:
            raise SpecError(f"is longer than {MAX_FIELD_BYTES} bytes", param=part.name)
        else:
            part.data += data[start:end]

    def _on_part_end(self) -> None:
        if not self._part.is_file:
            self.fields[self._part.name] = self._part.data.decode("utf-8", "replace")

    def _on_end(self) -> None:
        self._is_complete = True
