"""Checkpoints become models: bit for bit the weights that samplers had, once, whoever asks, and never half of one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from stillhouse.cli import models as cli_models
from stillhouse.cli.console import CliError
from stillhouse.core.blobs import Artifacts, sealed, write_json
from stillhouse.core.checkpoints import START, Models, Settled, settle
from stillhouse.core.errors import ConflictError, CorruptError, NotFoundError
from stillhouse.core.models import inspect_model
from stillhouse.core.spec import JobSpec
from stillhouse.trainer import manifests, materialise
from stillhouse.trainer.checkpoint import random_states
from stillhouse.trainer.engine import Engine
from stillhouse.trainer.manifests import open_epoch
from stillhouse.trainer.materialise import make_model
from tests.gateway_kit import make_spec
from tests.tiny import make_tiny_model

JOB = "job_00000000000000000001"


class Trained:
    """A job with a student that has moved."""

    def __init__(self, home: Path, job_id: str = JOB, *, model: str = "small", start: str = "", **student: Any) -> None:
        self.artifacts = Artifacts(home / "artifacts")
        self.models = Models(home / "models.yaml", self.artifacts)
        self.job = self.artifacts.job(job_id)
        self.job_id = job_id
        spec = JobSpec.model_validate(make_spec(student={"model": model, **student}))
        write_json(self.job.job_json, sealed({"id": job_id, "spec": spec.model_dump(mode="json")}))
        base = self.models.get(start or model)
        settle(self.job, {START: Settled(base.name, base.sha256)})
        open_epoch(self.job, 1, "a")
        self.engine = Engine(Path(base.path), student=spec.student, stage=spec.stages[0], seed=spec.seed)

    def commit(self, step: int) -> str:
        with torch.no_grad():
            for master in self.engine.parameters._masters.values():
                master += 0.01 * step * torch.randn_like(master)
        self.engine.parameters._follow_masters()
        facts = {"policy_version": step, "total_steps": step}
        ref = manifests.commit(self.job, 1, step, {}, lambda folder: self.engine.save(folder, facts))
        return f"{self.job_id}/ckpt_1-{ref.name}"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    models = Models(tmp_path / "models.yaml", Artifacts(tmp_path / "artifacts"))
    models.add(inspect_model("small", make_tiny_model(tmp_path / "small", seed=1)))
    return tmp_path


def weights(folder: str | Path, dtype: str = "float32") -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), local_files_only=True)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("lora", [None, {"rank": 4, "alpha": 8}], ids=["whole", "lora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_what_samplers_had_bit_for_bit(home: Path, dtype: str, lora: dict[str, Any] | None) -> None:
    trained = Trained(home, dtype=dtype, lora=lora)
    name = trained.commit(2)
    states = random_states()
    entry = make_model(trained.models, name)
    assert random_states() == states, "a run with it equals one without"
    found = weights(entry.path, dtype)
    published = trained.engine.state_arrays()
    assert found.keys() == {key for key, _, _ in published}
    for key, array, kind in published:
        assert str(found[key].dtype) == f"torch.{kind}" == f"torch.{dtype}"
        theirs = found[key].view(torch.int16).numpy().view(np.uint16) if kind == "bfloat16" else found[key].numpy()
        np.testing.assert_array_equal(theirs, array, err_msg=key)
    small = trained.models.get("small")
    assert (entry.tokenizer_sha256, entry.has_chat_template) == (small.tokenizer_sha256, True)
    assert entry.architecture == small.architecture
    assert not torch.equal(*(weights(path)["model.embed_tokens.weight"] for path in (entry.path, small.path))) or lora


def test_it_is_made_once_whoever_asks(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = Trained(home)
    first, second = trained.commit(2), trained.commit(4)
    written: list[Path] = []
    write = materialise._write

    def counted(*arguments: Any) -> None:
        write(*arguments)
        written.append(arguments[-1])

    monkeypatch.setattr(materialise, "_write", counted)
    entry = make_model(trained.models, first)
    assert make_model(trained.models, first) == entry
    assert len(written) == 1
    together = Barrier(4)

    def slow(*arguments: Any) -> None:
        (arguments[-1] / "config.json").write_bytes(b"{}")
        together.wait(20)  # until all have written, as trainers that do not see each other

    monkeypatch.setattr(materialise, "_write", slow)
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: materialise._folder(trained.models, second), range(4)))
    assert set(folders) == {trained.job.models / second.partition("/")[2]}
    assert list(trained.job.models.glob("tmp.*")) == []


def test_a_death_before_the_registration_costs_nothing(home: Path) -> None:
    trained = Trained(home)
    name = trained.commit(2)
    folder = materialise._folder(trained.models, name)
    assert trained.models.made(name) is None
    assert make_model(trained.models, name).path == str(folder)


def test_what_is_damaged_or_gone_is_no_model(home: Path) -> None:
    trained = Trained(home)
    name = trained.commit(2)
    with pytest.raises(NotFoundError, match="is gone"):
        make_model(trained.models, f"{JOB}/ckpt_1-00000004-00000000")
    with pytest.raises(NotFoundError, match="is gone"):
        make_model(trained.models, f"{JOB}/ckpt_export")
    file = trained.job.manifests(1) / name.partition("-")[2] / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CorruptError, match=r"model\.safetensors has sha256"):
        make_model(trained.models, name)
    assert list(trained.job.models.glob("*")) == [] or not trained.job.models.exists()


def test_an_adapter_is_merged_into_what_it_was_trained_on(home: Path) -> None:
    before = Trained(home)
    start = make_model(before.models, before.commit(2)).name
    trained = Trained(home, "job_00000000000000000002", start=start, lora={"rank": 4, "alpha": 8})
    name = trained.commit(2)
    found = weights(make_model(trained.models, name).path)
    for key, array, _ in trained.engine.state_arrays():
        np.testing.assert_array_equal(found[key].numpy(), array, err_msg=key)


def test_an_adapter_is_not_merged_into_another_model(home: Path) -> None:
    trained = Trained(home, lora={"rank": 4, "alpha": 8})
    name = trained.commit(2)
    trained.models.add(inspect_model("small", make_tiny_model(home / "new", seed=9)))
    with pytest.raises(ConflictError, match="was trained on 'small' with sha256"):
        make_model(trained.models, name)


def test_an_export_is_registered_under_a_name_as_it_lies(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = Trained(home)
    folder = make_tiny_model(trained.job.export(1), seed=5)
    monkeypatch.setenv("STILLHOUSE_HOME", str(home))
    cli_models.add("mine", JOB, "")
    entry = trained.models.get("mine")
    assert (entry.path, entry.source) == (str(folder), f"{JOB}/ckpt_export")
    with pytest.raises(NotFoundError, match=r"has no checkpoint 'ckpt_1-00000003-00000000' \(any more\)"):
        cli_models.add("mine", f"{JOB}/ckpt_1-00000003-00000000", "")


@pytest.mark.full
@pytest.mark.timeout(180)
def test_a_checkpoint_is_registered_under_a_name(
    home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    trained = Trained(home, lora={"rank": 4, "alpha": 8})
    name = trained.commit(2)
    monkeypatch.setenv("STILLHOUSE_HOME", str(home))
    cli_models.add("sft", JOB, "")
    assert f"making a model of {name}" in capfd.readouterr().err
    entry = trained.models.get("sft")
    assert (entry.sha256, entry.source) == (make_model(trained.models, name).sha256, name)
    trained.models.add(inspect_model("small", make_tiny_model(home / "new", seed=9)))
    with pytest.raises(CliError, match="was trained on 'small' with sha256"):
        cli_models.add("sft", trained.commit(4), "")
