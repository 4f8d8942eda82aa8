"""The student as the learner needs it: a body that gives hidden states, and the head applied apart from it.

Loads from safetensors only, runs no foreign code. Leaves out training; see learner.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging as transformers_logging

from stillhouse.core.errors import SpecError
from stillhouse.trainer.attention import packed_hidden, packing_obstacle
from stillhouse.trainer.batch import TeacherHead
from stillhouse.trainer.objectives.base import Head

Packing = Literal["auto", "off", "on"]
DTYPES: Final[dict[str, torch.dtype]] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PROBE_TOKENS: Final = 8
"""Length of the sequence on which body + head are compared with the whole model."""
PROBE_TOLERANCE: Final = 0.02
"""Largest difference accepted, relative to the largest logit: bfloat16 rounds at 0.4 %; an unknown scale or cap is
far off."""


def load_student(model_dir: Path, dtype: str, device: torch.device) -> PreTrainedModel:
    """The model in `dtype`, with gradients, without dropout.

    It stays in evaluation mode: the student that is trained must be the student that sampled.
    """
    transformers_logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=DTYPES[dtype], local_files_only=True, trust_remote_code=False, use_safetensors=True
    )
    nn.Module.to(model, device)
    model.eval()
    model.requires_grad_(True)
    _check_head(model, model_dir)
    return model


def student_hidden(model: PreTrainedModel, input_ids: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
    """[B, L, D] hidden states after the final norm for [B, L] ids, padded on the right; or packed, with `lengths`.

    No attention mask: attention is causal, so padding on the right is seen by padding only, and without a mask the
    faster kernels apply.
    """
    if lengths is not None:
        return packed_hidden(model, input_ids, lengths)
    return model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state


def choose_packing(model: PreTrainedModel, wanted: Packing) -> tuple[bool, str]:
    """(whether samples lie one after the other in a forward pass, why); lets the model do it if so.

    Raises:
        SpecError: it is wanted, and the model's attention does not keep them apart exactly.
    """
    if wanted == "off":
        return False, "the job says so"
    if wanted == "auto" and model.device.type != "cpu":
        return False, f"it was measured to be faster on a CPU only, this is '{model.device.type}'"
    obstacle = packing_obstacle(model)
    if obstacle and wanted == "on":
        raise SpecError(
            f"schedule.packing is on, and {type(model).__name__} does not keep packed samples apart exactly: "
            f"{obstacle}; set it to auto or off"
        )
    return not obstacle, obstacle or "the model keeps packed samples apart exactly"


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Keep only the input of every layer; the backward pass computes the rest of it again.

    transformers does the same, but in training mode only, which would turn dropout on.

    Raises:
        SpecError: the model does not say what its layers are.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise SpecError(
            f"{type(model).__name__} does not mark layers that can be computed again; set "
            "student.activation_checkpointing to false"
        )
    for layer in layers:  # nothing in a layer is random, so no random states need to be kept
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


def student_head(model: PreTrainedModel) -> Head:
    """The output head with its live weights, tied or not."""
    layer = model.get_output_embeddings()
    if not isinstance(layer, nn.Linear):
        raise SpecError(f"{type(model).__name__} has no linear output head ({type(layer).__name__}); not supported")
    config: Any = model.config
    scale = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere multiplies ...
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)  # ... Granite divides
    cap = float(getattr(config, "final_logit_softcapping", None) or 0.0)  # Gemma 2
    return Head(layer.weight, layer.bias, scale, cap)


def tokenizer_size(model_dir: Path) -> int:
    """Highest token id + 1."""
    vocabulary = Tokenizer.from_file(str(model_dir / "tokenizer.json")).get_vocab(with_added_tokens=True)
    return max(vocabulary.values()) + 1


def teacher_head(head: TeacherHead, device: torch.device) -> Head:
    """A teacher's head in float32 on the device, without the rows that pad its vocabulary."""

    def tensor(array: np.ndarray) -> Tensor:
        rows = np.array(array[: head.vocab_size])  # a copy: wire buffers are read-only, and the padding may go
        if head.dtype == "bfloat16":
            return torch.from_numpy(rows.view(np.int16)).view(torch.bfloat16).to(device, torch.float32)
        return torch.from_numpy(rows).to(device)

    bias = None if head.bias is None else tensor(head.bias)
    return Head(tensor(head.weight), bias, head.logit_scale, head.logit_soft_cap)


@torch.no_grad()
def _check_head(model: PreTrainedModel, model_dir: Path) -> None:
    """Refuse a model whose logits are not its head applied to its last hidden state."""
    head = student_head(model)
    ids = torch.arange(PROBE_TOKENS, device=head.weight.device)[None] % head.weight.shape[0]
    ours = head.logits(student_hidden(model, ids)).float()
    theirs = model(input_ids=ids, use_cache=False).logits.float()
    gap = (ours - theirs).abs().max().item()
    if not gap <= PROBE_TOLERANCE * theirs.abs().max().item():
        raise SpecError(
            f"{model_dir}: head and last hidden state of {type(model).__name__} give logits that differ by {gap:.3g} "
            "from the model's own; it post-processes them in a way this trainer does not know"
        )
