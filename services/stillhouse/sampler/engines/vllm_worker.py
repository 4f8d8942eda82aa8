"""What runs inside vLLM's worker processes: how we draw, how weights come in, and the end with the parent.

vLLM imports this module in each worker (`WORKER_EXTENSION`) before it makes the model. Axes: B batch, V vocab.
"""

# pyright: reportMissingImports=false
# make check works without vLLM
from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.sampler import Sampler

from stillhouse.core.vllm_child import enter
from stillhouse.sampler.engines.base import SampleRequest
from stillhouse.sampler.engines.draw import Distributions, uniforms
from stillhouse.sampler.engines.vllm_wire import OURS, hash_file, pack_notes


class DrawSampler(Sampler):
    """Draws with draw.py instead of vLLM's own code, so that seeds, truncation and log-probabilities mean the same in
    every engine. vLLM's log-probabilities would be those after top_k and top_p, and it would begin the stream of a seed
    again where a completion is continued.
    """

    def __init__(self, runner: Any, vocab_size: int) -> None:
        super().__init__("processed_logprobs")
        self._runner = runner
        self._vocab_size = vocab_size
        self._uniforms: dict[str, np.ndarray[Any, Any]] = {}

    def forward(self, logits: Tensor, *_: Any, **__: Any) -> SamplerOutput:
        """Next tokens from [B, V] logits.

        vLLM carries columns of (token id, log-probability) and one integer per token, its rank, which nobody here
        wants. They go out as: the token and the likeliest ids; the log-probability of the token in all columns; in
        place of the rank `pack_notes`.
        """
        requests, uniforms_B = self._rows(len(logits))
        found = Distributions.of(logits[:, : self._vocab_size], requests)
        ids_B = found.draw(requests, uniforms_B)
        most = max(request.record_top_k for request in requests)
        ids = torch.cat([ids_B[:, None], found.likeliest(most)], 1) if most else ids_B[:, None]
        logprobs = found.logprobs(ids_B)[:, None].float().expand(ids.shape).contiguous()
        bits_B = torch.zeros_like(ids_B)
        if any(request.record_entropies for request in requests):
            bits_B = found.entropies().float().view(torch.int32).long()
        return SamplerOutput(
            sampled_token_ids=ids_B[:, None].int(),
            logprobs_tensors=LogprobsTensors(ids.int(), logprobs, pack_notes(bits_B, FileTransfer.tag)),
        )

    def _rows(self, count: int) -> tuple[list[SampleRequest], list[float]]:
        """The request of each row of the batch, and the uniform that draws its next token."""
        states = self._runner.requests
        for key in self._uniforms.keys() - states.keys():
            del self._uniforms[key]
        requests, uniforms_B = [], []
        for key in self._runner.input_batch.req_ids[:count]:
            request = SampleRequest(key, [], **states[key].sampling_params.extra_args[OURS])
            if key not in self._uniforms:
                self._uniforms[key] = uniforms(request.seed, request.max_tokens)
            index = len(request.written) + len(states[key].output_token_ids)
            uniforms_B.append(float(self._uniforms[key][index]))
            requests.append(request)
        return requests, uniforms_B


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Nothing: both ends are on one machine."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """A whole set of weights."""

    path: str
    """A safetensors file with the tensors of the model folder, under their names there."""
    xxh3_128: str
    """Hash of the file."""
    tag: int
    """What tokens are marked with from now on."""


class FileTransfer(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Weights in a file of this machine, named by path and checked by hash; each worker takes its share.

    All of an update is one call, which vLLM makes between two tokens: there is never half a model.
    """

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    tag = 0
    """Of the weights in this process."""

    def init_transfer_engine(self, init_info: InitInfo) -> None: ...

    def start_weight_update(self) -> None: ...

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """As the base class does, which waits for an accelerator even where there is none."""
        self.receive_weights(self.parse_update_info(update_info))
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: UpdateInfo) -> None:
        found = hash_file(update_info.path)
        if found != update_info.xxh3_128:
            raise ValueError(f"{update_info.path} hashes to {found[:12]}, announced was {update_info.xxh3_128[:12]}")
        initialize_layerwise_reload(self.model)
        model: Any = self.model
        model.load_weights(_tensors(update_info.path))
        finalize_layerwise_reload(self.model, self.model_config)
        for module in self.model.modules():
            # on a CPU the head multiplies with a packed copy, which nobody renews where it is tied to the embedding
            if isinstance(module, ParallelLMHead):
                module.quant_method.process_weights_after_loading(module)
        FileTransfer.tag = update_info.tag

    def finish_weight_update(self) -> None: ...

    def shutdown(self) -> None: ...


def _tensors(path: str) -> Iterator[tuple[str, Tensor]]:
    with safe_open(path, framework="pt", device="cpu") as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            yield name, file.get_tensor(name)


class Extension:
    """Methods that vLLM adds to its worker class."""

    model_runner: Any

    def stillhouse_begin(self, vocab_size: int) -> int:
        """Draw our way from now on; gives the worker's pid."""
        if not isinstance(self.model_runner.sampler, Sampler):
            raise TypeError("our sampler fits vLLM's model runner V1: VLLM_USE_V2_MODEL_RUNNER=0")
        self.model_runner.sampler = DrawSampler(self.model_runner, vocab_size)
        return os.getpid()


enter()
# at every update it warns of tied heads, which come with the embedding
logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)
WeightTransferEngineFactory.register_engine(OURS, FileTransfer)
