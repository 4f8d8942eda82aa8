"""From the compute thread to the event loop: completions as they end, and the switches that end them early."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence

from stillhouse.core.failpoints import failpoint
from stillhouse.core.telemetry import SAMPLED_TOKENS
from stillhouse.core.worker import ComputeThread
from stillhouse.sampler.engines.base import Completion, Engine, SampleRequest, failed

ENGINE_ERRORS = (RuntimeError, ValueError, IndexError, MemoryError, ArithmeticError)
"""What an engine raises about its input or its memory; anything else is a bug and ends the process."""


class Generator:
    """Runs engines on the one compute thread. Batches of the worker and of callers take turns."""

    def __init__(self, compute: ComputeThread) -> None:
        self._compute = compute
        self._running: set[str] = set()
        self._aborted: set[str] = set()
        self.sampled_tokens = 0

    @property
    def is_busy(self) -> bool:
        """A completion is being written, or waits for its turn."""
        return bool(self._running)

    def abort(self, keys: Iterable[str] = ()) -> int:
        """End running completions after their next token (none named = all); returns how many."""
        wanted = set(keys)
        found = self._running & wanted if wanted else set(self._running)
        self._aborted |= found
        return len(found)

    async def generate(
        self, engine: Engine, requests: Sequence[SampleRequest], is_halted: Callable[[], bool] = lambda: False
    ) -> AsyncGenerator[Completion, None]:
        """Each completion as it ends, exactly one per request; once `is_halted()`, all end as "abort".

        If the engine raises, the requests that are left are tried one by one: one of them must not take others along.
        """
        requests = list(requests)
        self._running |= {request.key for request in requests}
        try:
            left = {request.key: request for request in requests}
            try:
                async for completion in self._batch(engine, requests, is_halted):
                    left.pop(completion.key)
                    yield completion
            except ENGINE_ERRORS as error:
                if len(requests) == 1:
                    yield failed(requests[0], "engine_error", f"{type(error).__name__}: {error}")
                    return
                for request in list(left.values()):
                    async for completion in self.generate(engine, [request], is_halted):
                        yield completion
        finally:
            self._running -= {request.key for request in requests}
            self._aborted -= {request.key for request in requests}

    async def _batch(
        self, engine: Engine, requests: Sequence[SampleRequest], is_halted: Callable[[], bool]
    ) -> AsyncGenerator[Completion, None]:
        loop = asyncio.get_running_loop()
        ended: asyncio.Queue[Completion | None] = asyncio.Queue()
        is_abandoned = False

        def on_finished(completion: Completion) -> None:
            loop.call_soon_threadsafe(ended.put_nowait, completion)

        def should_abort(key: str) -> bool:
            self._compute.pulse.beat()
            failpoint("sampler.generating", key)
            return is_abandoned or key in self._aborted or is_halted()

        run = asyncio.ensure_future(self._compute.run(engine.generate, requests, on_finished, should_abort))
        # the thread's callbacks are queued before its end is, so the None comes last
        run.add_done_callback(lambda _: ended.put_nowait(None))
        try:
            while (completion := await ended.get()) is not None:
                self.sampled_tokens += len(completion.completion_ids)
                SAMPLED_TOKENS.inc(len(completion.completion_ids))
                yield completion
            run.result()
        finally:
            # the consumer went away: the thread stops after its next token
            is_abandoned = True
            run.cancel()
