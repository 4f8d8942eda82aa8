"""How we run vLLM: the environment that it reads while it is imported and that its engine processes inherit, and what
every engine of ours is started with. Light: no vLLM here.
"""

from __future__ import annotations

import os
from typing import Any, Final

from stillhouse.core.config import Settings
from stillhouse.core.models import ModelEntry

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

CPU_CACHE_GIB: Final = 1.0
"""Default of vllm_cache_gib on a CPU, where vLLM would take most of the machine: 45k tokens of a 135M model in fp32."""
CLOSE_S: Final = 1.0
"""Time an engine has to end by itself before it is killed; it holds nothing that anyone needs."""


def prepare(settings: Settings, **more: str) -> None:
    """Set the environment; before vLLM is imported for the first time."""
    os.environ.update(ENVIRONMENT | more)
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # would overrule vllm_cache_gib
    if settings.threads:
        os.environ["OMP_NUM_THREADS"] = str(settings.threads)


def engine_options(entry: ModelEntry, dtype: str, settings: Settings, *, has_gpu: bool) -> dict[str, Any]:
    """Arguments of vLLM's `EngineArgs` for a local model: token ids in and out, nothing on disk or in the net."""
    options: dict[str, Any] = {
        "model": entry.path,
        "dtype": dtype,
        "load_format": "safetensors",
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # no defaults from the model's folder
        "enforce_eager": settings.vllm_eager,
        "tensor_parallel_size": settings.vllm_tensor_parallel,
        "gpu_memory_utilization": settings.vllm_memory_fraction,
        "max_logprobs": -1,
        "disable_log_stats": True,
    }
    if cache_gib := settings.vllm_cache_gib or (0 if has_gpu else CPU_CACHE_GIB):
        options["kv_cache_memory_bytes"] = int(cache_gib * 2**30)
    if settings.vllm_max_length:
        options["max_model_len"] = min(settings.vllm_max_length, entry.max_sequence_length)
    return options
