"""What a sampler needs of an engine. Light: the engines themselves import torch or vLLM."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One completion wanted."""

    key: str
    """Names the completion within the process; the sample id for rollouts."""
    prompt_ids: list[int]
    """[P]"""
    max_tokens: int
    """Longest completion, tokens."""
    seed: int
    """The draws depend on it and on the token's index, and on nothing else."""
    temperature: float = 1.0
    """0 = greedy."""
    top_p: float = 1.0
    """1 = off."""
    top_k: int = 0
    """0 = off."""
    min_p: float = 0.0
    """0 = off."""
    stop_token_ids: tuple[int, ...] = ()
    """Besides the model's own end-of-sequence tokens."""
    record_top_k: int = 0
    """Keep the ids of so many likeliest tokens at each position; 0 = none."""
    record_entropies: bool = False
    """Keep the entropy of the distribution at each position."""


@dataclass(frozen=True, slots=True)
class Completion:
    """The end of a request: "stop", "length", "abort" or "failed" (then `reason` and `message` say why)."""

    key: str
    finish_reason: str
    completion_ids: list[int]
    """[T], the stop token included."""
    rollout_logprobs: list[float]
    """[T] nats, log-softmax(logits / temperature) without truncation."""
    sample_s: float = 0.0
    """This sample's share of the time of its batch, seconds."""
    reason: str = ""
    message: str = ""
    target_ids: np.ndarray[Any, Any] | None = None
    """[T, K] int32, the `record_top_k` likeliest tokens at each position, likeliest first, before any truncation."""
    entropies: np.ndarray[Any, Any] | None = None
    """[T] float32 nats, of softmax(logits / temperature) without truncation."""


def failed(request: SampleRequest, reason: str, message: str) -> Completion:
    """A request that ends without completion."""
    return Completion(request.key, "failed", [], [], reason=reason, message=message)


class Engine(Protocol):
    """A causal language model that writes. Used from the compute thread only."""

    name: str
    vocab_size: int
    """Token ids it can read and write."""
    max_sequence_length: int
    """Prompt and completion together, tokens."""

    def generate(
        self,
        requests: Sequence[SampleRequest],
        on_finished: Callable[[Completion], None],
        should_abort: Callable[[str], bool],
    ) -> None:
        """Write all completions as one batch; each is handed out as soon as it ends, exactly once.

        `should_abort(key)` is asked between tokens.
        """
        ...

    def load_weights(self, arrays: Mapping[str, np.ndarray[Any, Any]], dtypes: Mapping[str, int]) -> None:
        """Replace the weights in place: `arrays` by state-dict name (bfloat16 as uint16 bits), `dtypes` on the wire.

        Raises:
            WeightsError: names, shapes or values do not fit; the old weights are still there.
        """
        ...
