"""Scoring with vLLM, in a process of its own for each model: how it is started and ended. Scores: vllm_scores.py.

Meant for GPUs; really run on CPUs only (docs/engines.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from threading import Thread
from typing import Any, Final

import torch
from vllm import SamplingParams  # pyright: ignore[reportMissingImports]
from vllm.engine.arg_utils import EngineArgs  # pyright: ignore[reportMissingImports]
from vllm.v1.engine.exceptions import EngineDeadError as VllmDeadError  # pyright: ignore[reportMissingImports]
from vllm.v1.engine.llm_engine import LLMEngine  # pyright: ignore[reportMissingImports]

from stillhouse.core.config import Settings
from stillhouse.core.errors import EngineStartError
from stillhouse.core.models import ModelEntry
from stillhouse.core.tensors import DTYPE_NAMES, itemsize
from stillhouse.core.vllm_child import Cause
from stillhouse.core.vllm_env import CLOSE_S, engine_options
from stillhouse.teacher.engines.vllm_scores import Running, VllmEngine

LOGITS_BYTES: Final = 256 << 20
"""Logits of one step, float32: vLLM computes them for all its prompt tokens at once, and a copy for the softmax."""
STEP_TOKENS: Final = (64, 4096)
"""Least and most prompt tokens of a step: longer prompts are read in parts."""
WORKER_EXTENSION: Final = "stillhouse.teacher.engines.vllm_worker.Extension"


def load(entry: ModelEntry, dtype: str, settings: Settings, beat: Callable[[], None]) -> VllmEngine:
    """Takes some tens of seconds. The engine's process ends with the thread that calls this.

    Raises:
        EngineStartError: vLLM does not take the model, or has no room for it.
    """
    cause = Cause()
    try:
        with cause.told():
            llm = LLMEngine.from_engine_args(engine_args(entry, dtype, settings), enable_multiprocessing=True)
    except Exception as error:  # vLLM has no class of its own for this
        why = cause.read() or f"{type(error).__name__}: {error}"
        cause.close()
        raise EngineStartError(
            f"vLLM does not start with model '{entry.name}': {why}; if memory is short, lower vllm_cache_gib or "
            "vllm_max_length; the service's log has vLLM's own report"
        ) from error

    llm.get_supported_tasks()  # asked once; the first request would ask, and wait for ever for a process that has died
    core: Any = llm.engine_core
    processes = list(core.resources.engine_manager.processes)
    _tell_of_its_death(llm, processes)

    def stop() -> None:
        llm.engine_core.shutdown(CLOSE_S)
        cause.close()

    running = Running(
        llm=llm,
        make_params=SamplingParams,
        max_model_len=llm.model_config.max_model_len,
        has_targets=llm.vllm_config.use_v2_model_runner,
        dead_errors=(VllmDeadError,),
        obituary=lambda: _obituary(processes, cause),
        stop=stop,
    )
    size_bytes = entry.num_parameters * itemsize(DTYPE_NAMES[dtype])
    return VllmEngine(running, vocab_size=entry.num_usable_ids, size_bytes=size_bytes, beat=beat)


def engine_args(entry: ModelEntry, dtype: str, settings: Settings) -> EngineArgs:
    """What a teacher wants of vLLM: log-probabilities of all tokens that it reads."""
    step_tokens = min(max(LOGITS_BYTES // (4 * entry.vocab_size), STEP_TOKENS[0]), STEP_TOKENS[1])
    return EngineArgs(
        hf_overrides={"head_dtype": "float32"},  # log-probabilities of bfloat16 logits are off by up to 0.06 nats
        enable_prefix_caching=False,  # what is not computed has no log-probabilities
        enable_chunked_prefill=True,
        max_num_batched_tokens=step_tokens,
        max_num_seqs=STEP_TOKENS[0],
        logprobs_mode="raw_logprobs",
        worker_extension_cls=WORKER_EXTENSION,
        **engine_options(entry, dtype, settings, has_gpu=torch.cuda.is_available()),
    )


def _tell_of_its_death(llm: Any, processes: Sequence[Any]) -> None:
    """End the wait for an answer when a process of the engine dies: vLLM's own would go on for ever (0.32)."""
    answers = llm.engine_core.outputs_queue
    sentinels = [process.sentinel for process in processes]

    def watch() -> None:
        wait(sentinels)
        answers.put(VllmDeadError())

    Thread(target=watch, name="vllm-death", daemon=True).start()


def _obituary(processes: Sequence[Any], cause: Cause) -> str:
    """How the engine's process ended."""
    if not cause.read():
        for process in processes:
            process.join(CLOSE_S)
    return cause.obituary([process.exitcode for process in processes])
