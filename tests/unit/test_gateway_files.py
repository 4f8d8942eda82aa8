"""Uploads and downloads: streamed, exact, bounded."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from stillhouse.core.blobs import write_json
from stillhouse.gateway import files
from stillhouse.gateway.checkpoints import READ_BYTES, TarStream
from tests.gateway_kit import Gateway, make_spec, open_gateway, problem

JSONL = {"Content-Type": "application/jsonl"}


@pytest.fixture
async def gateway(redis_url: str, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with open_gateway(redis_url, tmp_path, max_file_mib=1.0) as opened:
        yield opened


def rows(number: int) -> bytes:
    return b"".join(
        json.dumps({"prompt": f"prompt {i} \u2028 ü"}, ensure_ascii=False).encode() + b"\n" for i in range(number)
    )


@pytest.mark.parametrize("block", [1, 7, 1000])
async def test_an_upload_is_the_same_however_it_is_cut(gateway: Gateway, block: int) -> None:
    data = rows(20).rstrip(b"\n")

    async def blocks() -> AsyncIterator[bytes]:
        for start in range(0, len(data), block):
            yield data[start : start + block]

    answer = await gateway.http.post("/v1/files", content=blocks(), headers=JSONL)
    assert answer.status_code == 201, answer.text
    file = answer.json()
    assert file["num_rows"] == 20
    assert file["size_bytes"] == len(data)
    assert file["sha256"] == hashlib.sha256(data).hexdigest()
    assert gateway.ctx.artifacts.file(file["id"]).read_bytes() == data
    assert (await gateway.http.get(f"/v1/files/{file['id']}")).json() == file
    again = await gateway.http.post("/v1/files", content=data, headers={"Content-Type": "application/x-ndjson"})
    assert again.json() == file, "the same content has the same id"
    spec = make_spec()
    spec["stages"][0]["data"] = {"file": file["id"]}
    assert (await gateway.submit(spec)).status_code == 201


@pytest.mark.parametrize("is_chunked", [False, True])
async def test_a_file_over_the_limit_is_refused(gateway: Gateway, is_chunked: bool) -> None:
    data = rows(40_000)
    assert len(data) > 1 << 20

    async def blocks() -> AsyncIterator[bytes]:
        for start in range(0, len(data), 65_536):
            yield data[start : start + 65_536]

    answer = await gateway.http.post("/v1/files", content=blocks() if is_chunked else data, headers=JSONL)
    assert "STILLHOUSE_MAX_FILE_MIB" in problem(answer, 413)["detail"]
    folder = gateway.ctx.artifacts.root / "files"
    assert not folder.exists() or list(folder.iterdir()) == []


async def test_files_may_be_larger_than_other_bodies(redis_url: str, tmp_path: Path) -> None:
    async with open_gateway(redis_url, tmp_path, max_body_mib=0.01) as gateway:
        assert (await gateway.http.post("/v1/files", content=rows(5000), headers=JSONL)).status_code == 201
        problem(await gateway.submit(make_spec(name="x" * 20_000)), 413)


async def with_checkpoints(gateway: Gateway) -> str:
    job = (await gateway.submit()).json()["id"]
    artifacts = gateway.ctx.artifacts.job(job)
    for epoch, step in ((2, 10), (1, 5), (1, 4)):
        folder = artifacts.manifests(epoch) / f"{step:08d}-0123abcd"
        (folder / "state").mkdir(parents=True)
        (folder / "weights.safetensors").write_bytes(os.urandom(3 * READ_BYTES + 17))
        (folder / "state" / "rng").write_bytes(b"")
        facts = {"step": step, "epoch": epoch, "policy_version": step, "created_at": 1.0, "size_bytes": 99}
        write_json(folder / "manifest.json", facts)
    (artifacts.manifests(2) / "tmp.00000011.aaaa").mkdir()
    artifacts.export(0).mkdir(parents=True)  # epoch 0: no trainer claimed the job
    (artifacts.export(0) / "config.json").write_text("{}")
    return job


async def test_checkpoints_are_listed_in_order_with_the_export_last(gateway: Gateway) -> None:
    job = await with_checkpoints(gateway)
    data = (await gateway.http.get(f"/v1/jobs/{job}/checkpoints")).json()["data"]
    ids = ["ckpt_1-00000004-0123abcd", "ckpt_1-00000005-0123abcd", "ckpt_2-00000010-0123abcd", "ckpt_export"]
    assert [item["id"] for item in data] == ids
    assert [item["kind"] for item in data] == ["checkpoint"] * 3 + ["export"]
    assert data[0]["created_at"] == "1970-01-01T00:00:01.000Z"


async def test_a_downloaded_tar_is_the_folder(gateway: Gateway) -> None:
    job = await with_checkpoints(gateway)
    url = f"/v1/jobs/{job}/checkpoints/ckpt_2-00000010-0123abcd/download"
    answer = await gateway.http.get(url)
    assert answer.headers["content-type"] == "application/x-tar"
    assert int(answer.headers["content-length"]) == len(answer.content)
    folder = gateway.ctx.artifacts.job(job).manifests(2) / "00000010-0123abcd"
    found = {}
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as tar:
        for member in tar:
            stream = tar.extractfile(member)
            assert stream is not None
            found[member.name.partition("/")[2]] = stream.read()
    assert found == {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_tar_is_made_in_small_blocks_of_a_known_size_even_if_the_folder_goes(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    for number, size in enumerate((0, 1, 511, 512, 513, 2 * READ_BYTES + 1)):
        (folder / str(number)).write_bytes(os.urandom(size))
    (folder / "link").symlink_to("/etc/passwd")
    (folder / ("long" * 60)).write_bytes(b"x")
    content = {path.name: path.read_bytes() for path in folder.iterdir() if not path.is_symlink()}
    tar = TarStream(folder, "top")
    for path in folder.iterdir():
        path.unlink()
    blocks = list(tar)
    assert max(len(block) for block in blocks) <= READ_BYTES
    assert sum(len(block) for block in blocks) == tar.size
    with tarfile.open(fileobj=io.BytesIO(b"".join(blocks))) as archive:
        members = {member.name: archive.extractfile(member) for member in archive}
        assert {name: stream.read() for name, stream in members.items() if stream} == {
            f"top/{name}": data for name, data in content.items()
        }


async def test_a_file_with_too_many_rows_is_refused(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_ROWS", 3)
    assert (await gateway.http.post("/v1/files", content=rows(3), headers=JSONL)).status_code == 201
    body = problem(await gateway.http.post("/v1/files", content=rows(4), headers=JSONL), 422)
    assert "line 4: a file holds at most 3 rows" in body["detail"]
