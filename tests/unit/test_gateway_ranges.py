"""A download may be cut anywhere and gone on with: any range of the tar is the same bytes as those of the whole."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from fastapi import HTTPException
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.core.blobs import write_json
from stillhouse.gateway.ranges import wanted_range
from stillhouse.gateway.tar import TarStream
from tests.gateway_kit import Gateway, open_gateway, problem

SIZE = 1000


@given(st.integers(0, 1200), st.integers(0, 1200))
def test_what_a_range_means(first: int, last: int) -> None:
    data = bytes(SIZE)

    def ask(header: str) -> int | None:
        """Bytes that it gives; None = all, as if there was no range."""
        try:
            found = wanted_range(header, "", '"a"', SIZE)
        except HTTPException as error:
            return 0 if error.status_code == 416 else -1
        assert found is None or (0 <= found.start < found.stop <= SIZE)
        return None if found is None else len(found)

    assert ask(f"bytes={first}-") == len(data[first:])
    assert ask(f"bytes=-{last}") == min(last, SIZE)
    assert ask(f"bytes={first}-{last}") == (None if last < first else len(data[first : last + 1]))
    for unknown in ("", "bytes=-", f"bytes={first}-{last},5-6", "lines=1-2", "bytes=a-b", "bytes=1-2x"):
        assert ask(unknown) is None


def test_a_range_of_another_version_is_none() -> None:
    assert wanted_range("bytes=5-", '"a"', '"a"', SIZE) == range(5, SIZE)
    assert wanted_range("bytes=5-", '"b"', '"a"', SIZE) is None
    assert wanted_range("bytes=5000-", "Wed, 21 Oct 2015 07:28:00 GMT", '"a"', SIZE) is None


def test_any_piece_of_a_tar_is_that_of_the_whole(tmp_path: Path) -> None:
    for number, size in enumerate((0, 1, 511, 512, 513, 2000)):
        (tmp_path / str(number)).write_bytes(os.urandom(size))
    whole = b"".join(TarStream(tmp_path, "top"))
    edges = sorted({0, 1, 511, 512, 513, 1023, 1024, len(whole) // 2, len(whole) - 1, len(whole)})
    for start in edges:
        for stop in (edge for edge in edges if edge > start):
            assert b"".join(TarStream(tmp_path, "top").read(range(start, stop))) == whole[start:stop]


def test_the_etag_is_of_the_content(tmp_path: Path) -> None:
    write_json(tmp_path / "manifest.json", {"sha256": "a"})
    before = TarStream(tmp_path, "top").etag
    assert TarStream(tmp_path, "top").etag == before
    facts = (tmp_path / "manifest.json").stat()
    write_json(tmp_path / "manifest.json", {"sha256": "b"})
    os.utime(tmp_path / "manifest.json", ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert TarStream(tmp_path, "top").etag != before, "same name, size and time, another content"


@pytest.fixture
async def gateway(redis_url: str, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with open_gateway(redis_url, tmp_path) as opened:
        yield opened


async def test_a_download_goes_on_where_it_was_cut(gateway: Gateway) -> None:
    job = (await gateway.submit()).json()["id"]
    folder = gateway.ctx.artifacts.job(job).manifests(1) / "00000002-0123abcd"
    write_json(folder / "manifest.json", {"step": 2})
    (folder / "model.safetensors").write_bytes(os.urandom(5000))
    url = f"/v1/jobs/{job}/checkpoints/ckpt_1-00000002-0123abcd/download"
    whole = await gateway.http.get(url)
    etag = whole.headers["etag"]
    assert (whole.status_code, whole.headers["accept-ranges"]) == (200, "bytes")
    head = await gateway.http.head(url)
    assert (head.status_code, head.content) == (200, b"")
    assert (head.headers["content-length"], head.headers["etag"]) == (str(len(whole.content)), etag)
    rest = await gateway.http.get(url, headers={"Range": "bytes=3000-", "If-Range": etag})
    assert rest.status_code == 206
    assert rest.headers["content-range"] == f"bytes 3000-{len(whole.content) - 1}/{len(whole.content)}"
    assert whole.content[:3000] + rest.content == whole.content
    assert int(rest.headers["content-length"]) == len(rest.content)
    other = await gateway.http.get(url, headers={"Range": "bytes=3000-", "If-Range": '"another"'})
    assert (other.status_code, other.content == whole.content) == (200, True)
    behind = await gateway.http.get(url, headers={"Range": f"bytes={len(whole.content)}-"})
    problem(behind, 416)
    assert behind.headers["content-range"] == f"bytes */{len(whole.content)}"
    problem(await gateway.http.get(url.replace("0123abcd", "ffffffff")), 404)
