"""Writing with vLLM: its engine runs in a process of its own, steered through `AsyncLLM`; token ids in and out.

vLLM schedules, batches, caches and computes logits. Drawing and weight updates are ours and run in its workers
(vllm_worker.py). Meant for GPUs; really run on CPUs only (docs/engines.md).
"""

# pyright: reportMissingImports=false
# make check works without vLLM
from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, Final

import numpy as np
from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest
from vllm.inputs import tokens_input
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.exceptions import EngineDeadError as VllmDeadError

from stillhouse.core.config import Settings
from stillhouse.core.errors import EngineDeadError
from stillhouse.core.models import ModelEntry
from stillhouse.core.pulse import BULK, Pulse
from stillhouse.core.tasks import cancel_all, to_its_end
from stillhouse.core.worker import unless
from stillhouse.sampler.engines.base import Piece, SampleRequest, failed
from stillhouse.sampler.engines.vllm_rows import Clock, Row, end_ids
from stillhouse.sampler.engines.vllm_start import EngineProcess
from stillhouse.sampler.engines.vllm_weights import check, memory_file, shapes_in
from stillhouse.sampler.engines.vllm_wire import OURS, hash_file

LOOK_S: Final = 1.0
"""How often an engine that has nothing to do is looked at: has it died?"""
ALONE: Final = "a deterministic batch needs STILLHOUSE_ENGINE=transformers: vLLM decides itself what it batches"

OnDeath = Callable[[EngineDeadError], None]


