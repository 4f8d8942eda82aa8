"""The registry of models: names that jobs may use -> a local folder, pinned by hash.

`models.yaml` is written by `stillhouse models add`; services read it. What is registered is checked first, without
loading anything: only safetensors weights, a config.json without code, a tokenizer.json. A job names models, never
paths.
"""

from __future__ import annotations

import json
import re
import struct
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import yaml
from pydantic import Field, ValidationError

from stillhouse.core.blobs import sha256_bytes, sha256_file, write_atomic
from stillhouse.core.errors import ConfigError, NotFoundError, SpecError
from stillhouse.core.spec_base import CHECKPOINT_PATTERN, NAME_PATTERN, Closed, Name

MAX_HEADER_BYTES: Final = 8 << 20
"""Longest safetensors header accepted: a 1000-layer model needs about 2 MiB; more is an attack or damage."""
MAX_TENSORS: Final = 20_000
"""Most tensors in one file, for the same reason."""
CODE_KEYS: Final = (
    "auto_map",
    "custom_pipelines",
    "trust_remote_code",
    "_attn_implementation_internal",
    "quantization_config",
)
"""config.json keys that make a loader run foreign code or fetch kernels, or that mean quantised weights."""
KEPT_MODELS: Final = 32
"""Models whose small files stay in memory."""
FORBIDDEN_SUFFIXES: Final = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".py", ".h5", ".msgpack")
"""Formats that can carry code, and code itself."""


