"""A causal language model in memory, as the decoder uses it: forward passes on rows, weights replaced in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from stillhouse.core.errors import SpecError, WeightsError
from stillhouse.core.models import ModelEntry
from stillhouse.core.tensors import dtype_name
from stillhouse.sampler.engines.base import SampleRequest
from stillhouse.sampler.engines.cache import ATTENTION, RowCache

DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CHECK_LENGTHS: Final = (9, 5)
"""Tokens of the two sequences that every model is checked with."""
CHECK_TOLERANCE: Final = 0.25
"""Largest difference of a logit, in standard deviations of the logits. Rounding in bfloat16 stays below a tenth; a
token at the wrong position, or one that sees what it should not, is far above."""


class Model:
    """Weights, cache and limits."""

    def __init__(self, entry: ModelEntry, dtype: str, device: torch.device, max_rows: int, cache_gib: float) -> None:
        logging.disable_progress_bar()  # a service's log is read by machines
        self.device = device
        self.module: Any = AutoModelForCausalLM.from_pretrained(
            entry.path, dtype=DTYPES[dtype], local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
        self.module.to(device).eval().requires_grad_(False)
        head_rows = self.module.get_output_embeddings().weight.shape[0]
        # rows of the head beyond the tokenizer are padding: a token nobody can read must not be written
        self.vocab_size = min(entry.tokenizer_size, head_rows)
        self.max_sequence_length = entry.max_sequence_length
        self.end_ids = _end_of_sequence_ids(self.module)
        self.cache = RowCache(max_rows)
        self._masks_itself = not getattr(self.module, "_supports_attention_backend", False)
        self._check(entry)
        self._cache_gib = cache_gib
        self.cache.max_cells = int(cache_gib * 2**30) // self.cache.bytes_per_token
        self.cache.clear()

    @torch.inference_mode()
    def _check(self, entry: ModelEntry) -> None:
        """Compare sequences of different lengths in one batch with each on its own, as transformers does it.

        Raises:
            SpecError: the architecture cannot do it.
        """
        kinds = set(getattr(self.module.config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
        if kinds:
            raise SpecError(f"{entry.architecture} has layers of type {', '.join(sorted(kinds))}; use vllm")
        generator = torch.Generator().manual_seed(0)
        lengths = [min(length, self.max_sequence_length) for length in CHECK_LENGTHS]
        sequences = [torch.randint(self.vocab_size, (length,), generator=generator).tolist() for length in lengths]
        expected = torch.stack([self._plain(ids) for ids in sequences])
        if not self._masks_itself:
            self.module.set_attn_implementation(ATTENTION)
        try:
            for row, ids in enumerate(sequences):
                self.forward([ids[:-1]], [list(range(len(ids) - 1))], row)
            found = self.forward([[ids[-1]] for ids in sequences], [[len(ids) - 1] for ids in sequences], 0)
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
            raise SpecError(f"{entry.architecture} cannot be batched by this engine ({error}); use vllm") from error
        gap, spread = float((found - expected).abs().max()), float(expected.std())
        if not gap <= CHECK_TOLERANCE * spread:
            off = f"logits of a batch are off by {gap:.2g}, their standard deviation is {spread:.2g}"
            raise SpecError(f"{entry.architecture} cannot be batched by this engine: {off}; use vllm")

    def _plain(self, ids: list[int]) -> Tensor:
        """[V] logits of the token that follows."""
        output = self.module(input_ids=torch.tensor([ids], device=self.device), use_cache=False, logits_to_keep=1)
        return output.logits[0, -1, : self.vocab_size]

    def forward(self, ids_BQ: list[list[int]], positions_BQ: list[list[int]], first_row: int) -> Tensor:
        """[B, V] logits of what follows the last token of each row of the cache, counted from `first_row`."""
        positions = torch.tensor(positions_BQ, device=self.device)
        self.cache.open(first_row, positions, 1 + max(map(max, positions_BQ)))
        if self._masks_itself:
            options: dict[str, Any] = {"attention_mask": self.cache.mask(None, self.module.dtype)}
        else:
            options = {"row_cache": self.cache}
        output = self.module(
            input_ids=torch.tensor(ids_BQ, device=self.device),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
            **options,
        )
        return output.logits[:, -1, : self.vocab_size]

    def problem(self, request: SampleRequest) -> tuple[str, str] | None:
        """Reason and message, if the request cannot be written."""
        length, longest = len(request.prompt_ids), self.max_sequence_length
        if length == 0 or request.max_tokens < 1:
            return "empty", f"prompt of {length} tokens, at most {request.max_tokens} to write"
        if length >= longest:
            return "too_long", f"prompt of {length} tokens; the model reads {longest}, completion included"
        cells = min(length + request.max_tokens, longest)
        if not self.cache.fits(1, cells):
            room = f"{self._cache_gib:g} GiB of cache hold {self.cache.max_cells}"
            return "too_long", f"prompt and completion take up to {cells} tokens; {room}: raise sampler_cache_gib"
        ids = [*request.prompt_ids, *request.written]
        if not all(0 <= token < self.vocab_size for token in ids):
            return "bad_ids", f"token id {max(ids, key=abs)} in the prompt; the student knows {self.vocab_size} ids"
        if request.record_top_k > self.vocab_size:
            wanted, size = request.record_top_k, self.vocab_size
            return "bad_request", f"the {wanted} likeliest tokens of a vocabulary of {size}; lower k"
        return None

    def load(self, arrays: Mapping[str, np.ndarray[Any, Any]], dtypes: Mapping[str, int]) -> None:
        """Replace the weights: all or none (see `Engine.load_weights`)."""
        targets: dict[str, Tensor] = self.module.state_dict()
        unknown = sorted(arrays.keys() - targets.keys())
        if unknown:
            raise WeightsError(f"weights for tensors the student does not have: {', '.join(unknown[:5])}")
        # tied tensors are one memory under several names and come once
        covered = {targets[name].data_ptr() for name in arrays}
        missing = [name for name, target in targets.items() if target.data_ptr() not in covered]
        if missing:
            raise WeightsError(
                f"{len(missing)} of {len(targets)} tensors of the student are missing, first {missing[0]}"
            )
        sources = {name: _as_torch(array, dtypes[name]) for name, array in arrays.items()}
        for name, source in sources.items():
            if source.shape != targets[name].shape:
                raise WeightsError(
                    f"{name}: got shape {list(source.shape)}, the student has {list(targets[name].shape)}"
                )
            if not bool(torch.isfinite(source).all()):
                raise WeightsError(f"{name}: NaN or infinity in the weights")
        for name, source in sources.items():
            targets[name].copy_(source)


def _as_torch(array: np.ndarray[Any, Any], dtype: int) -> Tensor:
    if not array.flags.writeable:  # torch cannot express read-only memory
        array = array.copy()
    if dtype_name(dtype) == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _end_of_sequence_ids(model: Any) -> frozenset[int]:
    """Token ids that end a completion: generation_config's, else config's."""
    found = getattr(model.generation_config, "eos_token_id", None)
    if found is None:
        found = getattr(model.config, "eos_token_id", None)
    if found is None:
        return frozenset()
    return frozenset([found] if isinstance(found, int) else found)
