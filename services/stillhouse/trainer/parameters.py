"""What training changes: the student's parameters (or its adapter's), their float32 masters, gradients and optimizer,
their running averages; their state on disk.

Leaves out how gradients come about (engine.py) and when a step may count (learner.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import PreTrainedModel

from stillhouse.core.spec import EmaSpec, OptimizerSpec
from stillhouse.trainer import checkpoint
from stillhouse.trainer.batch import Update
from stillhouse.trainer.lora import learned, merged_weights, save_adapter
from stillhouse.trainer.shards import Share

HELD: Final = "held"
"""Name of the copy that a held-out evaluation computes with; never on disk."""


class Parameters:
    """The parameters of a model that learns, whole, on one device."""

    share = Share()
    """The rows of every tensor that are here."""

    def __init__(self, model: PreTrainedModel, spec: OptimizerSpec, ema: EmaSpec | None = None) -> None:
        self._model = model
        self._params = learned(model)
        # In bfloat16 a step of 1e-5 is lost to rounding: the optimizer moves float32 copies, the model follows.
        self._masters = {name: self._master(param) for name, param in self._params.items()}
        self._decays: dict[str, float] = {}
        """Of each exponential moving average that is kept, by the name of its file."""
        self._averages: dict[str, dict[str, Tensor]] = {}
        self._held: dict[str, Tensor] = {}
        """The weights as they were at `hold`; empty = none are held."""
        self._shown = ""
        """The average that the model computes with, or HELD; empty = the weights that learn."""
        self._keep_average(checkpoint.FOLLOWED, None if ema is None else ema.decay)
        self.begin_stage(spec)

    def begin_stage(self, spec: OptimizerSpec) -> None:
        """A fresh optimizer on the weights as they are, with which the stage's average begins.

        The average that teachers follow goes on: it is the job's.
        """
        self.show_average(False)
        self.optimizer = _adamw(self._masters, spec)
        self._max_norm = spec.max_grad_norm
        self._keep_average(checkpoint.AVERAGE, spec.ema_decay)

    def _keep_average(self, stem: str, decay: float | None) -> None:
        """Keep an average from now on; None = keep it no more."""
        self._decays.pop(stem, None)
        self._averages.pop(stem, None)
        if decay is not None:
            self._decays[stem] = decay
            self._averages[stem] = {name: master.detach().clone() for name, master in self._masters.items()}

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
        self._move(checkpoint.AVERAGE)
        self._follow_masters()
        return Update(norm, bad_weights=[name for name, m in self._masters.items() if not _is_finite(m)])

    def move_followed(self) -> None:
        """Move the average that teachers follow."""
        self._show("")
        self._move(checkpoint.FOLLOWED)

    @torch.no_grad()
    def _move(self, stem: str) -> None:
        """average = decay * average + (1 - decay) * weight, in float32."""
        for name, average in self._averages.get(stem, {}).items():
            average.lerp_(self._masters[name], 1 - self._decays[stem])

    def hold(self, on: bool) -> None:
        """Keep a copy of the weights as they are now, for `show_held`; or drop it."""
        self._show("")
        self._held = {name: master.detach().clone() for name, master in self._masters.items()} if on else {}

    def show_held(self, on: bool) -> None:
        """Let the model compute with the weights that are held, or again with those that learn; bit for bit."""
        self._show(HELD if on else "")

    def show_average(self, on: bool) -> None:
        """Let the model compute with the average of its weights, or again with those that learn; bit for bit."""
        self._show(checkpoint.AVERAGE if on and checkpoint.AVERAGE in self._averages else "")

    @torch.no_grad()
    def _show(self, stem: str) -> None:
        if stem == self._shown:
            return
        for swapped in (self._shown, stem):  # a second swap undoes the first
            for name, average in (self._held if swapped == HELD else self._averages.get(swapped, {})).items():
                master = self._masters[name]
                hidden = master.clone()
                master.copy_(average)
                average.copy_(hidden)
        self._shown = stem
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

    def followed_arrays(self) -> list[tuple[str, np.ndarray, str]]:
        """The average that teachers follow, as `state_arrays`."""
        shown = self._shown
        self._show(checkpoint.FOLLOWED)
        arrays = self.state_arrays()
        self._show(shown)
        return arrays

    def save(self, folder: Path, facts: Mapping[str, Any]) -> None:
        """Write everything a bit-exact continuation needs; see checkpoint.py."""
        shown = self._shown
        self._show("")
        checkpoint.save_state(folder, self._masters, self.optimizer, facts, self.share, averages=self._averages)
        self._show(shown)

    def load(self, folder: Path) -> dict[str, Any]:
        """Continue from what `save` wrote; gives the facts.

        Raises:
            CorruptError: it does not read, or is of another student.
        """
        self._shown, self._held = "", {}
        facts = checkpoint.load_state(folder, self._masters, self.optimizer, self.share, averages=self._averages)
        self._follow_masters()
        return facts

    def load_weights(self, folder: Path) -> None:
        """The weights of a checkpoint and nothing else of it: to make a model of them."""
        checkpoint.load_weights(folder, self._masters, self.share)
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
