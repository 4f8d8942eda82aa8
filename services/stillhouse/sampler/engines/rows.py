"""Completions being written, as the transformers engine sees them; no torch."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stillhouse.sampler.engines.base import Piece, SampleRequest, failed


@dataclass(slots=True, eq=False)
class Call:
    """The requests that entered together, and what has become of them."""

    requests: list[SampleRequest]
    is_alone: bool = False
    pieces: list[Piece] = field(default_factory=list)
    """Written and not yet handed out."""
    aborted: set[str] = field(default_factory=set)
    """Keys whose completions end after their next token."""
    is_closed: bool = False
    """Nobody listens any more."""


@dataclass(slots=True, eq=False)
class Row:
    """A completion that is being written or waits for its turn."""

    request: SampleRequest
    call: Call
    order: int
    """Of arrival."""
    uniforms: np.ndarray[Any, Any]
    max_tokens: int
    ids: list[int]
    """All of the completion, what another sampler wrote included."""
    is_suspect: bool = False
    """It was in a batch that failed: it goes on without neighbours."""
    logprobs: list[float] = field(default_factory=list)
    """Of tokens that are not handed out yet, like the following."""
    target_ids: list[np.ndarray[Any, Any]] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    sample_s: float = 0.0

    @property
    def context(self) -> tuple[int, ...]:
        """What the model has to have read before it writes the next token."""
        return (*self.request.prompt_ids, *self.ids)

    @property
    def length(self) -> int:
        """Tokens of the context."""
        return len(self.request.prompt_ids) + len(self.ids)

    @property
    def uniform(self) -> float:
        """Draws the next token."""
        return float(self.uniforms[len(self.ids)])

    @property
    def is_aborted(self) -> bool:
        return self.request.key in self.call.aborted

    def end(self, end_ids: Collection[int]) -> str:
        """Finish reason if the last token was the last one, else ""."""
        if self.ids and (self.ids[-1] in end_ids or self.ids[-1] in self.request.stop_token_ids):
            return "stop"
        if len(self.ids) >= self.max_tokens:
            return "length"
        return "abort" if self.is_aborted else ""

    def flush(self, policy_tag: int, finish_reason: str = "") -> None:
        """Put what is new into the call's pieces."""
        if not self.logprobs and not finish_reason:
            return
        self.call.pieces.append(
            Piece(
                self.request.key,
                self.ids[len(self.ids) - len(self.logprobs) :],
                self.logprobs,
                policy_tag,
                np.stack(self.target_ids) if self.target_ids else None,
                np.asarray(self.entropies, dtype=np.float32) if self.entropies else None,
                finish_reason,
                sample_s=self.sample_s,
            )
        )
        self.logprobs, self.target_ids, self.entropies, self.sample_s = [], [], [], 0.0

    def fail(self, reason: str, message: str) -> None:
        """End without what was not handed out."""
        self.call.pieces.append(failed(self.request, reason, message))
