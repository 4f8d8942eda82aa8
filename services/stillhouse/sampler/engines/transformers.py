"""Writing with Hugging Face transformers: one prefill, then batched decoding on a KV cache; CPU or GPU.

Axes: B batch, P prompt (padded), V vocab. No continuous batching: a batch is as old as its longest completion, but rows
that ended are dropped and cost nothing. For throughput on GPUs there is vLLM.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils import logging

from stillhouse.core.errors import WeightsError
from stillhouse.core.models import ModelEntry
from stillhouse.core.tensors import dtype_name
from stillhouse.sampler.engines.base import Completion, SampleRequest, failed
from stillhouse.sampler.engines.draw import draw, entropies, log_probs, uniforms

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(slots=True, eq=False)
class _Row:
    """A completion being written."""

    request: SampleRequest
    uniforms: np.ndarray
    max_tokens: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    target_ids: list[np.ndarray] = field(default_factory=list)
    """[K] int32 each; empty unless asked for, like `entropies`."""
    entropies: list[float] = field(default_factory=list)
    sample_s: float = 0.0


class TransformersEngine:
    """`Engine` on `AutoModelForCausalLM`."""

    name = "transformers"

    def __init__(self, entry: ModelEntry, dtype: str, *, threads: int = 0, device: str = "") -> None:
        if threads:
            torch.set_num_threads(threads)
        logging.disable_progress_bar()  # a service's log is read by machines
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            entry.path, dtype=DTYPES[dtype], local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
        self._model.to(self._device).eval().requires_grad_(False)
        head_rows = self._model.get_output_embeddings().weight.shape[0]
        # rows of the head beyond the tokenizer are padding: a token nobody can read must not be written
        self.vocab_size = min(entry.tokenizer_size, head_rows)
        self.max_sequence_length = entry.max_sequence_length
        self._end_ids = _end_of_sequence_ids(self._model)

    @torch.inference_mode()
    def generate(
        self,
        requests: Sequence[SampleRequest],
        on_finished: Callable[[Completion], None],
        should_abort: Callable[[str], bool],
    ) -> None:
        rows: list[_Row] = []
        for request in requests:
            problem = self._problem(request)
            if problem is not None:
                on_finished(problem)
                continue
            max_tokens = min(request.max_tokens, self.max_sequence_length - len(request.prompt_ids))
            rows.append(_Row(request, uniforms(request.seed, max_tokens), max_tokens))
        if rows:
            self._decode(rows, on_finished, should_abort)

    def _problem(self, request: SampleRequest) -> Completion | None:
        length = len(request.prompt_ids)
        if length == 0 or request.max_tokens < 1:
            return failed(request, "empty", f"prompt of {length} tokens, at most {request.max_tokens} to write")
        if length >= self.max_sequence_length:
            longest = self.max_sequence_length
            return failed(
                request, "too_long", f"prompt of {length} tokens; the model reads {longest}, completion included"
            )
        if not all(0 <= token < self.vocab_size for token in request.prompt_ids):
            worst = max(request.prompt_ids, key=abs)
            return failed(
                request, "bad_ids", f"token id {worst} in the prompt; the student knows {self.vocab_size} ids"
            )
        if request.record_top_k > self.vocab_size:
            wanted, size = request.record_top_k, self.vocab_size
            return failed(request, "bad_request", f"the {wanted} likeliest tokens of a vocabulary of {size}; lower k")
        return None

    def _decode(
        self, rows: list[_Row], on_finished: Callable[[Completion], None], should_abort: Callable[[str], bool]
    ) -> None:
        started = time.perf_counter()
        logits_BV, cache, mask_BL, position_B = self._prefill(rows)
        while True:
            ids_B = self._sample(rows, logits_BV)
            elapsed = time.perf_counter() - started
            for row in rows:
                row.sample_s += elapsed / len(rows)
            keep = []
            for number, row in enumerate(rows):
                ended = self._ended(row, should_abort)
                if ended is None:
                    keep.append(number)
                else:
                    on_finished(ended)
            if not keep:
                return
            started = time.perf_counter()
            if len(keep) < len(rows):
                index = torch.tensor(keep, device=self._device)
                cache.batch_select_indices(index)
                ids_B, mask_BL, position_B = ids_B[index], mask_BL[index], position_B[index]
                rows = [rows[number] for number in keep]
            mask_BL = torch.cat([mask_BL, mask_BL.new_ones(len(rows), 1)], dim=1)
            output = self._model(
                input_ids=ids_B[:, None],
                attention_mask=mask_BL,
                position_ids=position_B[:, None],
                past_key_values=cache,
                use_cache=True,
            )
            logits_BV = output.logits[:, -1]
            position_B = position_B + 1

    def _prefill(self, rows: list[_Row]) -> tuple[Tensor, DynamicCache, Tensor, Tensor]:
        """([B, V] logits of the first token, cache, [B, P] mask, [B] position of the next token).

        Samples of one prompt share its prefill.
        """
        prompts = list(dict.fromkeys(tuple(row.request.prompt_ids) for row in rows))
        longest = max(map(len, prompts))
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros(len(prompts), longest, dtype=torch.long)
        for number, prompt in enumerate(prompts):
            # padding on the left: the next token of every row is then in the same column
            ids[number, longest - len(prompt) :] = torch.tensor(prompt)
            mask[number, longest - len(prompt) :] = 1
        ids, mask = ids.to(self._device), mask.to(self._device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache(config=self._model.config)
        output = self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        where = {prompt: number for number, prompt in enumerate(prompts)}
        index = torch.tensor([where[tuple(row.request.prompt_ids)] for row in rows], device=self._device)
        if len(prompts) < len(rows):
            cache.batch_select_indices(index)
        return output.logits[index, -1], cache, mask[index], positions[index, -1] + 1

    def _sample(self, rows: list[_Row], logits_BV: Tensor) -> Tensor:
        """[B] next token of each row, appended to it."""
        uniforms_B = [float(row.uniforms[len(row.ids)]) for row in rows]
        logits = logits_BV[:, : self.vocab_size].float().cpu()
        requests = [row.request for row in rows]
        logprobs_BV = log_probs(logits, requests)
        ids_B = draw(logprobs_BV, requests, uniforms_B)
        logprobs_B = logprobs_BV.gather(1, ids_B[:, None])[:, 0]
        for row, token, logprob in zip(rows, ids_B.tolist(), logprobs_B.tolist(), strict=True):
            row.ids.append(token)
            row.logprobs.append(logprob)
        _record(rows, logprobs_BV)
        return ids_B.to(self._device)

    def _ended(self, row: _Row, should_abort: Callable[[str], bool]) -> Completion | None:
        """The completion, if its last token was the last one."""
        if not np.isfinite(row.logprobs[-1]):
            message = f"log-probability {row.logprobs[-1]} at token {len(row.ids) - 1}: the weights are broken"
            return failed(row.request, "non_finite", message)
        if row.ids[-1] in self._end_ids or row.ids[-1] in row.request.stop_token_ids:
            reason = "stop"
        elif len(row.ids) >= row.max_tokens:
            reason = "length"
        elif should_abort(row.request.key):
            reason = "abort"
        else:
            return None
        return Completion(
            row.request.key,
            reason,
            row.ids,
            row.logprobs,
            row.sample_s,
            target_ids=np.stack(row.target_ids) if row.target_ids else None,
            entropies=np.asarray(row.entropies, dtype=np.float32) if row.entropies else None,
        )

    @torch.inference_mode()
    def load_weights(self, arrays: Mapping[str, np.ndarray[Any, Any]], dtypes: Mapping[str, int]) -> None:
        targets: dict[str, Tensor] = self._model.state_dict()
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


def _record(rows: Sequence[_Row], logprobs_BV: Tensor) -> None:
    """Add to each row what its request wants to know of the distribution that its last token was drawn from."""
    most = max(row.request.record_top_k for row in rows)
    if most:
        ids_BK = logprobs_BV.topk(most).indices.int().numpy()
        for row, ids_K in zip(rows, ids_BK, strict=True):
            if row.request.record_top_k:
                row.target_ids.append(ids_K[: row.request.record_top_k].copy())
    if any(row.request.record_entropies for row in rows):
        for row, entropy in zip(rows, entropies(logprobs_BV).tolist(), strict=True):
            if row.request.record_entropies:
                row.entropies.append(entropy)


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
