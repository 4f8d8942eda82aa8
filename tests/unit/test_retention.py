"""Retention deletes what nobody needs, and never what a claim may have to start from."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from stillhouse.core import failpoints
from stillhouse.core.blobs import JobArtifacts, write_json
from stillhouse.core.errors import CorruptError
from stillhouse.core.queue.streams import Scope
from stillhouse.core.tensors import ids_tensor
from stillhouse.trainer import manifests, retention
from stillhouse.trainer.journal import StepJournal
from stillhouse.trainer.manifests import ManifestRef, list_manifests, open_epoch
from stillhouse.trainer.retention import Policy, retain
from stillhouse.v1 import rollout_pb2


@pytest.fixture
def artifacts(tmp_path: Path) -> JobArtifacts:
    made = JobArtifacts(tmp_path / "job_test")
    open_epoch(made, 1, "trainer-a")
    return made


def commit(artifacts: JobArtifacts, epoch: int, *steps: int) -> list[ManifestRef]:
    def write(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(os.urandom(64))

    return [manifests.commit(artifacts, epoch, step, {"next_group": step}, write) for step in steps]


async def journal(artifacts: JobArtifacts, epoch: int, *steps: int) -> None:
    for step in steps:
        rollout = rollout_pb2.Rollout(sample_id=f"{step}/0", completion_ids=ids_tensor([1, 2]))
        await StepJournal(artifacts, Scope("job_test", epoch)).write(
            step, [rollout_pb2.Score(rollout=rollout)], groups=[step], next_group=step + 1, micro_batches=[]
        )


def rot(artifacts: JobArtifacts, ref: ManifestRef) -> None:
    path = ref.folder(artifacts) / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.write_bytes(bytes(data))


def evaluated(artifacts: JobArtifacts, **reverse_kl: float) -> None:
    for step, value in reverse_kl.items():
        write_json(artifacts.evaluations / f"{int(step[1:]):08d}.json", {"step": int(step[1:]), "reverse_kl": value})


def steps(artifacts: JobArtifacts) -> list[int]:
    return [ref.step for ref in list_manifests(artifacts)]


def test_the_newest_stay_and_two_at_least(artifacts: JobArtifacts) -> None:
    commit(artifacts, 1, 1, 2, 3, 4, 5)
    assert retain(artifacts, Policy(3), None) == 2
    assert steps(artifacts) == [3, 4, 5]
    assert retain(artifacts, Policy(1), None) == 1
    assert steps(artifacts) == [4, 5]
    assert retain(artifacts, Policy(1), None) == 0


def test_what_rotted_does_not_count(artifacts: JobArtifacts) -> None:
    refs = commit(artifacts, 1, 1, 2, 3, 4, 5)
    rot(artifacts, refs[4])
    rot(artifacts, refs[2])
    damage: list[str] = []
    retain(artifacts, Policy(2), None, on_damage=damage.append)
    assert steps(artifacts) == [2, 3, 4, 5], "two that verify, and whatever is newer"
    assert len(damage) == 2
    assert open_epoch(artifacts, 2, "b").base == refs[3]


def test_nothing_goes_while_too_few_are_good(artifacts: JobArtifacts) -> None:
    refs = commit(artifacts, 1, 1, 2, 3, 4, 5)
    for ref in refs[1:]:
        rot(artifacts, ref)
    assert retain(artifacts, Policy(2), None) == 0
    assert open_epoch(artifacts, 2, "b").base == refs[0]


def test_the_only_good_one_of_an_older_epoch_stays(artifacts: JobArtifacts) -> None:
    old = commit(artifacts, 1, 1, 2)
    assert open_epoch(artifacts, 2, "b").base == old[1]
    new = commit(artifacts, 2, 3, 4, 5)
    for ref in (*new, old[1]):
        rot(artifacts, ref)
    assert retain(artifacts, Policy(2), old[1]) == 0
    assert open_epoch(artifacts, 3, "c").base == old[0]


def test_the_best_stay_however_old(artifacts: JobArtifacts) -> None:
    refs = commit(artifacts, 1, 2, 4, 6, 8, 10)
    evaluated(artifacts, s0=9.0, s2=0.3, s4=0.1, s5=0.01, s6=0.2, s10=0.4)
    rot(artifacts, refs[1])
    retain(artifacts, Policy(2, 1), None)
    assert steps(artifacts) == [6, 8, 10], "step 4 was better and rotted, step 5 was not committed"


def test_without_evaluations_keep_best_keeps_nothing_more(artifacts: JobArtifacts) -> None:
    commit(artifacts, 1, 1, 2, 3, 4)
    retain(artifacts, Policy(2, 3), None)
    assert steps(artifacts) == [3, 4]


@pytest.mark.parametrize("lag", [1, 2, 3])
async def test_a_deterministic_job_keeps_a_base_that_lies_back(artifacts: JobArtifacts, lag: int) -> None:
    for step in range(1, 9):
        await journal(artifacts, 1, step - 1)
        commit(artifacts, 1, step)
        retain(artifacts, Policy(1, lag=lambda _: lag), None)
    base = open_epoch(artifacts, 2, "b", lag=lambda _: lag).base
    assert base is not None, "else everything would be replayed from the first step"
    assert base.step == 8 - lag
    assert len(steps(artifacts)) == max(2, lag + 1)


def test_the_base_of_the_newest_epoch_stays(artifacts: JobArtifacts) -> None:
    (base,) = commit(artifacts, 1, 1)
    open_epoch(artifacts, 2, "b")
    commit(artifacts, 2, 2, 3, 4, 5)
    retain(artifacts, Policy(2), None)
    assert steps(artifacts) == [base.step, 4, 5]


def test_a_zombies_checkpoints_go_and_count_for_nothing(artifacts: JobArtifacts) -> None:
    commit(artifacts, 1, 1)
    open_epoch(artifacts, 2, "b")
    zombie = commit(artifacts, 1, 7, 8, 9)
    mine = commit(artifacts, 2, 2, 3)
    evaluated(artifacts, s9=0.001)
    retain(artifacts, Policy(2, 1), None)
    assert list_manifests(artifacts) == [list_manifests(artifacts)[0], *mine]
    assert not any(ref.folder(artifacts).exists() for ref in zombie)


def test_off_the_lineage_is_kept_too_while_the_lineage_has_too_few_good_ones(artifacts: JobArtifacts) -> None:
    commit(artifacts, 1, 1)
    open_epoch(artifacts, 2, "b")
    (spare,) = commit(artifacts, 1, 7)
    mine = commit(artifacts, 2, 2, 3)
    for ref in (*mine, list_manifests(artifacts)[0]):
        rot(artifacts, ref)
    assert retain(artifacts, Policy(2), None) == 0
    assert spare in list_manifests(artifacts)


def test_nothing_goes_while_a_claim_opens_its_epoch(artifacts: JobArtifacts) -> None:
    commit(artifacts, 1, 1, 2, 3, 4)
    artifacts.epoch(2).mkdir()
    assert retain(artifacts, Policy(2), None) == 0
    assert steps(artifacts) == [1, 2, 3, 4]


def test_a_damaged_past_costs_no_checkpoint_of_it(artifacts: JobArtifacts) -> None:
    commit(artifacts, 1, 1, 2)
    open_epoch(artifacts, 2, "b")
    (artifacts.epoch(2) / "opened.json").write_text("{")
    commit(artifacts, 2, 3, 4, 5)
    retain(artifacts, Policy(2), None)
    assert steps(artifacts) == [1, 2, 4, 5]


def test_deleting_is_all_or_nothing_for_readers(artifacts: JobArtifacts) -> None:
    commit(artifacts, 1, 1, 2, 3)

    def die(name: str, _: str) -> None:
        if name == "trainer.retaining":
            raise KeyboardInterrupt

    failpoints.install(die)
    try:
        with pytest.raises(KeyboardInterrupt):
            retain(artifacts, Policy(2), None)
    finally:
        failpoints.install(None)
    assert steps(artifacts) == [2, 3]
    assert len(list(artifacts.manifests(1).glob("tmp.gone.*"))) == 1
    retain(artifacts, Policy(2), None)
    assert list(artifacts.manifests(1).glob("tmp.gone.*")) == []


def test_a_checkpoint_is_hashed_once_per_process(artifacts: JobArtifacts, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[int] = []
    verify = manifests.verify

    def counted(found: JobArtifacts, ref: ManifestRef) -> dict[str, object]:
        hashed.append(ref.step)
        return verify(found, ref)

    monkeypatch.setattr(retention, "verify", counted)
    for step in range(1, 8):
        commit(artifacts, 1, step)
        retain(artifacts, Policy(2), None)
    assert hashed == list(range(1, 8))


def test_random_damage_never_costs_the_last_good_one(tmp_path: Path) -> None:
    """As long as something on the lineage verifies, a claim after any number of rounds finds something that does."""
    import random

    draw = random.Random(20261123)
    for case in range(60):
        artifacts = JobArtifacts(tmp_path / str(case))
        open_epoch(artifacts, 1, "a")
        epoch, step = 1, 0
        for _ in range(draw.randint(5, 12)):
            step += 1
            commit(artifacts, epoch, step)
            past = manifests.lineage(artifacts)
            assert past is not None
            on_disk = [ref for ref in list_manifests(artifacts) if ref in past.manifests]
            if draw.random() < 0.4:
                victim = draw.choice(on_disk)
                retention._good.clear()  # as a new process does
                rot(artifacts, victim)
            was_good = [ref for ref in on_disk if is_good(artifacts, ref)]
            retain(artifacts, Policy(draw.randint(1, 3), draw.randint(0, 1)), None)
            still = [ref for ref in list_manifests(artifacts) if is_good(artifacts, ref)]
            assert len(still) >= min(2, len(was_good)), (case, step)
            if draw.random() < 0.2:
                epoch += 1
                opening = open_epoch(artifacts, epoch, "b")
                assert (opening.base is not None) or not still
                step = opening.base.step if opening.base else 0
        shutil.rmtree(artifacts.root)


def is_good(artifacts: JobArtifacts, ref: ManifestRef) -> bool:
    try:
        manifests.verify(artifacts, ref)
    except CorruptError:
        return False
    return True