class VllmEngine:
    """`Engine` on vLLM."""

    name = "vllm"

    def __init__(
        self, process: EngineProcess, entry: ModelEntry, settings: Settings, pulse: Pulse, on_death: OnDeath
    ) -> None:
        self._process = process
        self._llm = process.llm
        self._pulse = pulse
        folder = Path(entry.path)
        self._end_ids = end_ids(folder)
        self._shapes = shapes_in(folder)
        self._is_tied = bool(getattr(self._llm.model_config.hf_config, "tie_word_embeddings", False))
        self._numbers = itertools.count()
        self._rows: dict[str, Row] = {}
        """Running completions by key."""
        self._clock = Clock()
        self._aborts: set[asyncio.Task[None]] = set()
        self._loads = 0
        """Sets of weights so far."""
        self._entering = asyncio.Lock()
        """Held while a completion enters, or weights do: it is clear which weights read its prompt."""
        self._closed = asyncio.Event()
        """Set when nobody will answer any more."""
        self._on_death = on_death
        self._watch = asyncio.create_task(self._look(), name="watch engine")
        self.vocab_size = entry.num_usable_ids
        self.max_sequence_length = self._llm.model_config.max_model_len
        self.max_sequences = settings.sampler_max_sequences

    async def generate(self, requests: Sequence[SampleRequest], *, alone: bool = False) -> AsyncGenerator[Piece, None]:
        pieces: asyncio.Queue[Piece | EngineDeadError] = asyncio.Queue()
        writers = []
        for request in requests:
            if end := failed(request, "bad_request", ALONE) if alone else self._end_at_once(request):
                pieces.put_nowait(end)
            else:
                writers.append(asyncio.create_task(self._write(request, pieces)))
        try:
            left = len(requests)
            while left:
                piece = await pieces.get()
                if isinstance(piece, EngineDeadError):
                    raise piece
                left -= bool(piece.finish_reason)
                yield piece
        finally:
            await cancel_all(writers)

    def _end_at_once(self, request: SampleRequest) -> Piece | None:
        """The end of what needs no token, or cannot get one."""
        length = len(request.prompt_ids)
        if length == 0 or request.max_tokens < 1:
            return failed(request, "empty", f"prompt of {length} tokens, at most {request.max_tokens} to write")
        if length >= self.max_sequence_length:
            limit = f"{self.max_sequence_length}, completion included (vllm_max_length, or the model's own limit)"
            return failed(request, "too_long", f"prompt of {length} tokens; vLLM reads {limit}")
        if not all(0 <= token < self.vocab_size for token in (*request.prompt_ids, *request.written)):
            worst = max(*request.prompt_ids, *request.written, key=abs)
            return failed(request, "bad_ids", f"token id {worst}; the student knows {self.vocab_size} ids")
        if request.record_top_k > self.vocab_size:
            wanted, size = request.record_top_k, self.vocab_size
            return failed(request, "bad_request", f"the {wanted} likeliest tokens of a vocabulary of {size}; lower k")
        if request.written and request.written[-1] in self._ends(request):
            return Piece(request.key, [], [], finish_reason="stop")
        if len(request.written) >= self._longest(request):
            return Piece(request.key, [], [], finish_reason="length")
        return None

    def _longest(self, request: SampleRequest) -> int:
        """Tokens that the completion may have, those that are written included."""
        return min(request.max_tokens, self.max_sequence_length - len(request.prompt_ids))

    def _ends(self, request: SampleRequest) -> frozenset[int]:
        return self._end_ids | set(request.stop_token_ids)

    async def _write(self, request: SampleRequest, pieces: asyncio.Queue[Piece | EngineDeadError]) -> None:
        """One completion, piece by piece; vLLM batches them."""
        row = self._rows[request.key] = Row(request, f"{request.key} #{next(self._numbers)}", self._clock)
        try:
            with self._pulse.work(), self._clock.running():
                async with aclosing(self._outputs(row)) as outputs:
                    async for output in outputs:
                        self._pulse.beat()
                        for piece in row.take(output):
                            pieces.put_nowait(piece)
                            if piece.finish_reason:
                                return
        except VllmDeadError:
            pieces.put_nowait(self._dead())
        except Exception as error:  # whatever it is: who reads the pieces waits for an end
            pieces.put_nowait(failed(request, "engine_error", f"{type(error).__name__}: {error}"))
        finally:
            if self._rows.get(request.key) is row:
                del self._rows[request.key]

    async def _outputs(self, row: Row) -> AsyncGenerator[Any, None]:
        """What vLLM reports of it: all tokens so far, each time."""
        has_ended = False
        try:
            reports = await self._enter(row)
            while not has_ended:
                output = await reports.get()
                if row.is_turned_away and not row.is_aborted:
                    reports = await self._enter(row)
                    continue
                has_ended = output.finished
                yield output
        finally:
            if not has_ended and not self._llm.errored:
                await self._llm.abort(row.name)

    async def _enter(self, row: Row) -> Any:
        request = row.request
        async with self._entering:
            # what older weights left in the prefix cache is not found under another salt
            prompt = tokens_input([*request.prompt_ids, *request.written], cache_salt=str(self._loads))
            reports = await self._llm.add_request(row.name, prompt, self._parameters(request))
            row.is_inside, row.is_turned_away = True, False
        return reports

    async def _turn_away(self) -> None:
        """Have completions without a token enter again, behind the weights that are about to come.

        They may wait inside vLLM still: the new weights would read their prompts, under the salt of the old ones.
        """
        rows = [row for row in self._rows.values() if row.is_inside and not row.num_seen]
        for row in rows:
            row.is_inside, row.is_turned_away = False, True
        await self._llm.abort([row.name for row in rows])

    def _parameters(self, request: SampleRequest) -> SamplingParams:
        """vLLM counts and stops; everything about the draw goes to our own sampler in `extra_args`."""
        longest = self._longest(request)
        return SamplingParams(
            max_tokens=longest - len(request.written),
            temperature=1.0,
            stop_token_ids=sorted(self._ends(request)),
            ignore_eos=True,  # they stand in stop_token_ids
            logprobs=request.record_top_k,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.CUMULATIVE,  # vLLM would merge pieces that nobody has fetched yet
            extra_args={
                OURS: {
                    "max_tokens": longest,
                    "seed": request.seed,
                    "temperature": request.temperature,
                    "top_p": request.top_p,
                    "top_k": request.top_k,
                    "min_p": request.min_p,
                    "record_top_k": request.record_top_k,
                    "record_entropies": request.record_entropies,
                    "written": list(request.written),
                }
            },
        )

    def abort(self, keys: Iterable[str]) -> int:
        rows = [self._rows[key] for key in keys if key in self._rows]
        for row in rows:
            row.is_aborted = True  # if vLLM does not know it yet, it ends after its first token
        if rows:
            task = asyncio.create_task(self._abort([row.name for row in rows]))
            self._aborts.add(task)
            task.add_done_callback(self._aborts.discard)
        return len(rows)

    async def _abort(self, names: list[str]) -> None:
        try:
            await self._llm.abort(names)
        except VllmDeadError:
            return  # its writers say so

    async def _call(self, work: Coroutine[Any, Any, None], patience: int = 1) -> None:
        """Asks something of the engine's process: it may not hang, and has our name for its death.

        A caller that is cancelled waits for the answer: nothing is left half done in there. If the engine is closed, as
        one that hangs is when its process ends, there will be none.
        """
        try:
            with self._pulse.work(patience):
                is_answered = await to_its_end(unless(self._closed, work))
        except VllmDeadError as error:
            raise self._dead() from error
        if not is_answered:
            raise self._dead()

    async def pause(self) -> None:
        await self._call(self._llm.pause_generation(mode="keep", clear_cache=False))

    async def resume(self) -> None:
        await self._call(self._llm.resume_generation())

    async def load_weights(
        self, arrays: Mapping[str, np.ndarray[Any, Any]], dtypes: Mapping[str, int], tag: int
    ) -> None:
        await asyncio.to_thread(check, arrays, dtypes, self._shapes, is_tied=self._is_tied)
        async with self._entering:
            await self._call(self._load(arrays, dtypes, tag), BULK)

    async def _load(self, arrays: Mapping[str, np.ndarray[Any, Any]], dtypes: Mapping[str, int], tag: int) -> None:
        descriptor = await asyncio.to_thread(memory_file, arrays, dtypes)
        path = f"/proc/{os.getpid()}/fd/{descriptor}"
        try:
            info = {"path": path, "xxh3_128": await asyncio.to_thread(hash_file, path), "tag": tag}
            await self._turn_away()
            await self._llm.start_weight_update()
            await self._llm.update_weights(WeightTransferUpdateRequest(update_info=info))
            await self._llm.finish_weight_update(str(tag))
            self._loads += 1
        except Exception as error:
            # the weights were checked: whatever this is, the model in there may not be whole any more
            dead = EngineDeadError(f"engine_died: vLLM did not take new weights: {error}")
            self._on_death(dead)  # also if who asked for it was cancelled, and drops the error
            raise dead from error
        finally:
            os.close(descriptor)

    async def _look(self) -> None:
        while not self._llm.errored:  # noqa: ASYNC110 - vLLM sets a flag, in a thread
            await asyncio.sleep(LOOK_S)
        self._on_death(self._dead())

    def _dead(self) -> EngineDeadError:
        how = self._process.ending()
        return EngineDeadError(f"engine_died: vLLM's engine process {how}; this process ends, to be started again")

    async def close(self) -> None:
        self._closed.set()
        await cancel_all([self._watch])
        await self._abort([row.name for row in self._rows.values()])
        with self._pulse.work(BULK):
            await self._process.close()


async def load(
    entry: ModelEntry, dtype: str, settings: Settings, pulse: Pulse, on_death: OnDeath = lambda _: None
) -> VllmEngine:
    """An engine with the model's registered weights; `on_death` hears of it if its process dies.

    Raises:
        EngineStartError: vLLM does not take the model, or has no room for it.
    """
    with pulse.work(BULK):
        return VllmEngine(await EngineProcess.start(entry, dtype, settings), entry, settings, pulse, on_death)
