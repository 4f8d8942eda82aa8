"""Intake of models: what is refused is refused before anything is loaded."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from stillhouse.core.errors import ConfigError, NotFoundError, SpecError
from stillhouse.core.models import ModelRegistry, inspect_model, verify_files
from tests.tiny import TOKENIZER_SIZE, make_tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path / "model")


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_model_is_described_without_being_loaded(folder: Path) -> None:
    entry = inspect_model("tiny", folder)
    assert entry.architecture == "LlamaForCausalLM"
    assert (entry.num_layers, entry.hidden_size, entry.tokenizer_size) == (2, 32, TOKENIZER_SIZE)
    assert entry.has_chat_template
    assert entry.num_parameters > 10_000


def test_the_same_tokenizer_has_the_same_hash_and_another_model_another(folder: Path, tmp_path: Path) -> None:
    other = make_tiny_model(tmp_path / "other", seed=1)
    assert inspect_model("a", folder).tokenizer_sha256 == inspect_model("b", other).tokenizer_sha256
    assert inspect_model("a", folder).sha256 != inspect_model("b", other).sha256
    assert inspect_model("a", folder).sha256 == inspect_model("renamed", folder).sha256


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: edit_config(folder, auto_map={"AutoModel": "x.Y"}), "auto_map"),
        (lambda folder: edit_config(folder, _attn_implementation_internal="evil/kernel"), "_attn_implementation"),
        (lambda folder: (folder / "pytorch_model.bin").write_bytes(b"x"), "carry code"),
        (lambda folder: (folder / "modeling_x.py").write_text(""), "carry code"),
        (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "safetensors"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 40)),
            "header of 1099511627776 bytes",
        ),
        (lambda folder: (folder / "leak.json").symlink_to("/etc/passwd"), "leaves the folder"),
    ],
    ids=["auto_map", "kernel", "bin", "py", "json", "tokenizer", "weights", "header", "symlink"],
)
def test_dangerous_or_broken_folders_are_refused(folder: Path, damage: Callable[[Path], object], words: str) -> None:
    damage(folder)
    with pytest.raises(SpecError, match=words):
        inspect_model("bad", folder)


def test_a_bad_name_is_refused(folder: Path) -> None:
    with pytest.raises(SpecError, match="a/b"):
        inspect_model("a/b", folder)


def test_the_registry_is_read_afresh_and_lists_what_it_has(folder: Path, tmp_path: Path) -> None:
    registry, reader = ModelRegistry(tmp_path / "models.yaml"), ModelRegistry(tmp_path / "models.yaml")
    with pytest.raises(NotFoundError, match="none yet"):
        reader.get("tiny")
    registry.add(inspect_model("tiny", folder))
    assert reader.get("tiny").path == str(folder)
    with pytest.raises(NotFoundError, match="registered: tiny"):
        reader.get("tiney")


@pytest.mark.parametrize("text", ["models: {", "- a", "models: [a]", "models: {a: 1}", "models: {a: {name: a}}"])
def test_a_damaged_registry_names_its_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "models.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"models\.yaml"):
        ModelRegistry(tmp_path / "models.yaml").all()


def test_changed_files_are_noticed(folder: Path) -> None:
    entry = inspect_model("tiny", folder)
    verify_files(entry)
    edit_config(folder, rope_theta=1.0)
    with pytest.raises(SpecError, match=r"config\.json changed since"):
        verify_files(entry)