class ModelEntry(Closed):
    """A registered model: identity and the facts that static validation needs."""

    name: Name
    """Name that jobs use."""
    path: str
    """Absolute folder on the machine that runs the services."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """sha256 over the sorted lines "file sha256" of config, tokenizer and weight files: what a teacher verifies."""
    tokenizer_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """sha256 of the sorted (token, id) pairs: equal tokenizers have equal hashes whatever their file looks like."""
    architecture: str
    """Class name in config.json, for example LlamaForCausalLM."""
    vocab_size: int
    """Rows of the embedding (may exceed the tokenizer's, padding)."""
    tokenizer_size: int
    """Highest token id + 1."""
    max_sequence_length: int
    """Longest sequence the model accepts, tokens."""
    hidden_size: int
    """Width of the last hidden state."""
    num_layers: int
    """Decoder layers."""
    num_parameters: int
    """Parameters in the weight files."""
    size_bytes: int
    """Size of the weight files."""
    has_chat_template: bool
    """A chat template comes with the tokenizer."""
    files: dict[str, str]
    """File name -> sha256."""
    source: str = ""
    """Where it came from, for people."""

    @property
    def num_usable_ids(self) -> int:
        """Token ids that may be read and written: rows of the head beyond the tokenizer are padding."""
        return min(self.tokenizer_size, self.vocab_size)


def inspect_model(name: str, folder: Path, *, source: str = "") -> ModelEntry:
    """Check a folder against the intake rules and collect its facts. Reads JSON and safetensors headers only.

    Raises:
        SpecError: names the file and the rule.
    """
    folder = folder.expanduser().resolve()
    if not re.fullmatch(NAME_PATTERN, name):
        raise SpecError(f"model name '{name}': use 1-64 letters, digits, dots, dashes or underscores", param="name")
    if re.fullmatch(CHECKPOINT_PATTERN, name):
        raise SpecError(f"model name '{name}': jobs would read it as the id of a job; choose another", param="name")
    if not folder.is_dir():
        raise SpecError(
            f"{folder} is not a folder; give the folder that holds config.json and *.safetensors", param="path"
        )
    _refuse_foreign_files(folder)
    config = _read_config(folder)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise SpecError(
            f"{folder} has no *.safetensors file; convert the weights (transformers' save_pretrained writes them)",
            param="path",
        )
    parameters = sum(_count_parameters(path) for path in weights)
    tokenizer = folder / "tokenizer.json"
    if not tokenizer.is_file():
        raise SpecError(f"{folder} has no tokenizer.json; save the fast tokenizer beside the model", param="path")
    vocabulary = read_vocabulary(tokenizer)
    files = {path.name: sha256_file(path) for path in _identity_files(folder)}
    return ModelEntry(
        name=name,
        path=str(folder),
        sha256=sha256_bytes("\n".join(f"{key} {files[key]}" for key in sorted(files)).encode()),
        tokenizer_sha256=sha256_bytes(
            "\n".join(f"{token}\t{vocabulary[token]}" for token in sorted(vocabulary)).encode()
        ),
        architecture=str((config.get("architectures") or ["?"])[0]),
        vocab_size=int(config["vocab_size"]),
        tokenizer_size=max(vocabulary.values()) + 1,
        max_sequence_length=int(config.get("max_position_embeddings") or 2048),
        hidden_size=int(config["hidden_size"]),
        num_layers=int(config["num_hidden_layers"]),
        num_parameters=parameters,
        size_bytes=sum(path.stat().st_size for path in weights),
        has_chat_template=read_chat_template(folder) is not None,
        files=files,
        source=source or str(folder),
    )


class ModelRegistry:
    """models.yaml. Reads afresh when the file changed, so a service sees a model that was added after it started."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp: tuple[int, int] | None = None
        self._entries: dict[str, ModelEntry] = {}

    def all(self) -> dict[str, ModelEntry]:
        """Registered models by name.

        Raises:
            ConfigError: the file is damaged; names it and the entry.
        """
        try:
            stat = self.path.stat()
        except FileNotFoundError:
            return {}
        stamp = (stat.st_mtime_ns, stat.st_size)
        if stamp != self._stamp:
            self._entries = _read_entries(self.path)
            self._stamp = stamp
        return dict(self._entries)

    def get(self, name: str) -> ModelEntry:
        """The entry of `name`.

        Raises:
            NotFoundError: lists what there is.
        """
        entries = self.all()
        if name not in entries:
            known = ", ".join(sorted(entries)) or "none yet"
            raise NotFoundError(
                f"unknown model '{name}'; registered: {known}. Add one with `stillhouse models add {name} PATH`"
            )
        return entries[name]

    def add(self, entry: ModelEntry) -> None:
        """Register or replace a model."""
        self._write({**self.all(), entry.name: entry})

    def remove(self, name: str) -> ModelEntry:
        """Forget a model; its files stay.

        Raises:
            NotFoundError: lists what there is.
        """
        entry = self.get(name)
        self._write({key: value for key, value in self.all().items() if key != name})
        return entry

    def _write(self, entries: dict[str, ModelEntry]) -> None:
        document = {"models": {name: entries[name].model_dump(mode="json") for name in sorted(entries)}}
        write_atomic(self.path, yaml.safe_dump(document, sort_keys=False).encode())


def verify_files(entry: ModelEntry) -> None:
    """Check that a model's files still are the registered ones.

    Raises:
        SpecError: names the file, both hashes and the fix.
    """
    for name, expected in entry.files.items():
        path = Path(entry.path) / name
        actual = sha256_file(path) if path.is_file() else "missing"
        if actual != expected:
            fix = f"register it again with `stillhouse models add {entry.name} {entry.path}`"
            if "/" in entry.name:  # a checkpoint of a job
                fix = f"restore it in {entry.path}"
            raise SpecError(
                f"model '{entry.name}': {name} changed since it was registered (sha256 {actual[:12]}, "
                f"registered {expected[:12]}); {fix}"
            )


def _identity_files(folder: Path) -> list[Path]:
    names = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    return [folder / name for name in names if (folder / name).is_file()] + sorted(folder.glob("*.safetensors"))


def _read_entries(path: Path) -> dict[str, ModelEntry]:
    try:
        loaded = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    models = (loaded.get("models") or {}) if isinstance(loaded, dict) else None
    if not isinstance(models, dict):
        raise ConfigError(f"{path} must hold `models:` with one entry per name; write it with `stillhouse models add`")
    entries = {}
    for name, entry in models.items():
        try:
            entries[name] = ModelEntry.model_validate(entry)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in ("models", name, *first["loc"]))
            raise ConfigError(
                f"{path}: {where}: {first['msg']}; register the model again with `stillhouse models add`"
            ) from None
    return entries


def _refuse_foreign_files(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        leaves = path.is_symlink() and not path.resolve().is_relative_to(folder)
        # the hub's cache keeps its files behind links into ../../blobs: that one shape is legitimate
        if leaves and path.resolve().parent.name != "blobs":
            raise SpecError(f"{path.name} in {folder} is a link that leaves the folder", param="path")
        if path.suffix in FORBIDDEN_SUFFIXES:
            raise SpecError(
                f"{path.name} in {folder}: {path.suffix} files can carry code and are refused; keep safetensors, JSON",
                param="path",
            )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise SpecError(f"{folder} has no config.json", param="path") from None
    except ValueError as error:
        raise SpecError(f"{path} is not valid JSON: {error}", param="path") from None
    found = [key for key in CODE_KEYS if config.get(key)]
    if found:
        raise SpecError(
            f"{path} has {', '.join(found)}, which lets a loader run foreign code or alters the weights; refused",
            param="path",
        )
    missing = [key for key in ("vocab_size", "hidden_size", "num_hidden_layers") if key not in config]
    if missing:
        raise SpecError(
            f"{path} lacks {', '.join(missing)}; only dense causal language models are supported", param="path"
        )
    return config


def _count_parameters(path: Path) -> int:
    with path.open("rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= MAX_HEADER_BYTES:
            raise SpecError(
                f"{path.name}: safetensors header of {length} bytes; at most {MAX_HEADER_BYTES} are accepted",
                param="path",
            )
        try:
            header = json.loads(stream.read(length))
        except ValueError:
            raise SpecError(f"{path.name}: the safetensors header is not valid JSON", param="path") from None
    tensors = {name: info for name, info in header.items() if name != "__metadata__"}
    if len(tensors) > MAX_TENSORS:
        raise SpecError(f"{path.name}: {len(tensors)} tensors; at most {MAX_TENSORS} are accepted", param="path")
    total = 0
    for info in tensors.values():
        count = 1
        for size in info["shape"]:
            count *= int(size)
        total += count
    return total


def read_vocabulary(path: Path) -> dict[str, int]:
    """Token -> id of a tokenizer.json, added tokens included."""
    try:
        document = json.loads(path.read_bytes())
        vocabulary = document["model"]["vocab"]
        if isinstance(vocabulary, list):  # unigram models: [[token, score], ...] by id
            vocabulary = {token: index for index, (token, _) in enumerate(vocabulary)}
        vocabulary = dict(vocabulary)
    except (ValueError, KeyError, TypeError) as error:
        raise SpecError(f"{path} is not a tokenizer this project can read: {error!r}", param="path") from None
    for token in document.get("added_tokens", []):
        vocabulary[token["content"]] = int(token["id"])
    return vocabulary


def read_chat_template(folder: Path) -> str | None:
    """The chat template (Jinja) that comes with a model's tokenizer, if one does."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    path = folder / "tokenizer_config.json"
    template = json.loads(path.read_bytes()).get("chat_template") if path.is_file() else None
    if isinstance(template, list):  # several by name, an older form
        template = next((one["template"] for one in template if one["name"] == "default"), None)
    return template


def chat_template(entry: ModelEntry) -> str | None:
    """The chat template of a registered model, read once: one that is registered again has another hash."""
    return _chat_template(entry.path, entry.sha256)


@lru_cache(maxsize=KEPT_MODELS)
def _chat_template(path: str, sha256: str) -> str | None:
    return read_chat_template(Path(path))


def end_ids(entry: ModelEntry) -> list[int]:
    """Token ids that end a completion, of a model that need not name any: generation_config.json, then config.json.
    Read once."""
    return list(_end_ids(entry.path, entry.sha256))


@lru_cache(maxsize=KEPT_MODELS)
def _end_ids(path_of_model: str, sha256: str) -> list[int]:
    for name in ("generation_config.json", "config.json"):
        path = Path(path_of_model) / name
        if path.is_file():
            value = json.loads(path.read_bytes()).get("eos_token_id")
            if value is not None:
                return sorted({int(token) for token in (value if isinstance(value, list) else [value])})
    return []
