"""The environment that vLLM reads while it is imported and that its engine processes inherit. Light: no vLLM here."""

from __future__ import annotations

import os
from typing import Final

from stillhouse.core.config import Settings

ENVIRONMENT: Final = {
    # nothing leaves the machine: models are local folders
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    # its processes find each other on this machine only
    "VLLM_HOST_IP": "127.0.0.1",
    # no foreign code by entry points, and no reset or remote calls over HTTP
    "VLLM_PLUGINS": "",
    "VLLM_SERVER_DEV_MODE": "0",
    # a fork would inherit our event loop, gRPC threads and locks
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    # on a CPU: one engine process instead of two, on any core
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


def prepare(settings: Settings, **more: str) -> None:
    """Set the environment; before vLLM is imported for the first time."""
    os.environ.update(ENVIRONMENT | more)
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # would overrule vllm_cache_gib
    if settings.threads:
        os.environ["OMP_NUM_THREADS"] = str(settings.threads)
