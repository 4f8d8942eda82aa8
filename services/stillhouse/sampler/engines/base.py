"""What a sampler needs of an engine. Light: the engines themselves import torch or vLLM.

Life of a request:  waits inside -> runs -> ended, with one `Piece` that says so        moved by the engine
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from stillhouse.core.models import ModelEntry


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
    stop: tuple[str, ...] = ()
    """Texts that end it. Engines know no texts and leave this alone; see stops.py."""
    record_top_k: int = 0
    """Keep the ids of so many likeliest tokens at each position; 0 = none."""
    record_entropies: bool = False
    """Keep the entropy of the distribution at each position."""
    written: tuple[int, ...] = ()
    """Completion tokens that another sampler wrote already: they are read like the prompt, drawing goes on at token
    index len(written), max_tokens counts them. Only new tokens are handed out."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens that one completion gained, in order; perhaps its end, which comes with its last token or without any."""

    key: str
    ids: list[int]
    """[N] new tokens; at the end the stop token is one of them."""
    logprobs: list[float]
    """[N] nats, log-softmax(logits / temperature) without truncation."""
    policy_tag: int = 0
    """The weights that wrote them: the argument of `load_weights`, 0 before the first."""
    target_ids: np.ndarray[Any, Any] | None = None
    """[N, K] int32, the `record_top_k` likeliest tokens at each position, likeliest first, before any truncation."""
    entropies: np.ndarray[Any, Any] | None = None
    """[N] float32 nats, of softmax(logits / temperature) without truncation."""
    finish_reason: str = ""
    """Empty = goes on; "stop", "length", "abort" or "failed" (then `reason` and `message` say why)."""
    reason: str = ""
    message: str = ""
    sample_s: float = 0.0
    """This completion's share of the computing time since its last piece, seconds."""


def failed(request: SampleRequest, reason: str, message: str) -> Piece:
    """The end of a request that cannot be written."""
    return Piece(request.key, [], [], finish_reason="failed", reason=reason, message=message)


class Engine(Protocol):
    """A causal language model that writes. Used from the event loop."""

    name: str
    vocab_size: int
    """Token ids it can read and write."""
    max_sequence_length: int
    """Prompt and completion together, tokens."""
    max_sequences: int
    """Completions written at once; more wait inside, in order of arrival."""

    def generate(self, requests: Sequence[SampleRequest], *, alone: bool = False) -> AsyncGenerator[Piece, None]:
        """Pieces of all requests as they come, interleaved; one of each request is its end. They enter together.

        Closing the generator ends what is left. `alone` (deterministic mode): the call waits until the engine is empty
        and nothing else enters until it ends, so that the batch is these requests and nothing else. An error about one
        request ends that request as "failed".

        Raises:
            EngineDeadError: the engine is gone.
        """
        ...

    def abort(self, keys: Iterable[str]) -> int:
        """Requests that end as "abort" after their next token, or at once if they wait; returns how many."""
        ...

    async def pause(self) -> None:
        """Returns between two tokens, and none follows until `resume`; running completions keep their state."""
        ...

    async def resume(self) -> None: ...

    async def load_weights(
        self, arrays: Mapping[str, np.ndarray[Any, Any]], dtypes: Mapping[str, int], tag: int
    ) -> None:
        """Replace the weights in place, between two tokens: `arrays` by state-dict name (bfloat16 as uint16 bits),
        `dtypes` on the wire. Running completions go on with what they have in the cache; later tokens carry `tag`.

        Raises:
            WeightsError: names, shapes or values do not fit; the old weights are still there.
        """
        ...

    async def close(self) -> None:
        """Free the memory, end child processes. What still runs ends as "abort"."""
        ...


LoadEngine = Callable[[ModelEntry, str], Awaitable[Engine]]
"""(registered model, dtype) -> engine."""
