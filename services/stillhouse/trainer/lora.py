"""Low-rank adapters on the student: put in by peft, merged for samplers and export, kept alone in checkpoints.

    y = W x + (alpha / rank) B A x          W frozen, A random, B zero at the start: version 0 is the base model

What learns is named as in peft's own files, so the weights of a checkpoint are an adapter that peft reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from peft import LoraConfig, TaskType, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from stillhouse.core.errors import SpecError
from stillhouse.core.spec import LoraSpec

ADAPTER: Final = "default"
"""peft's name of the only adapter."""
_PREFIX: Final = "base_model.model."
"""What peft puts before the student's own names in its files."""


def add_adapter(model: PreTrainedModel, spec: LoraSpec, seed: int) -> None:
    """Freeze the model and put adapters in, drawn from `seed`; no dropout.

    Raises:
        SpecError: a target is not there, or is no linear layer of the body.
    """
    config = _config(model, spec)
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, ADAPTER)
    model.eval()


def learned(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """What learns, tied tensors once: the adapter's matrices under peft's names, or all weights under the model's."""
    params = dict(model.named_parameters())
    if not _layers(model):
        return params
    return {_PREFIX + name.replace(f".{ADAPTER}.", "."): param for name, param in params.items() if param.requires_grad}


@torch.no_grad()
def merged_weights(model: PreTrainedModel, masters: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """(name, weight) of the model with its adapter in it: names and types of the base model, tied tensors once.

    The sum is taken in float32, from the adapter's float32 masters. The model stays as it is.
    """
    layers = {f"{name}.base_layer.weight": (name, layer) for name, layer in _layers(model).items()}
    for name, param in model.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            continue
        weight = param.detach()
        if name in layers:
            path, layer = layers[name]
            a, b = (masters[f"{_PREFIX}{path}.lora_{side}.weight"] for side in "AB")
            weight = (weight.float() + layer.scaling[ADAPTER] * (b @ a)).to(weight.dtype)
        yield name.replace(".base_layer.", "."), weight


def save_adapter(folder: Path, model: PreTrainedModel, masters: Mapping[str, Tensor], base: str) -> None:
    """Write the adapter as `PeftModel.from_pretrained` reads it, in float32; `base` names the model it belongs to."""
    adapters: Any = model.peft_config
    config = replace(adapters[ADAPTER], inference_mode=True, base_model_name_or_path=base)
    config.save_pretrained(folder)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in masters.items()}
    save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})


def _config(model: PreTrainedModel, spec: LoraSpec) -> LoraConfig:
    head = model.get_output_embeddings()
    return LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,  # type: ignore[arg-type]  # any number will do
        target_modules=_targets(model, spec),
        exclude_modules=[name for name, module in model.named_modules() if module is head],
        lora_dropout=0.0,  # the student that learns is the student that sampled
        task_type=TaskType.CAUSAL_LM,
    )


def _targets(model: PreTrainedModel, spec: LoraSpec) -> list[str]:
    """Names that pick the layers: full ones, or the ends of them."""
    head = model.get_output_embeddings()
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]
    endings = sorted({name.rpartition(".")[2] for name in linear})
    if spec.target_modules == "all-linear":
        return endings
    for target in spec.target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            raise SpecError(
                f"student.lora.target_modules: '{target}' is no linear layer of {type(model).__name__} below its "
                f"output head, which stays frozen; it has {', '.join(endings)}"
            )
    return list(spec.target_modules)


def _layers(model: nn.Module) -> dict[str, LoraLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
