"""What a job's references to checkpoints mean, and that nothing of it goes while it is needed. Without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import structlog
from pydantic import TypeAdapter, ValidationError

from stillhouse.core.blobs import Artifacts, JobArtifacts, sealed, write_json
from stillhouse.core.checkpoints import (
    EXPORT,
    Models,
    Settled,
    locate,
    named,
    read_references,
    registration,
    settle,
)
from stillhouse.core.errors import CorruptError, NotFoundError, SpecError
from stillhouse.core.models import ModelEntry, inspect_model, verify_files
from stillhouse.core.spec import JobSpec
from stillhouse.core.spec_base import CheckpointName, ModelName
from stillhouse.trainer import manifests, retention
from stillhouse.trainer.loop import Interrupt
from stillhouse.trainer.manifests import ManifestRef, list_manifests, open_epoch
from stillhouse.trainer.models import JobModels
from stillhouse.trainer.retention import Policy, delete_model, retain
from stillhouse.trainer.space import Space
from tests.gateway_kit import add_model, make_model, make_spec

OURS, THEIRS = "job_00000000000000000001", "job_00000000000000000002"


@pytest.fixture
def artifacts(tmp_path: Path) -> Artifacts:
    made = Artifacts(tmp_path / "artifacts")
    add_job(made, OURS)
    add_job(made, THEIRS)
    return made


@pytest.fixture
def job(artifacts: Artifacts) -> JobArtifacts:
    """One that is trained."""
    made = artifacts.job(THEIRS)
    open_epoch(made, 1, "a")
    return made


def add_job(artifacts: Artifacts, job_id: str) -> None:
    spec = JobSpec.model_validate(make_spec()).model_dump(mode="json")
    write_json(artifacts.job(job_id).job_json, sealed({"id": job_id, "spec": spec}))


def commit(job: JobArtifacts, epoch: int, *steps: int) -> list[str]:
    """Ids of new checkpoints."""

    def write(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"1" * 100)

    return [name_of(manifests.commit(job, epoch, step, {}, write)) for step in steps]


def name_of(ref: ManifestRef) -> str:
    return f"{THEIRS}/ckpt_{ref.epoch}-{ref.name}"


def end(job: JobArtifacts, **final: Any) -> None:
    write_json(job.final, sealed({"status": "succeeded", "epoch": 1, "finished_at": 1.0, **final}))


def steps(job: JobArtifacts) -> list[int]:
    return [ref.step for ref in list_manifests(job)]


# -- what is meant ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "small",
        "a.b-c_d",
        THEIRS,
        f"{THEIRS}/ckpt_export",
        f"{THEIRS}/ckpt_1-00000008-0123abcd",
        "stage/one",
        "stage/start",
    ],
)
def test_what_names_a_model(name: str) -> None:
    assert TypeAdapter(ModelName).validate_python(name) == name


@pytest.mark.parametrize(
    "name",
    ["", "a/b", "../a", f"{THEIRS}/", f"{THEIRS}/..", f"{THEIRS}/../x", f"{THEIRS}/ckpt_../x", f"{THEIRS}/ckpt_1/../..",
     "job_short/ckpt_1", "/etc", "stage/", "stage/../x", "stage/a/b", f"{THEIRS}\n", f"{THEIRS}/ckpt_1-A", "a" * 65],
)  # fmt: skip
def test_what_names_none_and_could_be_a_path(name: str, artifacts: Artifacts) -> None:
    for kind in (ModelName, CheckpointName):
        with pytest.raises(ValidationError, match="names no"):
            TypeAdapter(kind).validate_python(name)
    with pytest.raises(NotFoundError):
        locate(artifacts, name)
    if "/" in name:
        with pytest.raises(NotFoundError):
            Models(artifacts.root / "models.yaml", artifacts).get(name)


def test_the_newest_is_the_last_commit_and_then_the_export(artifacts: Artifacts, job: JobArtifacts) -> None:
    with pytest.raises(NotFoundError, match="no checkpoint yet"):
        locate(artifacts, THEIRS)
    first, second = commit(job, 1, 2, 4)
    assert locate(artifacts, THEIRS) == second
    assert locate(artifacts, first) == first
    job.export(1).mkdir()
    assert locate(artifacts, THEIRS) == f"{THEIRS}/{EXPORT}", "it ends at this moment"
    end(job)
    assert locate(artifacts, THEIRS) == f"{THEIRS}/{EXPORT}"
    end(job, status="cancelled")
    assert locate(artifacts, THEIRS) == second


def test_a_zombies_commit_is_not_the_newest(artifacts: Artifacts, job: JobArtifacts) -> None:
    (before,) = commit(job, 1, 2)
    open_epoch(job, 2, "b")
    (zombie,) = commit(job, 1, 8)
    assert locate(artifacts, THEIRS) == before, "the new claim has opened from it"
    assert locate(artifacts, zombie) == zombie, "by its name it can be had"
    (after,) = commit(job, 2, 4)
    assert locate(artifacts, THEIRS) == after


def test_what_is_not_there_is_said_with_what_is(artifacts: Artifacts, job: JobArtifacts) -> None:
    (there,) = commit(job, 1, 2)
    with pytest.raises(NotFoundError, match="there is no job 'job_nobodynobody'"):
        locate(artifacts, "job_nobodynobody")
    for missing in ("ckpt_1-00000004-01234567", "ckpt_export", "ckpt_9-00000002-01234567", "ckpt_placeholder"):
        with pytest.raises(NotFoundError) as caught:
            locate(artifacts, f"{THEIRS}/{missing}")
        assert missing in caught.value.message
        assert there.partition("/")[2] in caught.value.message


def test_a_stage_that_the_job_does_not_have_is_no_teacher() -> None:
    for model in ("stage/main", "stage/start"):
        JobSpec.model_validate(make_spec(teachers={"main": {"model": model}}))
    with pytest.raises(ValidationError, match=r"no stage 'sft'; name one that ends .*: stage/start"):
        JobSpec.model_validate(make_spec(teachers={"main": {"model": "stage/sft"}}))


# -- what is needed --------------------------------------------------------------------------------------------------


def test_what_a_job_names_counts_until_it_has_ended(artifacts: Artifacts) -> None:
    ours = artifacts.job(OURS)
    settle(ours, {THEIRS: Settled(f"{THEIRS}/{EXPORT}")})
    settle(ours, {"stage/start": Settled("small", "0" * 64)})
    assert read_references(ours)[THEIRS] == Settled(f"{THEIRS}/{EXPORT}")
    assert named(artifacts) == {f"{THEIRS}/{EXPORT}"}
    end(ours)
    assert named(artifacts) == set()
    ours.final.unlink()
    ours.references.write_text("{}")
    with pytest.raises(CorruptError):
        named(artifacts)


def test_retention_leaves_what_a_job_names_until_it_is_a_model(artifacts: Artifacts, job: JobArtifacts) -> None:
    first, _, third = commit(job, 1, 1, 2, 3)
    settle(artifacts.job(OURS), {first: Settled(first)})
    assert retain(job, Policy(2), None) == 0
    commit(job, 1, 4)
    assert retain(job, Policy(2), None) == 1
    assert steps(job) == [1, 3, 4], "the second is named by nobody"
    settle(artifacts.job(OURS), {third: Settled(third)})
    write_json(registration(job, first.partition("/")[2]), {})
    commit(job, 1, 5)
    assert retain(job, Policy(2), None) == 1
    assert steps(job) == [3, 4, 5], "of the first there is a model"
    end(artifacts.job(OURS), status="failed")
    commit(job, 1, 6)
    assert retain(job, Policy(2), None) == 2
    assert steps(job) == [5, 6]


def test_who_names_while_retention_deletes_keeps_it(
    artifacts: Artifacts, job: JobArtifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *_ = commit(job, 1, 1, 2, 3)
    answers: list[set[str]] = []

    def once_late(found: Artifacts) -> set[str]:
        answers.append(named(found))
        if len(answers) == 1:  # looked at before the other names it
            settle(artifacts.job(OURS), {first: Settled(first)})
        return answers[-1]

    monkeypatch.setattr(retention, "named", once_late)
    assert retain(job, Policy(2), None) == 0
    assert [len(answer) for answer in answers] == [0, 1]
    assert locate(artifacts, first) == first
    assert list(job.manifests(1).glob("tmp.*")) == []


def test_where_it_is_not_known_who_names_what_all_stays(artifacts: Artifacts, job: JobArtifacts) -> None:
    commit(job, 1, 1, 2, 3)
    artifacts.job(OURS).references.write_text("{")
    told: list[str] = []
    assert retain(job, Policy(2), None, on_damage=told.append) == 0
    assert steps(job) == [1, 2, 3]
    assert "references.json" in told[0]


# -- models of checkpoints -------------------------------------------------------------------------------------------


def made(artifacts: Artifacts, job: JobArtifacts) -> tuple[Models, str]:
    """(models, a checkpoint that is one)."""
    models = Models(artifacts.root / "models.yaml", artifacts)
    name = f"{THEIRS}/ckpt_1-00000002-01234567"
    assert models.made(name) is None
    make_model(job.models / "ckpt_1-00000002-01234567")
    models.register(name, job.models / "ckpt_1-00000002-01234567")
    return models, name


def test_a_checkpoint_is_found_by_its_name_wherever_the_artifacts_lie(artifacts: Artifacts, job: JobArtifacts) -> None:
    models, name = made(artifacts, job)
    entry = models.get(name)
    assert (entry.name, entry.path) == (name, str(job.models / "ckpt_1-00000002-01234567"))
    assert locate(artifacts, name) == name, "its manifest may be gone"
    moved = Artifacts(artifacts.root.rename(artifacts.root.with_name("elsewhere")))
    again = Models(moved.root / "models.yaml", moved).get(name)
    assert (again.sha256, again.path) == (entry.sha256, str(moved.job(THEIRS).models / "ckpt_1-00000002-01234567"))
    verify_files(again)
    (Path(again.path) / "model.safetensors").write_bytes(b"other")
    with pytest.raises(SpecError, match=f"'{name}': model.safetensors changed.*restore it"):
        verify_files(again)


@pytest.mark.parametrize("path", ["../../../outside", "/etc", "..", f"../{OURS}"])
def test_a_registration_names_nothing_outside_of_its_job(artifacts: Artifacts, job: JobArtifacts, path: str) -> None:
    models, name = made(artifacts, job)
    file = registration(job, name.partition("/")[2])
    document = json.loads(file.read_text())
    write_json(file, sealed({"model": {**document["model"], "path": path}}))
    with pytest.raises(CorruptError, match="which is not below"):
        models.get(name)
    file.write_text(file.read_text().replace(path, "models"))
    with pytest.raises(CorruptError, match="does not match its own hash"):
        models.get(name)


def test_no_model_is_registered_under_the_id_of_a_job(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="jobs would read it as the id of a job"):
        inspect_model(THEIRS, make_model(tmp_path / "model"))


def test_gc_knows_what_jobs_name_and_what_is_registered(
    tmp_path: Path, artifacts: Artifacts, job: JobArtifacts
) -> None:
    def gc(*arguments: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "stillhouse.cli.main", "gc", "--json", *arguments]
        work = subprocess.run(
            command, env={**os.environ, "STILLHOUSE_HOME": str(tmp_path)}, capture_output=True, check=True
        )
        return json.loads(work.stdout)

    add_model(tmp_path, "small")
    models, name = made(artifacts, job)
    folder = Path(models.get(name).path)
    first, *_ = commit(job, 1, 1, 2, 3)
    end(job)
    settle(artifacts.job(OURS), {name: Settled(name), first: Settled(first)})
    assert gc()["items"] == [], "the other job goes on"
    end(artifacts.job(OURS))
    small = Models(tmp_path / "models.yaml", artifacts)
    small.add(inspect_model("mine", folder))
    assert [item["kind"] for item in gc("--dry-run")["items"]] == ["checkpoint"], "the user has registered the model"
    small.remove("mine")
    assert [item["kind"] for item in gc()["items"]] == ["checkpoint", "model"]
    assert not folder.exists()
    assert models.made(name) is None


def test_a_model_that_is_named_while_it_is_deleted_comes_back_whole(
    artifacts: Artifacts, job: JobArtifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, name = made(artifacts, job)
    folder = Path(models.get(name).path)
    before = {path: path.read_bytes() for path in folder.iterdir()}

    def names(root: Artifacts) -> set[str]:
        assert not folder.exists(), "out of sight before anybody is asked"
        assert models.made(name) is None
        return {name}

    monkeypatch.setattr("stillhouse.trainer.retention.named", names)
    assert delete_model(job, folder) is False
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert models.made(name) is not None


def test_a_deletion_that_dies_leaves_no_half_of_a_model_under_its_name(
    artifacts: Artifacts, job: JobArtifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, name = made(artifacts, job)
    folder = Path(models.get(name).path)

    def dies(path: Path, **_: Any) -> None:
        next(iter(path.iterdir())).unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr("stillhouse.trainer.retention.shutil.rmtree", dies)
    with pytest.raises(KeyboardInterrupt):
        delete_model(job, folder)
    assert not folder.exists()
    assert models.made(name) is None


async def test_a_stage_that_ended_again_teaches_by_its_new_checkpoint(artifacts: Artifacts, tmp_path: Path) -> None:
    """The claim that ended it first died before its checkpoint was a model, and that one is on no lineage now."""
    add_model(tmp_path, "small")
    own, models = artifacts.job(THEIRS), Models(tmp_path / "models.yaml", artifacts)
    stage = make_spec()["stages"][0]
    stages = [{**stage, "name": name} for name in ("one", "two")]
    spec = JobSpec.model_validate(make_spec(teachers={"main": {"model": "stage/one"}}, stages=stages))
    entry = inspect_model("made", Path(models.get("small").path))
    asked: list[str] = []

    async def make(name: str) -> ModelEntry:
        asked.append(name)
        return entry.model_copy(update={"name": name})

    async def nothing(*_: Any, **__: Any) -> None: ...

    space = Space(tmp_path, Interrupt(), structlog.get_logger())
    claim = JobModels(THEIRS, spec, models, make=make, fence=nothing, space=space, tell=nothing)
    open_epoch(own, 1, "a")
    _, lost = commit(own, 1, 1, 3)
    settle(own, {"stage/one": Settled(lost)})
    for file in (own.root / "epochs").glob("*/manifests/00000003-*/model.safetensors"):
        file.write_bytes(b"rotten")
    open_epoch(own, 2, "b")
    [again] = commit(own, 2, 3)
    assert (await claim.ready("main")).name == again
    assert asked == [again]
    assert read_references(own)["stage/one"] == Settled(again, entry.sha256)
    commit(own, 2, 4)
    assert (await claim.ready("main")).name == again, "what is a model stays what it is"
