"""`stillhouse models`: names for model folders. Everything is checked before a name is given."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from stillhouse.cli.console import EXIT_USAGE, CliError, count, print_json, print_table, say, size
from stillhouse.cli.deployment import Deployment
from stillhouse.core.config import load_settings
from stillhouse.core.models import ModelEntry, ModelRegistry, inspect_model

HUB_FILES: Final = ("*.safetensors", "*.json", "*.jinja")
"""What is fetched from a hub: weights and texts, never a format that can carry code."""
HUB_ID: Final = re.compile(r"^[\w.-]+/[\w.-]+(@[\w./-]+)?$")


def registry() -> ModelRegistry:
    """The registry of this machine's deployment."""
    return ModelRegistry(load_settings().models_path())


def add(name: str, path: str, source: str) -> None:
    """Register a folder or a hub id; says what was registered."""
    target = registry()
    folder, origin = _folder(path)
    known = target.all().get(name)
    entry = inspect_model(name, folder, source=source or origin)
    Deployment().home.mkdir(parents=True, exist_ok=True, mode=0o700)
    target.add(entry)
    verb = "added" if known is None else "unchanged" if known.sha256 == entry.sha256 else "replaced"
    say(
        f"{verb} {name}: {entry.architecture}, {count(entry.num_parameters)} parameters, {entry.num_layers} layers, "
        f"vocabulary {entry.vocab_size}, {size(entry.size_bytes)}, sha256 {entry.sha256[:12]}"
    )
    if not entry.has_chat_template:
        say("note: it has no chat template; prompts are given to it as plain text")
    twins = [other.name for other in target.all().values() if other.tokenizer_sha256 == entry.tokenizer_sha256]
    if len(twins) == 1 and len(target.all()) > 1:
        say("note: no other registered model has the same tokenizer; student and teachers of a job must share it")


def show(*, as_json: bool) -> None:
    """Print the registry."""
    entries = registry().all()
    if as_json:
        print_json([entries[name].model_dump(mode="json") for name in sorted(entries)])
        return
    if not entries:
        say("no models yet; add one with `stillhouse models add NAME PATH`")
        return
    print_table(
        ("name", "architecture", ">parameters", ">layers", ">size", "tokenizer", "sha256", "source"),
        [_row(entries[name]) for name in sorted(entries)],
    )


def remove(name: str) -> None:
    """Forget a model."""
    entry = registry().remove(name)
    say(f"removed {name}; its files stay in {entry.path}")


def _row(entry: ModelEntry) -> tuple[str, ...]:
    return (
        entry.name,
        entry.architecture,
        count(entry.num_parameters),
        str(entry.num_layers),
        size(entry.size_bytes),
        entry.tokenizer_sha256[:8],
        entry.sha256[:12],
        entry.source,
    )


def _folder(path: str) -> tuple[Path, str]:
    """(local folder, where it came from); a hub id is downloaded unless a folder of that name exists."""
    local = Path(path).expanduser()
    if local.exists():
        return local, ""
    if not HUB_ID.match(path):
        raise CliError(
            f"{path} does not exist, and it is no hub id either",
            fix="give a folder with config.json, tokenizer.json and *.safetensors, or a hub id such as owner/model@rev",
            exit_code=EXIT_USAGE,
        )
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        raise CliError(
            f"downloading {path} needs huggingface_hub", fix="pip install huggingface_hub, or give a local folder"
        ) from None
    repo, _, revision = path.partition("@")
    say(f"downloading {repo} ...")
    try:
        folder = snapshot_download(repo, revision=revision or None, allow_patterns=list(HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CliError(
            f"cannot download {path}: {reason}", fix="check the id and the network, or give a local folder"
        ) from None
    return Path(folder), f"{repo}@{Path(folder).name}"
