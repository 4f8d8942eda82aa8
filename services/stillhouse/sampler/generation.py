"""From pieces to completions, and the switches that end them early."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stillhouse.core.errors import EngineDeadError
from stillhouse.core.failpoints import failpoint
from stillhouse.core.metrics import COMPLETION_TOKENS, RUNNING_SEQUENCES, SAMPLE_SECONDS, SAMPLED_TOKENS
from stillhouse.core.weights import order
from stillhouse.sampler.engines.base import Engine, Piece, SampleRequest
from stillhouse.v1 import weights_pb2

NamesWeights = Callable[[int], weights_pb2.WeightsRef | None]
"""Policy tag of a piece -> the weights it names; None = a frozen model's."""


@dataclass(slots=True, eq=False)
class Completion:
    """A completion as it grows. It has ended once there is a `finish_reason`."""

    request: SampleRequest
    completion_ids: list[int] = field(default_factory=list)
    """[T], the stop token included."""
    rollout_logprobs: list[float] = field(default_factory=list)
    """[T] nats, log-softmax(logits / temperature) without truncation."""
    spans: list[tuple[int, weights_pb2.WeightsRef]] = field(default_factory=list)
    """(index of the first token, weights that wrote it and what follows), in order; none of a frozen model."""
    sample_s: float = 0.0
    """Share of the computing time, seconds."""
    finish_reason: str = ""
    """"stop", "length", "abort" or "failed" (then `reason` and `message` say why)."""
    reason: str = ""
    message: str = ""
    _target_ids: list[np.ndarray[Any, Any]] = field(default_factory=list)
    _entropies: list[np.ndarray[Any, Any]] = field(default_factory=list)

    @property
    def key(self) -> str:
        return self.request.key

    @property
    def target_ids(self) -> np.ndarray[Any, Any] | None:
        """[T, K] int32, the `record_top_k` likeliest tokens at each position, likeliest first."""
        return np.concatenate(self._target_ids) if self._target_ids else None

    @property
    def entropies(self) -> np.ndarray[Any, Any] | None:
        """[T] float32 nats."""
        return np.concatenate(self._entropies) if self._entropies else None

    def add(self, piece: Piece, weights: weights_pb2.WeightsRef | None) -> None:
        """Take in what it gained, from these weights."""
        if piece.ids:
            if weights is not None:
                self.write_with(weights, len(self.completion_ids))
            self.take(piece.ids, piece.logprobs, piece.target_ids, piece.entropies)
        self.sample_s += piece.sample_s
        self.finish_reason, self.reason, self.message = piece.finish_reason, piece.reason, piece.message

    def write_with(self, weights: weights_pb2.WeightsRef, first_token: int) -> None:
        """From `first_token` on it is written by these weights."""
        if self.spans and order(self.spans[-1][1]) == order(weights):
            self.spans[-1] = (self.spans[-1][0], weights)
        else:
            self.spans.append((first_token, weights))

    def take(
        self,
        ids: Sequence[int],
        logprobs: Sequence[float],
        target_ids: np.ndarray[Any, Any] | None,
        entropies: np.ndarray[Any, Any] | None,
    ) -> None:
        """Append tokens and what is recorded of them."""
        self.completion_ids += ids
        self.rollout_logprobs += logprobs
        if target_ids is not None:
            self._target_ids.append(target_ids)
        if entropies is not None:
            self._entropies.append(entropies)

    def recorded(self, start: int, end: int) -> tuple[np.ndarray[Any, Any] | None, np.ndarray[Any, Any] | None]:
        """(target_ids, entropies) of the tokens start .. end - 1."""
        return _rows(self._target_ids, start, end), _rows(self._entropies, start, end)


def _rows(chunks: list[np.ndarray[Any, Any]], start: int, end: int) -> np.ndarray[Any, Any] | None:
    """Rows start .. end - 1 of arrays that follow each other; from the end, since that is where parts are taken."""
    first = sum(map(len, chunks))
    picked = []
    for chunk in reversed(chunks):
        first -= len(chunk)
        picked.append(chunk)
        if first <= start:
            return np.concatenate(picked[::-1])[start - first : end - first]
    return None


class Generator:
    """Runs completions on engines and knows which ones run."""

    def __init__(self) -> None:
        self._running: dict[str, Engine] = {}
        """By key."""
        self.sampled_tokens = 0

    @property
    def is_busy(self) -> bool:
        """A completion is being written, or waits for its turn."""
        return bool(self._running)

    def abort(self, keys: Iterable[str] = ()) -> int:
        """End running completions after their next token (none named = all); returns how many."""
        by_engine: dict[int, tuple[Engine, list[str]]] = {}
        for key in list(keys) or list(self._running):
            if (engine := self._running.get(key)) is not None:
                by_engine.setdefault(id(engine), (engine, []))[1].append(key)
        return sum(engine.abort(named) for engine, named in by_engine.values())

    async def generate(
        self,
        engine: Engine,
        completions: Sequence[Completion],
        weights_of: NamesWeights = lambda tag: None,
        *,
        alone: bool = False,
    ) -> AsyncGenerator[Completion, None]:
        """Write on at the completions; each is handed out as it ends.

        Raises:
            EngineDeadError: the engine is gone.
        """
        left = {completion.key: completion for completion in completions}
        self._running |= dict.fromkeys(left, engine)
        RUNNING_SEQUENCES.set(len(self._running))
        started = time.monotonic()
        try:
            pieces = engine.generate([completion.request for completion in completions], alone=alone)
            async with aclosing(pieces):
                async for piece in pieces:
                    failpoint("sampler.generating", piece.key)
                    completion = left[piece.key]
                    completion.add(piece, weights_of(piece.policy_tag))
                    self.sampled_tokens += len(piece.ids)
                    SAMPLED_TOKENS.inc(len(piece.ids))
                    if completion.finish_reason:
                        del left[piece.key], self._running[piece.key]
                        RUNNING_SEQUENCES.set(len(self._running))
                        SAMPLE_SECONDS.observe(time.monotonic() - started)
                        COMPLETION_TOKENS.observe(len(completion.completion_ids))
                        yield completion
            if left:
                raise EngineDeadError(f"the engine ended before {len(left)} of its completions did")
        finally:
            for key in left:
                self._running.pop(key, None)
            RUNNING_SEQUENCES.set(len(self._running))
