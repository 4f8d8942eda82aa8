"""Full disks, full and read-only queue servers under a running job: it waits, says why, goes on, and loses nothing."""

from __future__ import annotations

import errno
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from stillhouse.core import blobs, failpoints
from stillhouse.core.blobs import is_no_space, read_jsonl
from stillhouse.core.oracle.verify import verify_job
from tests.cluster import Cluster, cluster, job_spec
from tests.conftest import start_valkey, stop_valkey
from tests.waiting import wait_until

ALL = ("sampler", "teacher", "trainer")
STEPS = 5
STALL_S = 15.0
"""So soon a job must say what it waits for."""


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[str]:
    """A queue server of our own: its settings are changed."""
    folder = tmp_path / "valkey"
    folder.mkdir()
    process, url = start_valkey(folder)
    yield url
    stop_valkey(process)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"mounting a tmpfs is not permitted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
async def deployment(tmp_path: Path, valkey: str) -> AsyncIterator[Cluster]:
    async with cluster(tmp_path / "home", valkey, *ALL) as made:
        add_models(made)
        yield made


def add_models(made: Cluster) -> None:
    made.add_model("student", seed=1)
    made.add_model("teacher", seed=2)


def spec(**changes: Any) -> dict[str, Any]:
    schedule = {"steps": STEPS, "prompts_per_step": 3, "group_size": 2, "max_staleness": 1}
    return job_spec(stages__0__schedule=schedule, checkpoint={"every_steps": 1}, **changes)


async def committed(made: Cluster, job_id: str) -> None:
    async def reached() -> bool:
        return (await made.ctx.jobs.get(job_id)).committed_step >= 1

    await wait_until(reached, timeout_s=60, what="the first checkpoint")


async def at_step(made: Cluster, job_id: str, step: int) -> None:
    async def reached() -> bool:
        record = await made.ctx.jobs.get(job_id)
        assert not record.is_terminal, record.error
        return record.step >= step

    await wait_until(reached, timeout_s=60, what=f"step {step}")


async def stalled(made: Cluster, job_id: str, reason: str) -> str:
    """Wait until the job says `reason`; its message."""

    async def says_so() -> bool:
        record = await made.ctx.jobs.get(job_id)
        assert not record.is_terminal, record.error
        return (record.status, record.status_reason) == ("stalled", reason)

    await wait_until(says_so, timeout_s=STALL_S, what=f"the job to say {reason}")
    return (await made.ctx.jobs.get(job_id)).status_message


async def succeeded(made: Cluster, job_id: str) -> None:
    """Wait for the end; everything was trained exactly once, and nothing half done lies about."""
    record = await made.ended(job_id)
    assert (record.status, record.status_reason, record.committed_step) == ("succeeded", "", STEPS), record.error
    artifacts = made.ctx.artifacts.job(job_id)
    await wait_until((artifacts.root / "final.json").is_file, timeout_s=10, what="final.json")
    report = verify_job(artifacts, record)
    assert report.ok, report.text()
    assert not report.damage
    assert report.counts["samples_trained"] == 6 * STEPS
    assert [str(path) for path in artifacts.root.rglob("*tmp*")] == []


class FullDisk:
    """A handler of failpoints: writing any of the `places` finds no room."""

    def __init__(self, *places: str) -> None:
        self.places = list(places)
        self.hit = ""

    def __call__(self, name: str, detail: str) -> None:
        found = next((place for place in self.places if place in detail), "")
        if name == "disk.written" and found:
            self.hit = found
            raise OSError(errno.ENOSPC, f"no space left on device (in a test, at {detail})")

    async def stall(self) -> str:
        """Wait until a write has failed; where."""
        await wait_until(lambda: self.hit in self.places, timeout_s=30, what=f"a write at one of {self.places}")
        return self.hit


@pytest.fixture
def failing() -> Iterator[None]:
    yield
    failpoints.install(None)


@pytest.mark.usefixtures("failing")
async def test_a_full_disk_anywhere_pauses_the_job_with_a_reason(deployment: Cluster) -> None:
    disk = FullDisk("opened.json", "00000000.json", ".journal", "state.json", "manifest.json", "export")
    failpoints.install(disk)
    job_id = await deployment.submit(spec(evaluation={"data": {"rows": [{"prompt": "tea"}]}, "max_tokens": 4}))
    met = []
    while disk.places:
        met.append(await disk.stall())
        message = await stalled(deployment, job_id, "no_space")
        assert str(deployment.ctx.artifacts.job(job_id).root) in message
        assert "bytes free" in message
        disk.places.remove(met[-1])
    measured = met.index("00000000.json")  # beside training, and before anything is committed
    assert 0 < measured < met.index("manifest.json")
    assert met[:measured] + met[measured + 1 :] == ["opened.json", ".journal", "state.json", "manifest.json", "export"]
    await succeeded(deployment, job_id)
    record = await deployment.ctx.jobs.get(job_id)
    assert record.epoch == 1, "one claim: it waited, it did not crash"


