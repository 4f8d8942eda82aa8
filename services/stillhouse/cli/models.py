"""`stillhouse models`: names for model folders. Everything is checked before a name is given."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

from stillhouse.cli.console import EXIT_USAGE, CliError, count, print_json, print_table, say, size
from stillhouse.cli.deployment import Deployment
from stillhouse.core.blobs import Artifacts
from stillhouse.core.checkpoints import EXPORT, Models, exported, locate, parse
from stillhouse.core.config import load_settings
from stillhouse.core.models import ModelRegistry, inspect_model

HUB_FILES: Final = ("*.safetensors", "*.json", "*.jinja")
"""What is fetched from a hub: weights and texts, never a format that can carry code."""
HUB_ID: Final = re.compile(r"^[\w.-]+/[\w.-]+(@[\w./-]+)?$")


def registry() -> ModelRegistry:
    """The registry of this machine's deployment.

    Raises:
        CliError: STILLHOUSE_URL points elsewhere; that gateway reads a registry of its own.
    """
    if url := is_remote():
        raise CliError(
            f"STILLHOUSE_URL is {url}: models are added to and removed from the registry beside the gateway",
            fix="run it on the gateway's machine, or unset STILLHOUSE_URL",
            exit_code=EXIT_USAGE,
        )
    return ModelRegistry(load_settings().models_path())


def add(name: str, path: str, source: str) -> None:
    """Register a folder, a checkpoint of a job or a hub id; says what was registered."""
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
        say("note: it has no chat template, and a student needs one: add chat_template.jinja to its folder")
    twins = [other.name for other in target.all().values() if other.tokenizer_sha256 == entry.tokenizer_sha256]
    if len(twins) == 1 and len(target.all()) > 1:
        say(
            "note: no other registered model has the same tokenizer; student and teachers of a job share it, or the "
            "loss compares texts (cross_tokenizer)"
        )


def show(*, as_json: bool) -> None:
    """Print the registry; that of the gateway if STILLHOUSE_URL names one."""
    if is_remote():
        from stillhouse.client.client import Client

        with Client() as client:
            found = client.models.list()
    else:
        found = [entry.model_dump(mode="json") for _, entry in sorted(registry().all().items())]
    if as_json:
        print_json(found)
        return
    if not found:
        say("no models yet; add one with `stillhouse models add NAME PATH`")
        return
    print_table(
        ("name", "architecture", ">parameters", ">layers", ">size", "tokenizer", "sha256", "source"),
        [_row(model) for model in found],
    )


def remove(name: str) -> None:
    """Forget a model."""
    entry = registry().remove(name)
    say(f"removed {name}; its files stay in {entry.path}")


def is_remote() -> str:
    """The gateway that the user's shell names; empty = the deployment of this machine."""
    return os.environ.get("STILLHOUSE_URL", "")


def _row(model: Any) -> tuple[str, ...]:
    return (
        model.get("name") or model["id"],  # on disk and over REST
        model["architecture"],
        count(model["num_parameters"]),
        str(model["num_layers"]),
        size(model["size_bytes"]),
        model["tokenizer_sha256"][:8],
        model["sha256"][:12],
        model.get("source", ""),
    )


def made(reference: str) -> str:
    """A job's checkpoint as a model, by its full name; made in a process of its own if need be: that needs torch."""
    settings = load_settings()
    models = Models(settings.models_path(), Artifacts(settings.artifacts_dir()))
    name = locate(models.artifacts, reference)
    if models.made(name) is None:
        print(f"making a model of {name} ...", file=sys.stderr)
        command = [sys.executable, "-m", "stillhouse.trainer.materialise", name]
        work = subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True)
        if work.returncode:
            raise CliError(f"{name} could not be made a model: {work.stderr.strip()[-500:]}")
    return name


def _checkpoint(reference: str) -> tuple[Path, str]:
    """(folder of a job's checkpoint, which one)."""
    settings = load_settings()
    models = Models(settings.models_path(), Artifacts(settings.artifacts_dir()))
    name = locate(models.artifacts, reference)
    job_id, _, checkpoint = name.partition("/")
    export = exported(models.artifacts.job(job_id)) if checkpoint == EXPORT else None
    return export or Path(models.get(made(name)).path), name


def _folder(path: str) -> tuple[Path, str]:
    """(local folder, where it came from); a hub id is downloaded unless a folder of that name exists."""
    local = Path(path).expanduser()
    if local.exists():
        return local, ""
    if parse(path):
        return _checkpoint(path)
    if not HUB_ID.match(path):
        raise CliError(
            f"{path} does not exist, and it is neither a checkpoint of a job nor a hub id",
            fix="give a folder with config.json, tokenizer.json and *.safetensors, job_ID or job_ID/ckpt_..., or a hub "
            "id such as owner/model@rev",
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
