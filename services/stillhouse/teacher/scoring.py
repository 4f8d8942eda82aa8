"""From the event loop to the compute thread: models on demand, batches, and what to do when one raises."""

from __future__ import annotations

import time
from collections.abc import Sequence

from stillhouse.core.pulse import BULK
from stillhouse.core.telemetry import SCORE_SECONDS, SCORED_TOKENS
from stillhouse.core.worker import ComputeThread
from stillhouse.teacher.engines.base import Head, Scored, ScoreItem, Unscored
from stillhouse.teacher.pool import ModelPool, Resident
from stillhouse.v1 import rollout_pb2

ENGINE_ERRORS = (RuntimeError, ValueError, IndexError, MemoryError, ArithmeticError)
"""What an engine raises about its input or its memory; anything else is a bug and ends the process."""


class Scorer:
    """Runs engines on the one compute thread. Batches of the worker and of callers take turns."""

    def __init__(self, compute: ComputeThread, pool: ModelPool) -> None:
        self._compute = compute
        self.pool = pool
        self.scored_tokens = 0

    async def model(self, task: rollout_pb2.TeacherTask) -> Resident:
        """The model of a task, in memory. Raises what `ModelPool.get` does."""
        return await self._compute.run(self.pool.get, task.model, task.model_sha256, task.dtype, patience=BULK)

    async def head(self, resident: Resident) -> Head:
        """Its output head, hashed once."""
        return await self._compute.run(resident.engine.head)

    async def score(self, resident: Resident, items: Sequence[ScoreItem]) -> tuple[list[Scored | Unscored], float]:
        """(results in order, seconds per item). If the batch raises, the items are tried one by one."""
        started = time.monotonic()
        try:
            results = await self._compute.run(resident.engine.score, items)
        except ENGINE_ERRORS as error:
            if len(items) == 1:
                return [Unscored(items[0].key, "teacher_error", f"{type(error).__name__}: {error}")], 0.0
            alone = [await self.score(resident, [item]) for item in items]
            return [results[0] for results, _ in alone], (time.monotonic() - started) / len(items)
        seconds = time.monotonic() - started
        tokens = sum(len(result.teacher_logprobs) for result in results if isinstance(result, Scored))
        self.scored_tokens += tokens
        SCORED_TOKENS.inc(tokens)
        SCORE_SECONDS.observe(seconds)
        return results, seconds / len(items)
