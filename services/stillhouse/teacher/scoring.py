"""From the event loop to the compute thread: models on demand, batches, and what to do when one raises."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final

from stillhouse.core import tracing
from stillhouse.core.errors import ENGINE_ERRORS, EngineDeadError
from stillhouse.core.failpoints import failpoint
from stillhouse.core.metrics import BATCH_SAMPLES, SCORE_SECONDS, SCORED_TOKENS
from stillhouse.core.pulse import BULK
from stillhouse.core.worker import ComputeThread
from stillhouse.teacher.accounts import Accounts
from stillhouse.teacher.batching import plan_batches
from stillhouse.teacher.cache import ScoreCache
from stillhouse.teacher.checks import checked
from stillhouse.teacher.engines.base import Head, Scored, ScoreItem, Unscored
from stillhouse.teacher.pool import ModelPool, Resident
from stillhouse.teacher.schedule import ModelKey
from stillhouse.v1 import rollout_pb2

MAX_NAMED: Final = 64
"""Samples that the span of a batch names."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Items that were scored together, or found in the cache together."""

    indices: list[int]
    results: list[Scored | Unscored]
    score_s: float
    """Seconds per item."""
    sha256: str
    """Of the weights that judged: what follows a student may have newer ones soon after."""
    head_sha256: str
    """Of the output head that goes with hidden states; empty = none were asked for."""
    is_cached: bool = False


class Scorer:
    """Runs engines on the one compute thread, for the worker and for callers.

    A model is fetched and used within one `turn`, so that nobody has it thrown out in between.
    """

    def __init__(self, compute: ComputeThread, pool: ModelPool, cache: ScoreCache) -> None:
        self._compute = compute
        self._turn = asyncio.Lock()
        self.pool = pool
        self.cache = cache
        self.accounts = Accounts()
        self.dead: EngineDeadError | None = None
        """Why this process has to end."""
        self.scored_tokens = 0

    def turn(self) -> asyncio.Lock:
        """`async with scorer.turn():` nobody else brings models in or out. First come, first served."""
        return self._turn

    async def model(self, task: rollout_pb2.TeacherTask, keep: Collection[ModelKey] = ()) -> tuple[Resident, float]:
        """The model of a task, in memory, and the seconds its load took (0 = it was there). See `ModelPool.get`."""
        resident, load_s = await self._compute.run(self.pool.get, task, keep, patience=BULK)
        if load_s:
            self.accounts.loaded(task.job_id, load_s)
        return resident, load_s

    async def head(self, resident: Resident) -> Head:
        """Its output head, hashed once."""
        return await self._compute.run(resident.engine.head)

    async def batches(
        self,
        resident: Resident,
        items: Sequence[ScoreItem],
        *,
        budget: int,
        job_id: str,
        is_exact: bool = False,
        is_fresh: bool = False,
    ) -> AsyncGenerator[Batch, None]:
        """Score the items, at most `budget` padded tokens at once. `is_exact`: each alone and none from the cache,
        since the last bits of a row depend on what else is in its batch. `is_fresh`: none from the cache.
        """
        wants_head = any(item.kind == rollout_pb2.SCORE_KIND_HIDDEN for item in items)
        names = (resident.sha256, (await self.head(resident)).sha256 if wants_head else "")
        # an average is named by its tensors: two registrations may share them and differ in their configuration
        identity, left = (resident.entry.sha256, resident.sha256, resident.dtype), list(range(len(items)))
        if not (is_exact or is_fresh):
            found = {index: self.cache.find(identity, items[index]) for index in left}
            hits = {index: scored for index, scored in found.items() if scored is not None}
            if hits:
                self.accounts.cached(job_id, sum(len(items[index].completion_ids) for index in hits))
                yield Batch(list(hits), list(hits.values()), 0.0, *names, is_cached=True)
            left = [index for index in left if index not in hits]
        for batch in plan_batches([items[index].length for index in left], 0 if is_exact else budget):
            indices = [left[number] for number in batch]
            chosen = [items[index] for index in indices]
            with tracing.span("score", **_about(resident, chosen), job_id=job_id):
                results, score_s = await self._score(resident, chosen, job_id)
            for item, result in zip(chosen, results, strict=True):
                if isinstance(result, Scored) and not is_exact:
                    self.cache.keep(identity, item, result)
            yield Batch(indices, results, score_s, *names)

    async def _score(
        self, resident: Resident, items: Sequence[ScoreItem], job_id: str
    ) -> tuple[list[Scored | Unscored], float]:
        """(results in order, seconds per item). If the batch raises, the items are tried one by one."""
        failpoint("teacher.scoring", " ".join(item.key for item in items))
        started = time.monotonic()
        try:
            results = await self._compute.run(_checked_score, resident, items)
        except EngineDeadError as error:
            self.dead = error
            raise
        except ENGINE_ERRORS as error:
            if len(items) == 1:
                return [Unscored(items[0].key, "teacher_error", f"{type(error).__name__}: {error}")], 0.0
            alone = [await self._score(resident, [item], job_id) for item in items]
            return [results[0] for results, _ in alone], (time.monotonic() - started) / len(items)
        seconds = time.monotonic() - started
        tokens = sum(len(result.teacher_logprobs) for result in results if isinstance(result, Scored))
        self.scored_tokens += tokens
        self.accounts.scored(job_id, tokens, seconds)
        SCORED_TOKENS.inc(tokens)
        SCORE_SECONDS.observe(seconds)
        BATCH_SAMPLES.observe(len(items))
        return results, seconds / len(items)


def _about(resident: Resident, items: Sequence[ScoreItem]) -> dict[str, Any]:
    """Of the span of a batch: linked to all who asked for one of its items."""
    about = {
        "stillhouse.model": resident.entry.name,
        "stillhouse.samples": len(items),
        "stillhouse.sample_ids": [item.key for item in items[:MAX_NAMED]],
    }
    return {"kind": "consumer", "links": [item.traceparent for item in items], "attributes": about}


def _checked_score(resident: Resident, items: Sequence[ScoreItem]) -> list[Scored | Unscored]:
    return checked(items, resident.engine.score(items))
