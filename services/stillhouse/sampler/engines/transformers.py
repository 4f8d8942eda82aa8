"""Writing with Hugging Face transformers and continuous batching; CPU or GPU.

From the event loop to the compute thread and back. The thread runs the decoder for about SLICE_S at a time, so that
other engines, weights and callers take turns with it, and so that nothing but the thread ever touches the model.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any, Final

import numpy as np
import torch

from stillhouse.core.errors import EngineDeadError
from stillhouse.core.models import ModelEntry
from stillhouse.core.pulse import BULK
from stillhouse.core.worker import ComputeThread
from stillhouse.sampler.engines.base import Piece, SampleRequest
from stillhouse.sampler.engines.decode import Decoder
from stillhouse.sampler.engines.model import Model
from stillhouse.sampler.engines.rows import Call

SLICE_S: Final = 0.02
"""So long the decoder holds the compute thread, or for one token where that takes longer."""


class TransformersEngine:
    """`Engine` on `AutoModelForCausalLM`. Made on the compute thread, used from the event loop."""

    name = "transformers"

    def __init__(
        self,
        entry: ModelEntry,
        dtype: str,
        compute: ComputeThread,
        *,
        max_sequences: int = 32,
        cache_gib: float = 4.0,
        threads: int = 0,
        device: str = "",
    ) -> None:
        if threads:
            torch.set_num_threads(threads)
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        model = Model(entry, dtype, place, max_sequences, cache_gib)
        self.vocab_size, self.max_sequence_length = model.vocab_size, model.max_sequence_length
        self.max_sequences = max_sequences
        self._compute = compute
        self._decoder = Decoder(model, max_sequences, compute.pulse.beat)
        self._listeners: list[_Listener] = []
        self._arrivals: list[Call] = []
        """Calls that the decoder has not seen."""
        self._door = asyncio.Lock()
        """Calls come in through it, in order; one that has to be alone stands in it until it ends."""
        self._one_left = asyncio.Event()
        self._goes_on = asyncio.Event()
        """Not paused."""
        self._goes_on.set()
        self._driver: asyncio.Task[None] | None = None
        self._is_closed = False

    @property
    def prefilled_tokens(self) -> int:
        """Prompt tokens read by forward passes so far; what samples share counts once."""
        return self._decoder.prefilled_tokens

    async def generate(self, requests: Sequence[SampleRequest], *, alone: bool = False) -> AsyncGenerator[Piece, None]:
        async with AsyncExitStack() as at_the_door:
            await at_the_door.enter_async_context(self._door)
            if alone:
                await self._empty()
            else:
                await at_the_door.aclose()
            listener = self._open(Call(list(requests), alone))
            try:
                while listener.left:
                    for piece in await listener.receive():
                        yield piece
            finally:
                self._leave(listener)

    async def _empty(self) -> None:
        while self._listeners:
            self._one_left.clear()
            await self._one_left.wait()

    def _open(self, call: Call) -> _Listener:
        if self._is_closed:
            raise EngineDeadError("the engine was closed")
        listener = _Listener(call)
        self._listeners.append(listener)
        self._arrivals.append(call)
        if self._driver is None or self._driver.done():
            self._driver = asyncio.create_task(self._drive(), name="drive engine")
            self._driver.add_done_callback(self._report)
        return listener

    def _leave(self, listener: _Listener) -> None:
        listener.close()
        self._listeners.remove(listener)
        self._one_left.set()

    async def _drive(self) -> None:
        """Run the decoder until it has nothing to do."""
        while not self._is_closed and (self._arrivals or self._decoder.is_busy):
            await self._goes_on.wait()
            arrivals, self._arrivals = self._arrivals, []
            alone = [listener for listener in self._listeners if listener.call.is_alone]
            await self._compute.run(self._decoder.run, arrivals, 0.0 if alone else SLICE_S)
            self._deliver()
            for listener in alone:  # in step with its reader: what is aborted, and when, must not depend on the clock
                if not self._is_closed:
                    await listener.is_read.wait()

    def _deliver(self) -> None:
        for listener in self._listeners:
            listener.deliver()

    def _report(self, driver: asyncio.Task[None]) -> None:
        """Give an error of the driver, which is a bug, to those that wait for pieces."""
        error = None if driver.cancelled() else driver.exception()
        if error is not None:
            for listener in self._listeners:
                listener.fail(error)

    def abort(self, keys: Iterable[str]) -> int:
        wanted = set(keys)
        return sum(listener.abort(wanted) for listener in self._listeners)

    async def pause(self) -> None:
        self._goes_on.clear()
        await self._compute.run(lambda: None)  # behind the tokens that are being written

    async def resume(self) -> None:
        self._goes_on.set()

    async def load_weights(
        self, arrays: Mapping[str, np.ndarray[Any, Any]], dtypes: Mapping[str, int], tag: int
    ) -> None:
        await self._compute.run(self._decoder.load_weights, arrays, dtypes, tag, patience=BULK)

    async def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self._goes_on.set()
        for listener in self._listeners:
            listener.is_read.set()
        if self._driver is not None:
            await asyncio.wait([self._driver])
        await self._compute.run(self._decoder.close, self._arrivals)
        self._deliver()
        del self._decoder


class _Listener:
    """One who reads the pieces of a call."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.left = {request.key for request in call.requests}
        """Keys whose end has not been read."""
        self.is_read = asyncio.Event()
        """What arrived was dealt with."""
        self._arrived = asyncio.Event()
        self._pieces: list[Piece] = []
        self._error: BaseException | None = None

    async def receive(self) -> list[Piece]:
        """What has arrived since last time; waits for something."""
        if not self._pieces:
            self.is_read.set()
        await self._arrived.wait()
        self._arrived.clear()
        if self._error is not None:
            raise self._error
        pieces, self._pieces = self._pieces, []
        self.left -= {piece.key for piece in pieces if piece.finish_reason}
        return pieces

    def deliver(self) -> None:
        """Hand over what the decoder wrote; it must not be running."""
        pieces, self.call.pieces = self.call.pieces, []
        if pieces:
            self._pieces += pieces
            self.is_read.clear()
            self._arrived.set()

    def fail(self, error: BaseException) -> None:
        self._error = error
        self._arrived.set()

    def abort(self, keys: set[str]) -> int:
        found = self.left & keys
        self.call.aborted |= found
        return len(found)

    def close(self) -> None:
        self.call.is_closed = True
        self.is_read.set()
