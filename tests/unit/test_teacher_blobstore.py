"""Score payloads: in memory, spilled, scoped, gone when their epoch is over."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stillhouse.core.blobs import xxh3
from stillhouse.core.errors import NotFoundError
from stillhouse.core.queue.streams import Scope
from stillhouse.core.rpc import CHUNK_BYTES
from stillhouse.core.spill import SpillFolder, dead_folders, remove_dead
from stillhouse.teacher.blobstore import BlobStore
from stillhouse.v1 import tensor_pb2

SCOPE = Scope("job_a", 1)


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore("teacher-0", 1000, tmp_path)


def read(store: BlobStore, ref: tensor_pb2.BlobRef) -> bytes:
    return b"".join(data for _, data in store.read(ref))


def files(tmp_path: Path) -> int:
    return sum(path.is_file() and path.suffix != ".lock" for path in tmp_path.rglob("*"))


def test_payloads_come_back_from_memory_and_from_disk(store: BlobStore, tmp_path: Path) -> None:
    payloads = [os.urandom(size) for size in (600, 400, 1, CHUNK_BYTES + 5)]
    refs = [store.put(SCOPE, payload) for payload in payloads]
    assert store.in_memory_bytes == 1000
    assert files(tmp_path) == 2, "what does not fit is spilled"
    for payload, ref in zip(payloads, refs, strict=True):
        assert read(store, ref) == payload
        assert (ref.size_bytes, ref.xxh3_128, ref.instance) == (len(payload), xxh3(payload), "teacher-0")
    assert store.total_bytes == sum(map(len, payloads))


def test_parts_are_small_and_in_order(store: BlobStore) -> None:
    ref = store.put(SCOPE, bytes(2 * CHUNK_BYTES + 7))
    assert [(offset, len(data)) for offset, data in store.read(ref)] == [
        (0, CHUNK_BYTES),
        (CHUNK_BYTES, CHUNK_BYTES),
        (2 * CHUNK_BYTES, 7),
    ]


@pytest.mark.parametrize("size", [100, 5000], ids=["memory", "disk"])
def test_released_payloads_are_gone_and_free_their_room(store: BlobStore, tmp_path: Path, size: int) -> None:
    ref = store.put(SCOPE, bytes(size))
    reader = store.read(ref)
    store.release(ref.key)
    store.release(ref.key)
    assert b"".join(data for _, data in reader) == bytes(size), "who reads already is not cut off"
    with pytest.raises(NotFoundError):
        store.read(ref)
    assert (store.total_bytes, store.in_memory_bytes, files(tmp_path)) == (0, 0, 0)


def test_a_reference_is_good_for_its_job_and_epoch_only(store: BlobStore) -> None:
    ref = store.put(SCOPE, b"secret")
    for job_id, epoch, key in (("job_b", 1, ref.key), ("job_a", 2, ref.key), ("job_a", 1, "0" * 32)):
        with pytest.raises(NotFoundError):
            store.read(tensor_pb2.BlobRef(key=key, job_id=job_id, epoch=epoch))
    assert len({store.put(SCOPE, b"").key for _ in range(50)}) == 50


def test_an_epoch_takes_its_payloads_along(store: BlobStore, tmp_path: Path) -> None:
    old = [store.put(SCOPE, bytes(size)) for size in (10, 5000)]
    new = store.put(Scope("job_a", 2), b"new")
    assert store.scopes() == {SCOPE, Scope("job_a", 2)}
    assert store.drop(SCOPE, older_than_s=60) == 0
    assert store.drop(SCOPE) == 2
    for ref in old:
        with pytest.raises(NotFoundError):
            store.read(ref)
    assert read(store, new) == b"new"
    assert files(tmp_path) == 0


def test_closing_leaves_nothing_behind(store: BlobStore, tmp_path: Path) -> None:
    for _ in range(3):
        store.put(SCOPE, bytes(900))
    store.close()
    assert store.total_bytes == 0
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_no_half_payload(store: BlobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> int:
        path.touch()
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space"):
        store.put(SCOPE, bytes(5000))
    assert files(tmp_path) == 0
    assert store.total_bytes == 0


def test_spills_of_the_dead_are_found_and_those_of_the_living_are_not(tmp_path: Path) -> None:
    command = "import os, sys, pathlib; from stillhouse.core.spill import SpillFolder\n"
    command += f"folder = SpillFolder(pathlib.Path({str(tmp_path)!r}), 'scores')\n"
    command += "(folder.path / 'payload').write_bytes(bytes(100)); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", command], check=False).returncode == 9
    living = SpillFolder(tmp_path, "scores")
    assert dead_folders(tmp_path) == [], "too young: its owner may be about to lock it"
    for lock in tmp_path.glob("*.lock"):
        os.utime(lock, (1, 1))
    (dead,) = dead_folders(tmp_path)
    remove_dead(living.path)
    remove_dead(dead)
    assert living.path.is_dir()
    assert not dead.exists()
    assert dead_folders(tmp_path) == []
    living.close()
    assert list(tmp_path.iterdir()) == []
