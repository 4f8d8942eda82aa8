"""Recovery on damaged disks: whatever is hit, a claim starts from something that verifies, and says what did not.

Each case builds the artifacts of a job with three claims, damages one file and opens a fourth claim.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from stillhouse.core.blobs import JobArtifacts
from stillhouse.core.errors import CorruptError
from stillhouse.core.queue.streams import Scope
from stillhouse.core.tensors import ids_tensor
from stillhouse.trainer import manifests
from stillhouse.trainer.journal import StepJournal, read_step
from stillhouse.trainer.manifests import ManifestRef, Opening, open_epoch
from stillhouse.v1 import rollout_pb2

SEED = 20261123
CASES = 250
KINDS = ("truncate", "flip", "empty", "delete", "append")


def commit(artifacts: JobArtifacts, epoch: int, step: int) -> ManifestRef:
    def write(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"weights of step %d" % step * 20)
        (folder / "state.json").write_text('{"random": [1, 2, 3]}')

    return manifests.commit(artifacts, epoch, step, {"next_group": step}, write)


async def journal(artifacts: JobArtifacts, epoch: int, step: int) -> None:
    rollout = rollout_pb2.Rollout(sample_id=f"{step}/0", completion_ids=ids_tensor(list(range(20))))
    await StepJournal(artifacts, Scope("job_test", epoch)).write(
        step, [rollout_pb2.Score(rollout=rollout)], groups=[step], next_group=step + 1, micro_batches=[]
    )


@pytest.fixture
async def healthy(tmp_path: Path) -> JobArtifacts:
    """Epoch 1: steps 0-5, committed at 2 and 4. Epoch 2 from 4: steps 6-8, committed at 8. Epoch 3 from 8: step 9."""
    artifacts = JobArtifacts(tmp_path / "job_test")
    open_epoch(artifacts, 1, "a")
    for step in range(6):
        await journal(artifacts, 1, step)
        if step + 1 in (2, 4):
            commit(artifacts, 1, step + 1)
    assert [ref.step for ref in open_epoch(artifacts, 2, "b").replay] == [4, 5]
    for step in (6, 7, 8):
        await journal(artifacts, 2, step)
        if step == 7:
            commit(artifacts, 2, 8)
    assert [ref.step for ref in open_epoch(artifacts, 3, "c").replay] == [8]
    await journal(artifacts, 3, 9)
    return artifacts


def files(artifacts: JobArtifacts) -> list[Path]:
    return sorted(path for path in artifacts.epochs.rglob("*") if path.is_file())


def damage(path: Path, kind: str, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    match kind:
        case "delete":
            path.unlink()
            return
        case "truncate":
            data = data[: draw.randrange(len(data))]
        case "empty":
            data = bytearray()
        case "flip":
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        case "append":
            data += bytes(draw.randrange(256) for _ in range(draw.randint(1, 40)))
    path.write_bytes(bytes(data))


def assert_verifies(artifacts: JobArtifacts, opening: Opening) -> None:
    """What a claim would load is whole, and the replay goes on where the base ends."""
    first_step = 0
    if opening.base is not None:
        first_step = int(manifests.verify(artifacts, opening.base)["step"])
    assert [ref.step for ref in opening.replay] == list(range(first_step, first_step + len(opening.replay)))
    for ref in opening.replay:
        assert read_step(artifacts.journal(ref.epoch, ref.step)).header.step == ref.step


def test_without_damage_nothing_is_said_and_all_is_used(healthy: JobArtifacts) -> None:
    said: list[str] = []
    opening = open_epoch(healthy, 4, "d", said.append)
    assert said == []
    assert opening.base is not None
    assert (opening.base.step, [ref.step for ref in opening.replay]) == (8, [8, 9])


def test_every_damaged_file_is_noticed_or_not_needed(healthy: JobArtifacts, tmp_path: Path) -> None:
    """Files that the newest checkpoint does not rest on may be damaged unseen; all others must be said."""
    draw = random.Random(SEED)
    copy = JobArtifacts(tmp_path / "copy")
    noticed = 0
    for case in range(CASES):
        shutil.rmtree(copy.root, ignore_errors=True)
        shutil.copytree(healthy.root, copy.root)
        victim = draw.choice(files(copy))
        kind = draw.choice(KINDS)
        damage(victim, kind, draw)
        said: list[str] = []
        opening = open_epoch(copy, 4, "d", said.append)
        what = f"seed {SEED} case {case}: {kind} {victim.relative_to(copy.root)}"
        assert_verifies(copy, opening)
        steps = opening.replay[-1].step + 1 if opening.replay else opening.base.step if opening.base else 0
        is_needed = steps < 10 or (opening.base is None or opening.base.step != 8)
        noticed += bool(said)
        if kind == "delete":
            continue  # a file that is gone looks like one that was never there; what is used verifies all the same
        assert said or not is_needed, what
    assert noticed > CASES / 4, "most of the files matter"


@pytest.mark.parametrize("bad_steps", [(8,), (8, 4), (8, 4, 2)], ids=str)
def test_recovery_falls_back_through_all_epochs(healthy: JobArtifacts, bad_steps: tuple[int, ...]) -> None:
    """Down to the start of the job; the journals of all epochs bring it back to where it was."""
    for ref in manifests.list_manifests(healthy):
        if ref.step in bad_steps:
            (ref.folder(healthy) / "model.safetensors").write_bytes(b"rotten")
    opening = open_epoch(healthy, 4, "d")
    expected = max({0, 2, 4, 8} - set(bad_steps))
    assert (opening.base.step if opening.base else 0) == expected
    assert [ref.step for ref in opening.replay] == list(range(expected, 10))


def test_a_damaged_journal_ends_the_replay_before_it(healthy: JobArtifacts) -> None:
    healthy.journal(2, 8).write_bytes(b"torn")
    said: list[str] = []
    opening = open_epoch(healthy, 4, "d", said.append)
    assert opening.base is not None
    assert (opening.base.step, opening.replay) == (8, [])
    assert len(said) == 1


def test_an_epoch_with_a_damaged_opening_serves_with_its_own_checkpoints(healthy: JobArtifacts) -> None:
    (healthy.epoch(3) / "opened.json").write_text("{}")
    (healthy.epoch(2) / "opened.json").write_text("{}")
    opening = open_epoch(healthy, 4, "d")
    assert opening.base is not None
    assert (opening.base.epoch, opening.base.step) == (2, 8)


def test_a_zombies_late_checkpoint_is_on_no_lineage(healthy: JobArtifacts) -> None:
    """Epoch 1 wakes up after epoch 2 opened from its step 4, and commits step 6."""
    late = commit(healthy, 1, 6)
    for ref in manifests.list_manifests(healthy):
        if ref.step == 8:
            (ref.folder(healthy) / "model.safetensors").write_bytes(b"rotten")
    opening = open_epoch(healthy, 4, "d")
    assert opening.base is not None
    assert opening.base != late
    assert opening.base.step == 4


@pytest.mark.parametrize("lag", [1, 2, 3, 9, 20])
def test_a_deterministic_claim_starts_so_early_that_the_replay_passes_the_versions_it_needs(
    healthy: JobArtifacts, lag: int
) -> None:
    opening = open_epoch(healthy, 4, "d", lag=lambda _: lag)
    base_step = opening.base.step if opening.base else 0
    assert base_step + len(opening.replay) == 10
    assert base_step == max((step for step in (0, 2, 4, 8) if step <= 10 - lag), default=0)


def test_a_manifest_that_lies_about_its_name_is_no_checkpoint(healthy: JobArtifacts) -> None:
    ref = manifests.list_manifests(healthy)[-1]
    folder = ref.folder(healthy)
    folder.rename(folder.with_name("00000099-" + ref.name[-8:]))
    with pytest.raises(CorruptError):
        manifests.verify(healthy, ref)
    opening = open_epoch(healthy, 4, "d")
    assert opening.base is None or opening.base.step != 99
