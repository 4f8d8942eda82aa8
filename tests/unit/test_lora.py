"""Low-rank adapters: what learns, what samplers get, what is kept, what peft and transformers load."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from stillhouse.core.errors import CorruptError, SpecError
from stillhouse.core.models import inspect_model
from stillhouse.trainer.learner import Learner
from tests.tiny import make_tiny_model
from tests.unit.learner_cases import FULL, Teacher, engine_of, learner, rollouts, stage, train, weights_of

LORA = {"rank": 4, "alpha": 8}
LINEAR = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "student": make_tiny_model(root / "student", seed=1),
        "untied": make_tiny_model(root / "untied", seed=2, tie=False, vocab_pad=7),
        "teacher": make_tiny_model(root / "teacher", seed=3, hidden_size=16, tie=False),
    }


@pytest.fixture(scope="module")
def teacher(models: dict[str, Path]) -> Teacher:
    return Teacher(models["teacher"])


def adapted(model: Path, *, lr: float = 1e-2, dtype: str = "float32", seed: int = 0, **lora) -> Learner:
    return learner(model, stage(FULL, lr=lr), dtype=dtype, seed=seed, lora={**LORA, **lora})


def adapter_of(student: Learner) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in engine_of(student).model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", ["student", "untied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_version_0_is_the_base_model_exactly(models: dict[str, Path], name: str, dtype: str) -> None:
    base = learner(models[name], stage(FULL), dtype=dtype).state_arrays()
    ours = adapted(models[name], dtype=dtype).state_arrays()
    assert [(name, kind) for name, _, kind in ours] == [(name, kind) for name, _, kind in base]
    for (key, mine, _), (_, theirs, _) in zip(ours, base, strict=True):
        np.testing.assert_array_equal(mine, theirs, err_msg=key)


@pytest.mark.parametrize("name", ["student", "untied"])
def test_only_the_adapter_learns_and_published_weights_compute_what_it_computes(
    models: dict[str, Path], teacher: Teacher, name: str, tmp_path: Path
) -> None:
    student = adapted(models[name])
    samples, heads = teacher.score(rollouts()), {"t": teacher.head}
    before = weights_of(student)
    kl = sum(row["reverse_kl_sum"] for row in student.evaluate(samples, heads))
    for _ in range(10):
        train(student, samples, teacher)
    after = weights_of(student)
    moved = {key for key in before if (before[key] != after[key]).any()}
    assert moved == {key for key in before if key.split(".")[-2] in LINEAR}, "head, embedding and norms stay"
    rows = student.evaluate(samples, heads)
    assert sum(row["reverse_kl_sum"] for row in rows) < 0.9 * kl

    merged = AutoModelForCausalLM.from_pretrained(models[name], local_files_only=True)
    merged.load_state_dict({key: torch.from_numpy(array) for key, array in after.items()}, strict=False)
    merged.save_pretrained(tmp_path / "merged")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "merged" / file).write_bytes((models[name] / file).read_bytes())
    full = learner(tmp_path / "merged", stage(FULL)).evaluate(samples, heads)
    for one, other in zip(rows, full, strict=True):
        assert one["reverse_kl_sum"] == pytest.approx(other["reverse_kl_sum"], rel=1e-4)


def test_publishing_does_not_disturb_the_training(models: dict[str, Path], teacher: Teacher) -> None:
    samples = teacher.score(rollouts())
    quiet, asked = adapted(models["student"]), adapted(models["student"])
    for _ in range(3):
        train(quiet, samples, teacher)
        asked.state_arrays()
        train(asked, samples, teacher)
        asked.state_arrays()
    for (key, one), other in zip(adapter_of(quiet).items(), adapter_of(asked).values(), strict=True):
        assert torch.equal(one, other), key


def test_the_seed_draws_the_adapter(models: dict[str, Path]) -> None:
    first, again, other = (adapter_of(adapted(models["student"], seed=seed)) for seed in (3, 3, 4))
    assert all(torch.equal(first[key], again[key]) for key in first)
    drawn = [key for key in first if "lora_A" in key]
    assert len(drawn) == 14
    assert all(not torch.equal(first[key], other[key]) for key in drawn)
    assert all(not first[key].any() for key in first if "lora_B" in key)


def test_a_bfloat16_adapter_moves_by_steps_below_its_precision(models: dict[str, Path], teacher: Teacher) -> None:
    student = adapted(models["student"], dtype="bfloat16", lr=1e-5)
    samples = teacher.score(rollouts())
    masters = engine_of(student).parameters._masters
    before = {name: master.detach().clone() for name, master in masters.items()}
    train(student, samples, teacher)
    for name, master in masters.items():
        assert master.dtype == torch.float32
        if ".lora_A." not in name:  # while B is zero, A has no gradient
            assert (master != before[name]).float().mean() > 0.9, name


def test_a_checkpoint_holds_the_adapter_alone_and_goes_on_bit_for_bit(
    models: dict[str, Path], teacher: Teacher, tmp_path: Path
) -> None:
    samples = teacher.score(rollouts())
    student = adapted(models["student"])
    for _ in range(3):
        train(student, samples, teacher)
    student.save(tmp_path / "ckpt")
    held = load_file(tmp_path / "ckpt" / "model.safetensors")
    assert len(held) == 28
    assert all(".lora_" in name for name in held)
    restored = adapted(models["student"], seed=9)
    restored.load(tmp_path / "ckpt")
    for one in (student, restored):
        train(one, samples, teacher)
    assert restored.policy_version == 4
    for key, array in weights_of(student).items():
        np.testing.assert_array_equal(weights_of(restored)[key], array, err_msg=key)


@pytest.mark.parametrize(
    ("lora", "theirs"),
    [
        ({**LORA, "rank": 2}, "rank 2, alpha 8 on all-linear"),
        ({**LORA, "alpha": 16}, "rank 4, alpha 16 on all-linear"),
        ({**LORA, "target_modules": ["q_proj", "v_proj"]}, "rank 4, alpha 8 on q_proj, v_proj"),
        (None, "all weights"),
    ],
)
def test_a_checkpoint_of_another_shape_is_refused(
    models: dict[str, Path], tmp_path: Path, lora: dict | None, theirs: str
) -> None:
    adapted(models["student"]).save(tmp_path / "ckpt")
    other = learner(models["student"], stage(FULL), lora=lora)
    with pytest.raises(CorruptError, match=r"rank 4, alpha 8 on all-linear, the job trains .*" + theirs):
        other.load(tmp_path / "ckpt")


@pytest.mark.parametrize("target", ["qproj", "lm_head", "embed_tokens", "norm"])
def test_a_target_that_is_no_layer_is_refused_with_those_there_are(models: dict[str, Path], target: str) -> None:
    with pytest.raises(SpecError, match=f"'{target}' is no linear layer .*{', '.join(LINEAR)}"):
        adapted(models["untied"], target_modules=["q_proj", target])


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "model.layers.1.mlp.up_proj"]])
def test_the_export_loads_in_transformers_and_its_adapter_in_peft(
    models: dict[str, Path], teacher: Teacher, tmp_path: Path, targets
) -> None:
    student = adapted(models["untied"], target_modules=targets)
    samples = teacher.score(rollouts())
    for _ in range(5):
        train(student, samples, teacher)
    folder = tmp_path / "export"
    student.export(models["untied"], folder, {"student": "tiny"})

    assert inspect_model("x", folder).num_parameters == inspect_model("s", models["untied"]).num_parameters
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 8, "m")
    merged = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    base = AutoModelForCausalLM.from_pretrained(models["untied"], local_files_only=True)
    ids = torch.arange(4, 40)[None]
    with torch.no_grad():
        plain, ours = base(input_ids=ids).logits, merged(input_ids=ids).logits
        theirs = PeftModel.from_pretrained(base, str(folder / "adapter"))(input_ids=ids).logits
    assert (ours - theirs).abs().max() <= 1e-5 * ours.abs().max()
    assert (plain - theirs).abs().max() > 1e-2, "the adapter says something"
