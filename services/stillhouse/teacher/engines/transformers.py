"""Scoring with Hugging Face transformers: one forward of the base model, the head on completion rows only; CPU or GPU.

Axes: B batch, L tokens (padded), T completion tokens, D model, V vocab, K top-k.
Padding is on the right and needs no mask: in a causal model it cannot reach the rows that count.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from stillhouse.core.errors import ConflictError, WeightsError
from stillhouse.core.models import ModelEntry
from stillhouse.core.tensors import dtype_name
from stillhouse.teacher.engines.base import Head, Scored, ScoreItem, Unscored
from stillhouse.teacher.engines.items import problem
from stillhouse.v1 import rollout_pb2 as pb

DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LOGITS_BYTES: Final = 64 << 20
"""Logits computed at once: [rows, 152k] in float32 are 0.6 MB a row, so a long completion is taken in pieces."""
PROBE_TOKENS: Final = 8
"""Tokens of the check at load that our head does what the model's own does."""


class TransformersEngine:
    """`Engine` on `AutoModelForCausalLM`: frozen, in eval mode."""

    def __init__(self, entry: ModelEntry, dtype: str, *, threads: int = 0, device: str = "") -> None:
        if threads:
            torch.set_num_threads(threads)
        logging.disable_progress_bar()  # a service's log is read by machines
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._dtype = dtype
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            entry.path, dtype=DTYPES[dtype], local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
        self._model.to(self._device).eval().requires_grad_(False)
        self._head: Any = self._model.get_output_embeddings()
        config = self._model.config
        self._scale, self._soft_cap = _logit_scale(config), float(getattr(config, "final_logit_softcapping", 0) or 0)
        self.vocab_size = min(entry.tokenizer_size, self._head.weight.shape[0])
        self.max_sequence_length = entry.max_sequence_length
        self.size_bytes = sum(tensor.nbytes for tensor in self._model.parameters())
        self._cast_head()
        self._check_head(entry)

    def _cast_head(self) -> None:
        """Log-probabilities come from float32 logits: bfloat16 ones are off by up to 0.06 nats."""
        self._weight_VD = self._head.weight[: self.vocab_size].float()
        bias = getattr(self._head, "bias", None)
        self._bias_V = None if bias is None else bias[: self.vocab_size].float()

    @torch.inference_mode()
    def _check_head(self, entry: ModelEntry) -> None:
        """Refuse a model whose logits are not what `HeadInfo` can say: the trainer re-applies the head by it."""
        ids = torch.arange(PROBE_TOKENS, device=self._device)[None] % self.vocab_size
        expected = self._model(input_ids=ids, use_cache=False).logits[0, :, : self.vocab_size].float()
        actual = self._logits(self._model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0])
        if not bool(torch.isfinite(expected).all()):
            raise ConflictError(
                f"model '{entry.name}' gives NaN or infinity: its weights are damaged, or too large for {self._dtype}; "
                "download it again, or give the teacher another dtype"
            )
        error, size = float((actual - expected).abs().max()), float(expected.abs().max())
        # bfloat16 keeps 8 bits: the model's own logits are rounded by up to 1/256 of their size
        if not error <= (1e-3 if self._dtype == "float32" else 2e-2) * max(size, 1.0):
            raise ConflictError(
                f"model '{entry.name}' ({entry.architecture}) computes logits in a way that is not supported: "
                f"hidden @ head differs from its own logits by {error:.3g}"
            )

    @torch.inference_mode()
    def score(self, items: Sequence[ScoreItem]) -> list[Scored | Unscored]:
        results: dict[int, Scored | Unscored] = {}
        for number, item in enumerate(items):
            found = problem(item, self)
            if found is not None:
                results[number] = found
        good = [number for number in range(len(items)) if number not in results]
        if good:
            hidden_BLD = self._hidden([items[number] for number in good])
            alike: dict[Any, list[int]] = {}
            for row, number in enumerate(good):
                alike.setdefault(_asks(items[number]), []).append(row)
            for rows in alike.values():
                chosen = [items[good[row]] for row in rows]
                # the state at position i predicts token i + 1
                starts = [len(item.prompt_ids) - 1 for item in chosen]
                parts = [
                    hidden_BLD[row, start : start + len(item.completion_ids)]
                    for row, start, item in zip(rows, starts, chosen, strict=True)
                ]
                judged = self._judge(chosen, torch.cat(parts))
                results |= {good[row]: result for row, result in zip(rows, judged, strict=True)}
        return [results[number] for number in range(len(items))]

    def _hidden(self, items: Sequence[ScoreItem]) -> Tensor:
        """[B, L, D] last hidden states after the final norm."""
        ids = torch.zeros(len(items), max(item.length for item in items), dtype=torch.long)
        for row, item in enumerate(items):
            ids[row, : item.length] = torch.tensor([*item.prompt_ids, *item.completion_ids])
        return self._model.base_model(input_ids=ids.to(self._device), use_cache=False).last_hidden_state

    def _judge(self, items: Sequence[ScoreItem], hidden_ND: Tensor) -> list[Scored | Unscored]:
        """The scores of items that ask the same, from the states of all of their tokens in a row: N = sum of T."""
        columns = {name: array.cpu().numpy() for name, array in self._logprobs(items, hidden_ND).items()}
        sizes_N = hidden_ND.abs().amax(dim=-1).float().cpu().numpy()  # NaN where a state has one
        if items[0].kind == pb.SCORE_KIND_HIDDEN:
            columns["hidden"] = hidden_ND.to(torch.float16 if items[0].half else torch.float32).cpu().numpy()
        results, start = [], 0
        for item in items:
            rows = slice(start, start + len(item.completion_ids))
            start = rows.stop
            # copies: a score that is kept must not keep those of the whole batch
            mine = {name: array[rows].copy() for name, array in columns.items()}
            results.append(_verdict(item, mine, float(sizes_N[rows].max())))
        return results

    def _logprobs(self, items: Sequence[ScoreItem], hidden_ND: Tensor) -> dict[str, Tensor]:
        """Fields of `Scored` that rest on log-probabilities, in pieces along N: one product of states and head for the
        short completions of a batch together, since each product reads the whole head.
        """
        item = items[0]
        size = max(1, LOGITS_BYTES // (4 * self.vocab_size))
        ids_N = torch.tensor([token for item in items for token in item.completion_ids], device=self._device)
        targets_NK = None
        if item.target_ids is not None and item.kind in (pb.SCORE_KIND_TARGETS, pb.SCORE_KIND_TOPK):
            named = np.concatenate([item.target_ids for item in items if item.target_ids is not None])
            targets_NK = torch.from_numpy(named.astype(np.int64)).to(self._device)
        parts = []
        for start in range(0, len(ids_N), size):
            rows = slice(start, start + size)
            logits_NV = self._logits(hidden_ND[rows])
            if item.temperature not in (0.0, 1.0):
                logits_NV /= item.temperature
            logprobs_NV = torch.log_softmax(logits_NV, dim=-1)
            part = {"teacher_logprobs": logprobs_NV.gather(1, ids_N[rows, None])[:, 0]}
            if item.kind == pb.SCORE_KIND_TOPK:
                part |= _topk(logprobs_NV, item)
            if targets_NK is not None:
                part["target_logprobs"] = logprobs_NV.gather(1, targets_NK[rows])
            parts.append(part)
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _logits(self, hidden_TD: Tensor) -> Tensor:
        """[T, V] float32 logits over the tokenizer's vocabulary."""
        logits = torch.nn.functional.linear(hidden_TD.float(), self._weight_VD, self._bias_V)
        if self._scale != 1.0:
            logits *= self._scale
        return self._soft_cap * torch.tanh(logits / self._soft_cap) if self._soft_cap else logits

    @torch.no_grad()
    def load_weights(self, arrays: Mapping[str, np.ndarray[Any, Any]], dtypes: Mapping[str, int]) -> None:
        targets: dict[str, Tensor] = self._model.state_dict()
        # tied tensors are one memory under several names and come once
        covered = {targets[name].data_ptr() for name in arrays.keys() & targets.keys()}
        missing = [name for name, target in targets.items() if target.data_ptr() not in covered]
        if missing or arrays.keys() - targets.keys():
            odd = missing or sorted(arrays.keys() - targets.keys())
            raise WeightsError(
                f"{len(arrays)} tensors came and the teacher has {len(targets)}; {odd[0]} is only on one side"
            )
        for name, array in arrays.items():
            source = _as_torch(array, dtypes[name])
            if source.shape != targets[name].shape or not bool(torch.isfinite(source).all()):
                raise WeightsError(
                    f"{name}: {list(source.shape)} came, the teacher has {list(targets[name].shape)}, and all numbers "
                    "must be finite"
                )
            targets[name].copy_(source)
        self._cast_head()
        self.__dict__.pop("_described_head", None)

    def close(self) -> None:
        del self._model, self._head, self._weight_VD, self._bias_V
        gc.collect()  # modules and their hooks hang in reference cycles
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def head(self) -> Head:
        return self._described_head

    @cached_property
    def _described_head(self) -> Head:
        weight, bias = self._head.weight, getattr(self._head, "bias", None)
        parts = [_raw_bytes(tensor) for tensor in (weight, bias) if tensor is not None]
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part)
        return Head(
            sha256=digest.hexdigest(),
            dtype=self._dtype,
            shape=(weight.shape[0], weight.shape[1]),
            has_bias=bias is not None,
            vocab_size=self.vocab_size,
            logit_scale=self._scale,
            logit_soft_cap=self._soft_cap,
            parts=parts,
        )


