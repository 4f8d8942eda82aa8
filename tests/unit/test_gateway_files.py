"""Uploads and downloads: streamed, exact, bounded."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from stillhouse.core.blobs import read_json, write_json
from stillhouse.core.errors import ConflictError, NotFoundError
from stillhouse.gateway import files
from stillhouse.gateway.deps import Caller
from stillhouse.gateway.tar import READ_BYTES, TarStream
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


async def upload(gateway: Gateway, data: bytes, **headers: str) -> dict[str, Any]:
    answer = await gateway.http.post("/v1/files", content=data, headers={**JSONL, **headers})
    assert answer.status_code == 201, answer.text
    return answer.json()


async def test_all_bad_lines_are_told_at_once(gateway: Gateway) -> None:
    bad = b'{"prompt": 5}\n\n{"prompt": "good"}\nno json\n{"promt": "typo"}\n'
    body = problem(await gateway.http.post("/v1/files", content=bad, headers=JSONL), 422)
    assert [error["param"] for error in body["errors"]] == ["line 1", "line 4", "line 5"]
    assert (body["param"], "and 2 more" in body["detail"]) == ("line 1", True)
    assert "prompt" in body["errors"][2]["fix"], "it guesses what was meant"
    many = problem(await gateway.http.post("/v1/files", content=b"x\n" * 500, headers=JSONL), 422)
    assert [error["param"] for error in many["errors"]] == [f"line {n}" for n in range(1, 21)]
    assert (await gateway.http.get("/v1/files")).json()["data"] == []


async def test_files_are_listed_newest_first_and_read_back(gateway: Gateway) -> None:
    made = [await upload(gateway, rows(n)) for n in (1, 2, 3)]
    page = (await gateway.http.get("/v1/files", params={"limit": 2})).json()
    assert (page["data"], page["has_more"]) == (made[:0:-1], True)
    rest = (await gateway.http.get("/v1/files", params={"after": page["data"][-1]["id"]})).json()
    assert (rest["data"], rest["has_more"]) == (made[:1], False)
    url = f"/v1/files/{made[2]['id']}/content"
    whole = await gateway.http.get(url)
    assert (whole.content, whole.headers["etag"]) == (rows(3), f'"{made[2]["sha256"]}"')
    part = await gateway.http.get(url, headers={"Range": "bytes=5-9"})
    assert (part.status_code, part.content) == (206, rows(3)[5:10])
    missing = await gateway.http.get("/v1/files", params={"after": "file_00000000000000000000"})
    assert problem(missing, 404)["param"] == "after"


async def test_a_file_goes_when_no_job_reads_it(gateway: Gateway) -> None:
    file = await upload(gateway, rows(3))
    url = f"/v1/files/{file['id']}"
    spec = make_spec()
    spec["stages"][0]["data"] = {"file": file["id"]}
    job = (await gateway.submit(spec)).json()["id"]
    assert job in problem(await gateway.http.delete(url), 409)["detail"]
    await gateway.http.post(f"/v1/jobs/{job}/cancel")
    assert (await gateway.http.delete(url)).json() == {"id": file["id"], "object": "file", "deleted": True}
    for gone in (await gateway.http.get(url), await gateway.http.get(f"{url}/content"), await gateway.http.delete(url)):
        problem(gone, 404)
    assert list((gateway.ctx.artifacts.root / "files").iterdir()) == []
    assert (await upload(gateway, rows(3)))["id"] == file["id"]


async def test_owners_of_one_content_share_it_and_see_no_others(gateway: Gateway) -> None:
    ours, theirs = Caller("us", ("write",)), Caller("them", ("write",))
    made = []
    for caller in (ours, theirs, ours):
        upload = files.Upload(gateway.ctx.artifacts)
        upload.feed(rows(2))
        made.append(await files.finish(gateway.ctx, upload, caller))
    assert made[0] == made[1] == made[2]
    own = files.Upload(gateway.ctx.artifacts)
    own.feed(rows(1))
    secret = await files.finish(gateway.ctx, own, ours)
    assert [file.id for file in files.list_files(gateway.ctx.artifacts, theirs)] == [made[0].id]
    with pytest.raises(NotFoundError):
        files.find(gateway.ctx.artifacts, secret.id, theirs)
    await files.delete_file(gateway.ctx, made[0].id, theirs)
    with pytest.raises(NotFoundError):
        files.find(gateway.ctx.artifacts, made[0].id, theirs)
    assert files.find(gateway.ctx.artifacts, made[0].id, ours).is_file(), "it is still somebody's"
    await files.delete_file(gateway.ctx, made[0].id, Caller("root"))
    assert [file.id for file in files.list_files(gateway.ctx.artifacts, ours)] == [secret.id]


async def test_of_many_who_upload_one_content_at_once_each_has_it(gateway: Gateway) -> None:
    callers = [Caller(f"owner-{number}", ("write",)) for number in range(8)]
    uploads = [files.Upload(gateway.ctx.artifacts) for _ in callers]
    for each in uploads:
        each.feed(rows(2))
    made = await asyncio.gather(
        *(files.finish(gateway.ctx, each, caller) for each, caller in zip(uploads, callers, strict=True))
    )
    for caller in callers:
        assert files.find(gateway.ctx.artifacts, made[0].id, caller).is_file()


async def test_a_job_of_somebody_else_keeps_a_file_and_is_not_named(gateway: Gateway) -> None:
    file = await upload(gateway, rows(2))
    spec = make_spec()
    spec["stages"][0]["data"] = {"file": file["id"]}
    job = (await gateway.submit(spec)).json()["id"]
    facts = gateway.ctx.artifacts.file(file["id"]).with_suffix(".json")
    write_json(facts, {**read_json(facts), "owners": ["us"]})  # the job is an administrator's
    us = Caller("us", ("write",))
    with pytest.raises(ConflictError) as refused:
        await files.delete_file(gateway.ctx, file["id"], us)
    assert job not in str(refused.value)
    await gateway.http.post(f"/v1/jobs/{job}/cancel")
    await files.delete_file(gateway.ctx, file["id"], us)
    assert not gateway.ctx.artifacts.file(file["id"]).exists()


async def test_a_wrong_file_that_came_in_one_piece_is_answered_at_once(gateway: Gateway) -> None:
    async with asyncio.timeout(10):
        problem(await gateway.http.post("/v1/files", content=b"no row\n" * 30, headers=JSONL), 422)
