"""What training changes: the student's parameters (or its adapter's), their float32 masters, gradients and optimizer,
their running average; their state on disk.

Leaves out how gradients come about (engine.py) and when a step may count (learner.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import PreTrainedModel

from stillhouse.core.spec import OptimizerSpec
from stillhouse.trainer import checkpoint
from stillhouse.trainer.batch import Update
from stillhouse.trainer.lora import learned, merged_weights, save_adapter
from stillhouse.trainer.shards import Share


class Parameters:
    """The parameters of a model that learns, whole, on one device."""

    share = Share()
    """The rows of every tensor that are here."""

    def __init__(self, model: PreTrainedModel, spec: OptimizerSpec) -> None:
        self._model = model
        self._params = learned(model)
        # In bfloat16 a step of 1e-5 is lost to rounding: the optimizer moves float32 copies, the model follows.
        self._masters = {name: self._master(param) for name, param in self._params.items()}
        self.optimizer = _adamw(self._masters, spec)
        self._max_norm = spec.max_grad_norm
        self._decay = spec.ema_decay
        self._average: dict[str, Tensor] = {}
        """Exponential moving average of the masters; empty without one."""
        if self._decay is not None:
            self._average = {name: master.detach().clone() for name, master in self._masters.items()}
        self._shows_average = False

    def collect_gradients(self) -> None:
        """Add the model's gradients to the masters', in float32."""
        for name, param in self._params.items():
            master, grad = self._masters[name], self._gradient(param)
            if master is param or grad is None:
                continue
            master.grad = grad.float() if master.grad is None else master.grad.add_(grad)
            param.grad = None

    def clear_gradients(self) -> None:
        for tensor in (*self._params.values(), *self._masters.values()):
            tensor.grad = None

    def gradient_norm(self) -> float:
        """Global norm of the gradients so far."""
        return get_total_norm([m.grad for m in self._masters.values() if m.grad is not None]).item()

    def update(self, lr: float) -> Update:
        """Clip the gradients and step the optimizer; gradients that are not finite are dropped and change nothing."""
        self.show_average(False)
        norm = self.gradient_norm()
        if not math.isfinite(norm):
            bad = [name for name, m in self._masters.items() if m.grad is not None and not _is_finite(m.grad)]
            self.clear_gradients()
            return Update(norm, bad_gradients=bad)
        clip_grads_with_norm_(self._masters.values(), self._max_norm, torch.tensor(norm))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.clear_gradients()
        self._move_average()
        self._follow_masters()
        return Update(norm, bad_weights=[name for name, m in self._masters.items() if not _is_finite(m)])

    @torch.no_grad()
    def _move_average(self) -> None:
        """average = decay * average + (1 - decay) * weight, in float32."""
        for name, average in self._average.items():
            average.lerp_(self._masters[name], 1 - (self._decay or 0.0))

    @torch.no_grad()
    def show_average(self, on: bool) -> None:
        """Let the model compute with the average of its weights, or again with those that learn; bit for bit."""
        if on == self._shows_average or not self._average:
            return
        for name, average in self._average.items():
            master = self._masters[name]
            hidden = master.clone()
            master.copy_(average)
            average.copy_(hidden)
        self._shows_average = on
        self._follow_masters()

    def save_adapter(self, folder: Path, base: str) -> None:
        """Write the low-rank adapter for peft; see lora.py."""
        save_adapter(folder, self._model, self._masters, base)

    def state_arrays(self) -> list[tuple[str, np.ndarray, str]]:
        """(name, array, element type) of all weights: a copy, contiguous, tied tensors once, bfloat16 as uint16 bits.

        Names are those of the base model's `state_dict`; an adapter is merged into them.
        """
        arrays = []
        for name, weight in self._weights():
            # one copy, whatever the device: `.cpu()` of a CPU tensor would share its memory
            tensor = torch.empty(weight.shape, dtype=weight.dtype).copy_(weight)
            if tensor.dtype == torch.bfloat16:
                arrays.append((name, tensor.view(torch.int16).numpy().view(np.uint16), "bfloat16"))
            else:
                arrays.append((name, tensor.numpy(), str(tensor.dtype).removeprefix("torch.")))
        return arrays

    def save(self, folder: Path, facts: Mapping[str, Any]) -> None:
        """Write everything a bit-exact continuation needs; see checkpoint.py."""
        shown = self._shows_average
        self.show_average(False)
        checkpoint.save_state(folder, self._masters, self.optimizer, facts, self.share, average=self._average)
        self.show_average(shown)

    def load(self, folder: Path) -> dict[str, Any]:
        """Continue from what `save` wrote; gives the facts.

        Raises:
            CorruptError: it does not read, or is of another student.
        """
        self._shows_average = False
        facts = checkpoint.load_state(folder, self._masters, self.optimizer, self.share, average=self._average)
        self._follow_masters()
        return facts

    def load_weights(self, folder: Path) -> None:
        """The weights of a checkpoint, with the optimizer as it is; an average starts from them."""
        self._shows_average = False
        checkpoint.load_weights(folder, self._masters, self.share)
        with torch.no_grad():
            for name, average in self._average.items():
                average.copy_(self._masters[name])
        self._follow_masters()

    # --- what differs where a device holds only some rows ---

    def _master(self, param: Tensor) -> Tensor:
        """The float32 tensor that the optimizer moves for a parameter."""
        return param if param.dtype == torch.float32 else param.detach().float().requires_grad_()

    def _gradient(self, param: Tensor) -> Tensor | None:
        return param.grad

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, whole tensor) of all weights, in the model's element type."""
        return merged_weights(self._model, self._masters)

    @torch.no_grad()
    def _follow_masters(self) -> None:
        """Round the masters into the model."""
        for name, param in self._params.items():
            if self._masters[name] is not param:
                param.copy_(self._masters[name])


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _adamw(masters: Mapping[str, Tensor], spec: OptimizerSpec) -> torch.optim.AdamW:
    """AdamW; weight decay acts on matrices, not on norms and biases."""
    groups = [
        {"params": [m for m in masters.values() if m.ndim >= 2], "weight_decay": spec.weight_decay},
        {"params": [m for m in masters.values() if m.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=spec.lr, betas=spec.betas, eps=spec.eps, fused=True)
