"""Writing with Hugging Face transformers: one prefill, then batched decoding on a KV cache; CPU or GPU.

Axes: B batch, P prompt (padded), V vocab. No continuous batching: a batch is as old as its longest completion, but rows
that ended are dropped and cost nothing. Batches take turns on the compute thread, some tokens each.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils import logging

from stillhouse.core.errors import WeightsError
from stillhouse.core.models import ModelEntry
from stillhouse.core.pulse import BULK
from stillhouse.core.tensors import dtype_name
from stillhouse.core.worker import ComputeThread
from stillhouse.sampler.engines.base import Piece, SampleRequest, failed
from stillhouse.sampler.engines.draw import draw, entropies, log_probs, uniforms

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


SLICE_S: Final = 0.02
"""So long a batch holds the compute thread: others, weights and callers wait no longer than this and one token."""
ENGINE_ERRORS: Final = (RuntimeError, ValueError, IndexError, MemoryError, ArithmeticError)
"""What a model raises about its input or its memory; anything else is a bug and ends the process."""


@dataclass(slots=True, eq=False)
class _Row:
    """A completion being written."""

    request: SampleRequest
    uniforms: np.ndarray
    """[max_tokens]"""
    num_tokens: int
    """Of the completion so far."""
    logprob: float = 0.0
    """Of the last one."""
    target_ids: np.ndarray | None = None
    """[1, K] int32 at the last one, if asked for, like `entropies`."""
    entropies: np.ndarray | None = None
    sample_s: float = 0.0
    """Since the last piece."""

    def piece(self, token: int, tag: int) -> Piece:
        """The last token."""
        sample_s, self.sample_s = self.sample_s, 0.0
        return Piece(
            self.request.key,
            [token],
            [self.logprob],
            tag,
            target_ids=self.target_ids,
            entropies=self.entropies,
            sample_s=sample_s,
        )


class TransformersEngine:
    """`Engine` on `AutoModelForCausalLM`."""

    name = "transformers"

    def __init__(
        self,
        entry: ModelEntry,
        dtype: str,
        compute: ComputeThread,
        *,
        max_sequences: int = 32,
        threads: int = 0,
        device: str = "",
    ) -> None:
        if threads:
            torch.set_num_threads(threads)
        logging.disable_progress_bar()  # a service's log is read by machines
        self._compute = compute
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            entry.path, dtype=DTYPES[dtype], local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
        self._model.to(self._device).eval().requires_grad_(False)
        head_rows = self._model.get_output_embeddings().weight.shape[0]
        # rows of the head beyond the tokenizer are padding: a token nobody can read must not be written
        self.vocab_size = min(entry.tokenizer_size, head_rows)
        self.max_sequence_length = entry.max_sequence_length
        self.max_sequences = max_sequences
        self._end_ids = _end_of_sequence_ids(self._model)
        self._tag = 0
        self._open: set[str] = set()
        self._aborted: set[str] = set()
        self._is_closed = False
        self._goes_on = asyncio.Event()
        self._goes_on.set()
        self._room = asyncio.Condition()
        self._num_calls = 0
        self._is_alone = False

    # -- from the event loop -----------------------------------------------------------------------------------------

    async def generate(self, requests: Sequence[SampleRequest], *, alone: bool = False) -> AsyncGenerator[Piece, None]:
        self._open |= {request.key for request in requests}
        try:
            await self._enter(alone)
            try:
                for start in range(0, len(requests), self.max_sequences):
                    async for piece in self._batch(requests[start : start + self.max_sequences]):
                        yield piece
            finally:
                await self._leave()
        finally:
            self._open -= {request.key for request in requests}
            self._aborted -= {request.key for request in requests}

    async def _enter(self, alone: bool) -> None:
        async with self._room:
            await self._room.wait_for(lambda: not self._is_alone and not (alone and self._num_calls))
            self._num_calls += 1
            self._is_alone = alone

    async def _leave(self) -> None:
        async with self._room:
            self._num_calls -= 1
            self._is_alone = False
            self._room.notify_all()

    async def _batch(self, requests: Sequence[SampleRequest]) -> AsyncGenerator[Piece, None]:
        """If the model raises, the requests that are left go on one by one: one must not take others along."""
        left = {request.key: request for request in requests}
        steps = self._steps(list(requests))
        try:
            while left:
                await self._goes_on.wait()
                for piece in await self._compute.run(self._slice, steps):
                    request = left.pop(piece.key)
                    if not piece.finish_reason:
                        left[piece.key] = replace(request, written=(*request.written, *piece.ids))
                    yield piece
        except ENGINE_ERRORS as error:
            if len(requests) == 1:
                yield failed(requests[0], "engine_error", f"{type(error).__name__}: {error}")
                return
            for request in list(left.values()):
                async for piece in self._batch([request]):
                    yield piece

    def abort(self, keys: Iterable[str]) -> int:
        found = self._open & set(keys)
        self._aborted |= found
        return len(found)

    async def pause(self) -> None:
        self._goes_on.clear()
        await self._compute.run(lambda: None)  # behind the tokens that are being written

    async def resume(self) -> None:
        self._goes_on.set()

    async def load_weights(
        self, arrays: Mapping[str, np.ndarray[Any, Any]], dtypes: Mapping[str, int], tag: int
    ) -> None:
        await self._compute.run(self._load_weights, arrays, dtypes, tag, patience=BULK)

    async def close(self) -> None:
        self._aborted |= self._open
        self._goes_on.set()

    # -- on the compute thread ---------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _slice(self, steps: Iterator[list[Piece]]) -> list[Piece]:
        """The next tokens, for about SLICE_S."""
        until = time.perf_counter() + SLICE_S
        pieces: list[Piece] = []
        for step in steps:
            pieces += step
            self._compute.pulse.beat()
            if time.perf_counter() > until:
                break
        return pieces

    def _steps(self, requests: Sequence[SampleRequest]) -> Iterator[list[Piece]]:
        """A token of every completion at a time."""
        problems = {request.key: self._problem(request) for request in requests}
        yield [problem for problem in problems.values() if problem is not None]
        rows = []
        for request in requests:
            if problems[request.key] is None:
                max_tokens = min(request.max_tokens, self.max_sequence_length - len(request.prompt_ids))
                rows.append(_Row(request, uniforms(request.seed, max_tokens), len(request.written)))
        if rows:
            yield from self._decode(rows)

    def _problem(self, request: SampleRequest) -> Piece | None:
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

    def _decode(self, rows: list[_Row]) -> Iterator[list[Piece]]:
        started = time.perf_counter()
        logits_BV, cache, mask_BL, position_B = self._prefill(rows)
        while True:
            ids_B = self._sample(rows, logits_BV)
            elapsed = time.perf_counter() - started
            for row in rows:
                row.sample_s += elapsed / len(rows)
            pieces = [self._piece(row, token) for row, token in zip(rows, ids_B.tolist(), strict=True)]
            yield pieces
            keep = [number for number, piece in enumerate(pieces) if not piece.finish_reason]
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
        prompts = list(dict.fromkeys(_context(row) for row in rows))
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
        index = torch.tensor([where[_context(row)] for row in rows], device=self._device)
        if len(prompts) < len(rows):
            cache.batch_select_indices(index)
        return output.logits[index, -1], cache, mask[index], positions[index, -1] + 1

    def _sample(self, rows: list[_Row], logits_BV: Tensor) -> Tensor:
        """[B] next token of each row, appended to it."""
        uniforms_B = [float(row.uniforms[row.num_tokens]) for row in rows]
        logits = logits_BV[:, : self.vocab_size].float().cpu()
        requests = [row.request for row in rows]
        logprobs_BV = log_probs(logits, requests)
        ids_B = draw(logprobs_BV, requests, uniforms_B)
        for row, logprob in zip(rows, logprobs_BV.gather(1, ids_B[:, None])[:, 0].tolist(), strict=True):
            row.num_tokens += 1
            row.logprob = logprob
        _record(rows, logprobs_BV)
        return ids_B.to(self._device)

    def _piece(self, row: _Row, token: int) -> Piece:
        """The last token of a row, and whether it is the last one."""
        if not np.isfinite(row.logprob):
            message = f"log-probability {row.logprob} at token {row.num_tokens - 1}: the weights are broken"
            return failed(row.request, "non_finite", message)
        piece = row.piece(token, self._tag)
        if token in self._end_ids or token in row.request.stop_token_ids:
            return replace(piece, finish_reason="stop")
        if row.num_tokens >= len(row.uniforms):
            return replace(piece, finish_reason="length")
        return replace(piece, finish_reason="abort") if row.request.key in self._aborted else piece

    @torch.inference_mode()
    def _load_weights(self, arrays: Mapping[str, np.ndarray[Any, Any]], dtypes: Mapping[str, int], tag: int) -> None:
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
        self._tag = tag


def _context(row: _Row) -> tuple[int, ...]:
    """What is read before the first token that is drawn."""
    return (*row.request.prompt_ids, *row.request.written)


def _record(rows: Sequence[_Row], logprobs_BV: Tensor) -> None:
    """Add to each row what its request wants to know of the distribution that its last token was drawn from."""
    most = max(row.request.record_top_k for row in rows)
    if most:
        ids_BK = logprobs_BV.topk(most).indices.int().numpy()
        for row, ids_K in zip(rows, ids_BK, strict=True):
            if row.request.record_top_k:
                row.target_ids = ids_K[None, : row.request.record_top_k].copy()
    if any(row.request.record_entropies for row in rows):
        for row, entropy in zip(rows, entropies(logprobs_BV).tolist(), strict=True):
            if row.request.record_entropies:
                row.entropies = np.array([entropy], dtype=np.float32)


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
