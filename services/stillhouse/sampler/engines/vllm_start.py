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
from stillhouse.core.vllm_env import CLOSE_S, engine_options
from stillhouse.sampler.engines.vllm_wire import OURS, WORKER_EXTENSION

T = TypeVar("T")
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
            await process.llm.collective_rpc("stillhouse_begin", args=(entry.num_usable_ids,))
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
        return self._cause.obituary([process.exitcode for process in manager.processes] if manager else [])

    async def close(self) -> None:
        """End the engine."""
        if hasattr(self, "llm"):
            if self.llm.output_handler is not None:
                self.llm.output_handler.cancel()  # it would report the end as an accident
            await self._run(self.llm.shutdown, CLOSE_S)
        self._thread.shutdown(wait=False)
        self._cause.close()


def engine_args(entry: ModelEntry, dtype: str, settings: Settings) -> AsyncEngineArgs:
    """What a sampler wants of vLLM."""
    return AsyncEngineArgs(
        max_num_seqs=settings.sampler_max_sequences,
        enable_prefix_caching=True,  # the samples of a prompt share its prefill
        logprobs_mode="processed_logprobs",
        worker_extension_cls=WORKER_EXTENSION,
        weight_transfer_config=WeightTransferConfig(backend=OURS),
        enable_log_requests=False,
        **engine_options(entry, dtype, settings, has_gpu=torch.cuda.is_available()),
    )


def _launch(args: AsyncEngineArgs, cause: Cause) -> AsyncLLM:
    try:
        with cause.told():
            return AsyncLLM.from_engine_args(args)
    except Exception as error:  # vLLM has no class of its own for this
        why = cause.read() or f"{type(error).__name__}: {error}"
        raise EngineStartError(f"vLLM does not start with {args.model}: {why.rstrip('.')}; {HINT}") from error
