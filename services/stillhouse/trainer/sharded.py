"""One rank's part of a student that several devices train together (FSDP2): every weight is split by rows.

    forward, backward     each rank runs a micro-batch of its own; a layer's rows are gathered when it is needed, its
                          gradients are summed over the ranks and scattered, once per micro-batch
    update                each rank moves its rows, clipped by the norm over all ranks

Weights in the loss are shares of the whole step (packing.loss_weights), so the step's gradient is the sum over the
ranks, not their mean. All ranks make the same calls in the same order; only data may differ. Who says what comes next
is in ranks.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from stillhouse.core.spec import EmaSpec, OptimizerSpec
from stillhouse.trainer.batch import TeacherHead
from stillhouse.trainer.engine import Engine
from stillhouse.trainer.packing import MicroBatch
from stillhouse.trainer.parameters import Parameters
from stillhouse.trainer.shards import Share
from stillhouse.trainer.student import DTYPES


class ShardedEngine(Engine):
    """The part of one rank."""

    def _hold_parameters(self) -> Parameters:
        dtype = DTYPES[self.student.dtype]
        nn.Module.to(self.model, torch.float32)  # each rank keeps its rows of the masters; passes compute in `dtype`
        layers = set(self.model._no_split_modules or ())
        for module in list(self.model.modules()):
            if type(module).__name__ in layers:
                _shard(module, dtype)
        _shard(self._passes, dtype)
        return ShardedParameters(self.model, self.stage.optimizer, dtype, self._ema)

    def _exact_kl(self, batch: MicroBatch, head: TeacherHead, temperature: float) -> np.ndarray:
        kls = super()._exact_kl(batch, head, temperature)
        # without a backward pass nothing else drops the gathered weights, and later passes would compute with old ones
        cast(FSDPModule, self._passes).reshard()
        return kls


def _shard(module: nn.Module, dtype: torch.dtype) -> None:
    """`fully_shard` with gradients that are sums, in float32."""
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    sharded = cast(FSDPModule, fully_shard(module, mp_policy=policy))
    sharded.set_gradient_divide_factor(1.0)
    sharded.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum


class ShardedParameters(Parameters):
    """One rank's rows of all parameters, in float32: they are the masters."""

    def __init__(
        self, model: PreTrainedModel, spec: OptimizerSpec, dtype: torch.dtype, ema: EmaSpec | None = None
    ) -> None:
        self.share = Share(dist.get_rank(), dist.get_world_size())
        self._dtype = dtype
        super().__init__(model, spec, ema)

    def _master(self, param: Tensor) -> Tensor:
        return _local(param.detach()).requires_grad_()  # the same memory

    def _gradient(self, param: Tensor) -> Tensor | None:
        return None if param.grad is None else _local(param.grad)

    def gradient_norm(self) -> float:
        """Global norm of the gradients of all ranks."""
        squares = torch.tensor(super().gradient_norm(), dtype=torch.float64).square()
        total = squares.to(next(iter(self._masters.values())).device)
        dist.all_reduce(total)
        return total.sqrt().item()

    def state_arrays(self) -> list[tuple[str, np.ndarray, str]]:
        """All weights, on rank 0. The others only help to gather them, and keep none."""
        if self.share.rank == 0:
            return super().state_arrays()
        for _ in self._weights():
            pass
        return []

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, whole tensor), one after the other; every rank has to take part."""
        for name, param in self._params.items():
            yield name, cast(DTensor, param.detach().to(self._dtype)).full_tensor()

    def _follow_masters(self) -> None:
        """They are the model's rows."""


def _local(tensor: Any) -> Tensor:
    return cast(DTensor, tensor).to_local()
