"""Starting vLLM's engine for a model, and ending it so that nothing of it is left."""

# pyright: reportMissingImports=false
# make check works without vLLM
from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

import torch
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM

from stillhouse.core.config import Settings
from stillhouse.core.errors import EngineStartError
from stillhouse.core.models import ModelEntry
from stillhouse.core.vllm_child import Cause
from stillhouse.sampler.engines.vllm_wire import OURS, WORKER_EXTENSION

T = TypeVar("T")
CPU_CACHE_GIB: Final = 1.0
"""Default of vllm_cache_gib on a CPU, where vLLM would take most of the machine: 45k tokens of a 135M model in fp32."""
CLOSE_S: Final = 1.0
"""Time the engine has to end by itself before it is killed; it holds nothing that anyone needs."""
HINT: Final = (
    "if memory is short, lower vllm_cache_gib, sampler_max_sequences or vllm_max_length; the service's log has vLLM's "
    "own report"
)


class EngineProcess:
    """`AsyncLLM` and the thread that started it.

    The kernel ends the engine's processes when that thread ends (core/vllm_child.py), so it lives as long as they do.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="vllm")
        self._cause = Cause()
        self.llm: AsyncLLM

    @classmethod
    async def start(cls, entry: ModelEntry, dtype: str, settings: Settings) -> EngineProcess:
        """Takes some tens of seconds.

        Raises:
            EngineStartError: says why not.
        """
        process = cls()
        try:
            args = engine_args(entry, dtype, settings)
            process.llm = await process._run(_launch, args, process._cause)
            await process.llm.collective_rpc("stillhouse_begin", args=(usable_vocabulary(entry),))
            await process.llm.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": {}})
        except BaseException:
            await process.close()
            raise
        return process

    async def _run(self, function: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)

    def ending(self) -> str:
        """How the engine's process ended."""
        manager: Any = self.llm.engine_core.resources.engine_manager
        codes = [process.exitcode for process in manager.processes] if manager else []
        if why := self._cause.read():
            return f"failed: {why}"
        if not codes or codes[0] is None:
            return "does not answer"
        return f"ended with {codes[0]}" if codes[0] >= 0 else f"was killed by signal {-codes[0]}; out of memory?"

    async def close(self) -> None:
        """End the engine."""
        if hasattr(self, "llm"):
            if self.llm.output_handler is not None:
                self.llm.output_handler.cancel()  # it would report the end as an accident
            await self._run(self.llm.shutdown, CLOSE_S)
        self._thread.shutdown(wait=False)
        self._cause.close()


def usable_vocabulary(entry: ModelEntry) -> int:
    """Token ids that may be read and written: rows of the head beyond the tokenizer are padding."""
    return min(entry.tokenizer_size, entry.vocab_size)


def engine_args(entry: ModelEntry, dtype: str, settings: Settings) -> AsyncEngineArgs:
    """What we want of vLLM: a local model, token ids in and out, nothing on disk or in the net."""
    cache_gib = settings.vllm_cache_gib or (0 if torch.cuda.is_available() else CPU_CACHE_GIB)
    options: dict[str, Any] = {"dtype": dtype}
    if cache_gib:
        options["kv_cache_memory_bytes"] = int(cache_gib * 2**30)
    if settings.vllm_max_length:
        options["max_model_len"] = min(settings.vllm_max_length, entry.max_sequence_length)
    return AsyncEngineArgs(
        model=entry.path,
        load_format="safetensors",
        skip_tokenizer_init=True,
        generation_config="vllm",  # no defaults from the model's folder
        enforce_eager=settings.vllm_eager,
        tensor_parallel_size=settings.vllm_tensor_parallel,
        gpu_memory_utilization=settings.vllm_memory_fraction,
        max_num_seqs=settings.sampler_max_sequences,
        enable_prefix_caching=True,  # the samples of a prompt share its prefill
        max_logprobs=-1,
        logprobs_mode="processed_logprobs",
        worker_extension_cls=WORKER_EXTENSION,
        weight_transfer_config=WeightTransferConfig(backend=OURS),
        disable_log_stats=True,
        enable_log_requests=False,
        **options,
    )


def _launch(args: AsyncEngineArgs, cause: Cause) -> AsyncLLM:
    try:
        with cause.told():
            return AsyncLLM.from_engine_args(args)
    except Exception as error:  # vLLM has no class of its own for this
        why = cause.read() or f"{type(error).__name__}: {error}"
        raise EngineStartError(f"vLLM does not start with {args.model}: {why.rstrip('.')}; {HINT}") from error
