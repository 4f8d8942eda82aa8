"""Single byte ranges of HTTP (RFC 9110, section 14)."""

from __future__ import annotations

import re

from fastapi import HTTPException

_RANGE = re.compile(r"bytes\s*=\s*([0-9]{0,19})\s*-\s*([0-9]{0,19})")


def wanted_range(header: str, if_range: str, etag: str, size: int) -> range | None:
    """The bytes that a request asks for; None = all of them: no range, several, one we cannot read, or one of another
    version (`If-Range` names it by its ETag).

    Raises:
        HTTPException: 416, the range begins behind the end; its Content-Range says how long it is.
    """
    found = _RANGE.fullmatch(header.strip())
    if found is None or not (found[1] or found[2]) or (if_range and if_range.strip() != etag):
        return None
    if found[1]:
        first, last = int(found[1]), int(found[2] or size - 1)
        if found[2] and last < first:
            return None
    else:  # so many at the end
        first, last = max(0, size - int(found[2])), size - 1
    if first >= size or (not found[1] and int(found[2]) == 0):
        message = f"range '{header}' begins behind the end at byte {size}"
        raise HTTPException(416, message, headers={"Content-Range": f"bytes */{size}"})
    return range(first, min(last, size - 1) + 1)