@pytest.mark.usefixtures("failing")
async def test_history_waits_for_room(deployment: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    append, is_full = blobs.append_lines, True

    def full(path: Path, data: bytes) -> int:
        if is_full:
            raise OSError(errno.ENOSPC, "no space left on device")
        return append(path, data)

    monkeypatch.setattr(blobs, "append_lines", full)
    job_id = await deployment.submit(spec())
    await at_step(deployment, job_id, STEPS - 2)
    artifacts = deployment.ctx.artifacts.job(job_id)
    assert not artifacts.metrics.exists()
    is_full = False
    await succeeded(deployment, job_id)
    await wait_until(
        lambda: [point["step"] for point in read_jsonl(artifacts.metrics)] == list(range(1, STEPS + 1)),
        timeout_s=5,
        what="all metrics on disk, in order",
    )
    in_redis = [event["id"] for event in await deployment.ctx.jobs.events(job_id, limit=1000)]
    assert [event["id"] for event in read_jsonl(artifacts.events)] == in_redis


def fill(folder: Path) -> Path:
    """Write until the disk is full."""
    filler = folder / "filler"
    with filler.open("ab", buffering=0) as stream:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while stream.write(bytes(size)) == size:
                    continue
            except OSError as error:
                if not is_no_space(error):
                    raise
    return filler


async def test_a_disk_that_is_really_full(tmp_path: Path, valkey: str, small_disk: Path) -> None:
    async with cluster(tmp_path / "home", valkey, *ALL, artifacts=small_disk) as made:
        add_models(made)
        job_id = await made.submit(spec())
        await committed(made, job_id)  # from then on it knows what a checkpoint takes
        filler = fill(small_disk)
        message = await stalled(made, job_id, "no_space")
        assert "needed" in message
        filler.unlink()
        await succeeded(made, job_id)
        assert (await made.ctx.jobs.get(job_id)).epoch == 1


@pytest.mark.parametrize("wish", ["drain", "cancel"])
async def test_who_waits_for_room_can_be_stopped(tmp_path: Path, valkey: str, small_disk: Path, wish: str) -> None:
    async with cluster(tmp_path / "home", valkey, *ALL, artifacts=small_disk) as made:
        add_models(made)
        job_id = await made.submit(spec())
        await at_step(made, job_id, 1)
        filler = fill(small_disk)
        await stalled(made, job_id, "no_space")
        if wish == "cancel":
            await made.ctx.jobs.request(job_id, allowed=("stalled",), status="cancelling")
            assert (await made.ended(job_id, timeout_s=10)).status == "cancelled"
            return
        started = time.monotonic()
        await made.stop("trainer-0")
        assert time.monotonic() - started < made.settings.drain_s, "it does not wait for room while it drains"
        filler.unlink()
        await made.start("trainer", "trainer-1")
        await succeeded(made, job_id)


async def test_a_full_queue_server_stalls_the_job_and_loses_nothing(deployment: Cluster, valkey: str) -> None:
    admin = Redis.from_url(valkey)
    job_id = await deployment.submit(spec())
    await at_step(deployment, job_id, 1)
    admin.config_set("maxmemory", "1")
    assert "maxmemory" in await stalled(deployment, job_id, "queue_full")
    roles = {info.role for info in await deployment.ctx.registry.services()}
    assert roles == set(ALL), "heartbeats go beyond maxmemory"
    admin.config_set("maxmemory", "0")
    await succeeded(deployment, job_id)
    assert (await deployment.ctx.jobs.get(job_id)).epoch == 1, "its lease was kept all the time"


async def test_a_job_is_cancelled_although_the_queue_server_is_full(deployment: Cluster, valkey: str) -> None:
    admin = Redis.from_url(valkey)
    job_id = await deployment.submit(spec())
    await at_step(deployment, job_id, 1)
    admin.config_set("maxmemory", "1")
    await deployment.ctx.jobs.request(job_id, allowed=("running", "stalled"), status="cancelling")
    assert (await deployment.ended(job_id, timeout_s=30)).status == "cancelled"


async def test_a_read_only_queue_server_loses_nothing(deployment: Cluster, valkey: str) -> None:
    admin = Redis.from_url(valkey)
    job_id = await deployment.submit(spec())
    await at_step(deployment, job_id, 1)
    admin.execute_command("REPLICAOF", "127.0.0.1", "1")
    closed = deployment.ctx.artifacts.job(job_id).epoch(1) / "closed.json"
    await wait_until(closed.is_file, timeout_s=40, what="the trainer to give its claim up")
    assert (await deployment.ctx.jobs.get(job_id)).step >= 1, "reads go on"
    admin.execute_command("REPLICAOF", "NO", "ONE")
    await succeeded(deployment, job_id)
