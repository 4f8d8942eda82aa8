"""Journal, manifests, and the recovery rule on real files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stillhouse.core.blobs import JobArtifacts, read_json, write_json
from stillhouse.core.errors import CorruptError, LeaseLostError
from stillhouse.core.queue.streams import Scope
from stillhouse.core.tensors import ids_tensor
from stillhouse.trainer import manifests
from stillhouse.trainer.journal import StepJournal, read_step
from stillhouse.trainer.manifests import JournalRef, ManifestRef, open_epoch
from stillhouse.trainer.retention import Policy, retain
from stillhouse.v1 import rollout_pb2


@pytest.fixture
def artifacts(tmp_path: Path) -> JobArtifacts:
    return JobArtifacts(tmp_path / "job_test")


def commit(artifacts: JobArtifacts, epoch: int, step: int) -> ManifestRef:
    def write(folder: Path) -> None:
        (folder / "weights.safetensors").write_bytes(b"weights of step %d" % step)

    return manifests.commit(artifacts, epoch, step, {"next_group": 4 * step, "usage": {}}, write)


async def journal(artifacts: JobArtifacts, epoch: int, step: int, num_samples: int = 2) -> Path:
    scores = [
        rollout_pb2.Score(
            rollout=rollout_pb2.Rollout(sample_id=f"{step}/{index}", completion_ids=ids_tensor([1, 2, 3]))
        )
        for index in range(num_samples)
    ]
    return await StepJournal(artifacts, Scope("job_test", epoch)).write(
        step, scores, groups=[step], next_group=step + 1, micro_batches=[]
    )


async def test_a_journal_reads_back_as_written(artifacts: JobArtifacts) -> None:
    step = read_step(await journal(artifacts, 1, 7, num_samples=5))
    assert step.header.step == 7
    assert [score.rollout.sample_id for score in step.scores] == [f"7/{index}" for index in range(5)]


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "drop"])
async def test_a_damaged_journal_is_refused(artifacts: JobArtifacts, damage: str) -> None:
    path = await journal(artifacts, 1, 0)
    data = path.read_bytes()
    middle = len(data) // 2
    path.write_bytes(
        {
            "truncate": data[:-3],
            "flip": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
            "empty": b"",
            "drop": data[: 4 + 16 + int.from_bytes(data[:4], "little")],
        }[damage]
    )
    with pytest.raises(CorruptError):
        read_step(path)


def test_a_commit_verifies_and_is_idempotent(artifacts: JobArtifacts) -> None:
    open_epoch(artifacts, 1, "trainer-a")
    ref = commit(artifacts, 1, 10)
    assert manifests.verify(artifacts, ref)["next_group"] == 40
    assert commit(artifacts, 1, 10) == ref
    assert ref.name.startswith("00000010-")


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "manifest"])
def test_damage_is_detected_and_the_last_good_checkpoint_is_used(artifacts: JobArtifacts, damage: str) -> None:
    open_epoch(artifacts, 1, "trainer-a")
    good, bad = commit(artifacts, 1, 10), commit(artifacts, 1, 20)
    weights = bad.folder(artifacts) / "weights.safetensors"
    if damage == "flip":
        weights.write_bytes(b"Weights of step 20")
    elif damage == "truncate":
        weights.write_bytes(b"")
    elif damage == "delete":
        weights.unlink()
    else:
        (bad.folder(artifacts) / "manifest.json").write_text("{}")
    opening = open_epoch(artifacts, 2, "trainer-b")
    assert opening.base == good


def test_an_epoch_is_opened_once(artifacts: JobArtifacts) -> None:
    open_epoch(artifacts, 3, "trainer-a")
    with pytest.raises(LeaseLostError):
        open_epoch(artifacts, 3, "trainer-b")
    with pytest.raises(LeaseLostError):
        open_epoch(artifacts, 2, "trainer-c")


async def test_a_takeover_opens_from_the_newest_manifest_and_replays_what_follows(artifacts: JobArtifacts) -> None:
    open_epoch(artifacts, 1, "trainer-a")
    for step in range(5):
        await journal(artifacts, 1, step)
    ref = commit(artifacts, 1, 3)
    opening = open_epoch(artifacts, 2, "trainer-b")
    assert opening.base == ref
    assert opening.replay == [JournalRef(1, 3), JournalRef(1, 4)]


async def test_an_epoch_without_a_manifest_hands_on_what_it_opened_from(artifacts: JobArtifacts) -> None:
    """Epoch 2 replays steps 3 and 4 of epoch 1, trains 5 itself and dies before its first commit."""
    open_epoch(artifacts, 1, "trainer-a")
    for step in range(5):
        await journal(artifacts, 1, step)
    ref = commit(artifacts, 1, 3)
    open_epoch(artifacts, 2, "trainer-b")
    await journal(artifacts, 2, 5)
    opening = open_epoch(artifacts, 3, "trainer-c")
    assert opening.base == ref
    assert opening.replay == [JournalRef(1, 3), JournalRef(1, 4), JournalRef(2, 5)]


async def test_a_zombies_late_work_is_on_no_lineage(artifacts: JobArtifacts) -> None:
    open_epoch(artifacts, 1, "zombie")
    await journal(artifacts, 1, 0)
    ref = commit(artifacts, 1, 1)
    open_epoch(artifacts, 2, "trainer-b")
    # the zombie wakes up and goes on
    await journal(artifacts, 1, 1)
    commit(artifacts, 1, 2)
    opening = open_epoch(artifacts, 3, "trainer-c")
    assert opening.base == ref
    assert opening.replay == []


async def test_a_gap_in_the_journal_ends_the_replay(artifacts: JobArtifacts) -> None:
    open_epoch(artifacts, 1, "trainer-a")
    for step in (0, 1, 3):
        await journal(artifacts, 1, step)
    assert open_epoch(artifacts, 2, "trainer-b").replay == [JournalRef(1, 0), JournalRef(1, 1)]


def test_a_claim_that_died_before_any_work_changes_nothing(artifacts: JobArtifacts) -> None:
    open_epoch(artifacts, 1, "trainer-a")
    ref = commit(artifacts, 1, 4)
    artifacts.epoch(2).mkdir()  # died between mkdir and opened.json
    assert open_epoch(artifacts, 3, "trainer-c").base == ref


def test_retention_keeps_the_newest_and_the_base(artifacts: JobArtifacts) -> None:
    open_epoch(artifacts, 1, "trainer-a")
    first = commit(artifacts, 1, 1)
    refs = [commit(artifacts, 1, step) for step in range(2, 7)]
    assert retain(artifacts, Policy(2), base=first) == 3
    assert manifests.list_manifests(artifacts) == [first, *refs[-2:]]


def test_opened_json_says_where_an_epoch_came_from(artifacts: JobArtifacts) -> None:
    open_epoch(artifacts, 1, "trainer-a")
    ref = commit(artifacts, 1, 2)
    open_epoch(artifacts, 2, "trainer-b")
    opened: dict[str, Any] = read_json(artifacts.epoch(2) / "opened.json")
    assert opened["opened_from"] == ref.as_json()
    assert opened["trainer"] == "trainer-b"


def test_a_torn_json_write_is_never_seen(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write_json(path, {"value": 1})
    with pytest.raises(TypeError):
        write_json(path, {"value": object()})
    assert read_json(path) == {"value": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["record.json"]