def _asks(item: ScoreItem) -> tuple[Any, ...]:
    """What items must have in common to be judged together."""
    num_targets = -1 if item.target_ids is None else item.target_ids.shape[1]
    return (item.kind, item.temperature, item.top_k, item.half, num_targets)


def _verdict(item: ScoreItem, columns: dict[str, np.ndarray[Any, Any]], size: float) -> Scored | Unscored:
    """The score, unless the numbers are of no use; `size` = largest hidden state."""
    # -inf is an answer: a token that the teacher forbids outright
    if not np.isfinite(size) or not bool((columns["teacher_logprobs"] < np.inf).all()):
        return Unscored(item.key, "non_finite", "NaN or infinity in the teacher's output")
    if item.kind == pb.SCORE_KIND_HIDDEN and item.half and not bool(np.isfinite(columns["hidden"]).all()):
        return Unscored(item.key, "fp16_overflow", f"hidden state of size {size:.4g}; float16 ends at 65504")
    return Scored(item.key, **columns)


def _topk(logprobs_TV: Tensor, item: ScoreItem) -> dict[str, Tensor]:
    values, ids = logprobs_TV.topk(item.top_k)
    # summing what is outside is exact; 1 - sum(inside) cancels to nothing when the head of the distribution is heavy
    tail = logprobs_TV.scatter(1, ids, -torch.inf).logsumexp(-1)
    return {
        "topk_ids": ids.int(),
        "topk_logprobs": values.half() if item.half else values,
        "tail_logprobs": tail,
    }


def _logit_scale(config: Any) -> float:
    """Factor on the logits: Cohere multiplies by `logit_scale`, Granite divides by `logits_scaling`."""
    if getattr(config, "logits_scaling", None):
        return 1.0 / float(config.logits_scaling)
    return float(getattr(config, "logit_scale", None) or 1.0)


def _as_torch(array: np.ndarray[Any, Any], dtype: int) -> Tensor:
    if not array.flags.writeable:  # torch cannot express read-only memory
        array = array.copy()
    if dtype_name(dtype) == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _raw_bytes(tensor: Tensor) -> memoryview:
    array: Any = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
    return memoryview(array).cast("B")
