"""Scores out of vLLM's log-probabilities of a prompt: requests in, tensors out. No vLLM here: vllm.py starts it.

A rollout is a prompt of P + T tokens, of which vLLM writes one more that nobody wants. Row i of its answer is about the
token at position i, so a completion's rows are the last T.
Axes: P prompt, T completion tokens, K top-k or targets.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from stillhouse.core.errors import EngineDeadError
from stillhouse.teacher.engines.base import Abilities, Scored, ScoreItem, Unscored
from stillhouse.teacher.engines.items import problem
from stillhouse.v1 import rollout_pb2 as pb

MIN_TAIL: Final = 1e-6
"""Least mass outside the top k that is told. It is 1 - sum of float32 probabilities, right to about as much: what is
smaller is rounding, and an exact zero would forbid the rest of the vocabulary. (The transformers engine sums the rest.)
"""
NO_HIDDEN: Final = (
    "gives no hidden states, which full_vocabulary losses, the baseline full_vocabulary and held-out evaluation need: "
    "use a teacher with engine transformers, or objective top_k without evaluation.data"
)
V2_RUNNER: Final = "VLLM_USE_V2_MODEL_RUNNER"
"""vLLM's own variable: 1 = its model runner V2, which scores the tokens that a request names."""
NO_TARGETS: Final = (
    "scores named tokens (top_k with support student or union) with vLLM's model runner V2 only, and this one is V1: "
    f"set {V2_RUNNER}=1 where vLLM has it, use engine transformers, or support: teacher"
)


def vllm_abilities() -> Abilities:
    """What a vLLM teacher can do in this environment, before vLLM is started."""
    lacks = {int(pb.SCORE_KIND_HIDDEN): NO_HIDDEN}
    if os.environ.get(V2_RUNNER) != "1":
        lacks[int(pb.SCORE_KIND_TARGETS)] = NO_TARGETS
    return Abilities("vllm", lacks=lacks, temperatures=False, follows=False)


@dataclass(frozen=True, slots=True)
class Running:
    """A started vLLM and what of it is needed here."""

    llm: Any
    """`LLMEngine`: add_request, has_unfinished_requests, step, abort_request."""
    make_params: Callable[..., Any]
    """`SamplingParams`."""
    max_model_len: int
    """Prompt and what is written, tokens."""
    has_targets: bool
    """Model runner V2: it scores the tokens that a request names."""
    dead_errors: tuple[type[Exception], ...]
    """Raised when the engine's process is gone."""
    obituary: Callable[[], str]
    """How that process ended."""
    stop: Callable[[], None]
    """Ends it."""


class VllmEngine:
    """`Engine` on a running vLLM."""

    def __init__(
        self, running: Running, *, vocab_size: int, size_bytes: int, beat: Callable[[], None] = lambda: None
    ) -> None:
        self._vllm = running
        self._beat = beat
        self._numbers = itertools.count()
        self.vocab_size = vocab_size
        self.max_sequence_length = running.max_model_len - 1  # one token has to be written
        self.size_bytes = size_bytes

    def score(self, items: Sequence[ScoreItem]) -> list[Scored | Unscored]:
        """
        Raises:
            EngineDeadError: vLLM's process is gone; this one has to be started again.
        """
        results: dict[int, Scored | Unscored] = {}
        waiting: dict[str, int] = {}
        try:
            for index, item in enumerate(items):
                found = problem(item, self) or self._refusal(item) or self._add(item, index, waiting)
                if found is not None:
                    results[index] = found
            while waiting:
                for output in self._vllm.llm.step():
                    if output.finished and output.request_id in waiting:
                        index = waiting.pop(output.request_id)
                        results[index] = self._read(items[index], output)
                self._beat()
        except self._vllm.dead_errors as error:
            raise EngineDeadError(
                f"engine_died: vLLM's process {self._vllm.obituary()}; this teacher ends, to be started again"
            ) from error
        except BaseException:
            self._vllm.llm.abort_request(list(waiting))
            raise
        return [results[index] for index in range(len(items))]

    def _refusal(self, item: ScoreItem) -> Unscored | None:
        """What asks() of the job should have kept away from here."""
        if item.kind == pb.SCORE_KIND_HIDDEN:
            return Unscored(item.key, "unsupported", f"engine vllm {NO_HIDDEN}")
        if item.target_ids is not None and not self._vllm.has_targets:
            return Unscored(item.key, "unsupported", f"engine vllm {NO_TARGETS}")
        if item.temperature not in (0.0, 1.0):
            return Unscored(
                item.key, "unsupported", f"engine vllm scores at temperature 1 only, asked for {item.temperature:g}"
            )
        return None

    def _add(self, item: ScoreItem, index: int, waiting: dict[str, int]) -> Unscored | None:
        """Give an item to vLLM."""
        name = f"{next(self._numbers)}"
        wanted: dict[str, Any] = {}
        if item.kind != pb.SCORE_KIND_TARGETS:
            wanted["prompt_logprobs"] = item.top_k if item.kind == pb.SCORE_KIND_TOPK else 0
        if item.target_ids is not None:
            # the completion's own tokens go first: `targets` wants them, too
            own = np.asarray(item.completion_ids, dtype=np.int64)[:, None]
            wanted["prompt_logprob_token_ids"] = np.concatenate([own, item.target_ids.astype(np.int64)], axis=1)
            wanted["prompt_logprob_start"] = len(item.prompt_ids) - 1
        params = self._vllm.make_params(
            max_tokens=1, temperature=0.0, flat_logprobs=True, detokenize=False, ignore_eos=True, **wanted
        )
        try:
            self._vllm.llm.add_request(name, {"prompt_token_ids": [*item.prompt_ids, *item.completion_ids]}, params)
        except ValueError as error:  # vLLM checks what it is given
            return Unscored(item.key, "bad_request", f"vLLM refuses it: {error}")
        waiting[name] = index
        return None

    def _read(self, item: ScoreItem, output: Any) -> Scored | Unscored:
        num_tokens = len(item.completion_ids)
        targets = None
        if item.target_ids is not None:
            found = np.asarray(output.prompt_token_id_logprobs, dtype=np.float32)
            logprobs_T, targets = found[:, 0], found[:, 1:]
        if item.kind == pb.SCORE_KIND_TARGETS:
            return Scored(item.key, logprobs_T, target_logprobs=targets)
        flat, width = output.prompt_logprobs, (item.top_k if item.kind == pb.SCORE_KIND_TOPK else 0) + 1
        # the token that stands there, then the likeliest; nothing precedes the first token, so it has no row
        ids = np.asarray(flat.token_ids, dtype=np.int32).reshape(-1, width)[-num_tokens:]
        logprobs = np.asarray(flat.logprobs, dtype=np.float32).reshape(-1, width)[-num_tokens:]
        if item.kind != pb.SCORE_KIND_TOPK:
            return Scored(item.key, logprobs[:, 0].copy())
        if ids.max() >= self.vocab_size:
            return Unscored(
                item.key,
                "bad_ids",
                f"token id {ids.max()} is among the likeliest; it is padding of the head, the teacher knows "
                f"{self.vocab_size} ids",
            )
        return Scored(
            item.key,
            logprobs[:, 0].copy(),
            topk_ids=ids[:, 1:].copy(),
            topk_logprobs=logprobs[:, 1:].astype(np.float16 if item.half else np.float32),
            tail_logprobs=tail(logprobs[:, 1:], is_all=item.top_k == self.vocab_size),
            target_logprobs=targets,
        )

    def head(self) -> Any:
        raise NotImplementedError(NO_HIDDEN)  # never asked for: a task that needs it is refused

    def load_weights(self, arrays: Any, dtypes: Any) -> None:
        raise NotImplementedError("a vLLM teacher is frozen")  # as above

    def close(self) -> None:
        self._vllm.stop()


def tail(topk_logprobs_TK: np.ndarray[Any, Any], *, is_all: bool) -> np.ndarray[Any, Any]:
    """[T] float32, log of the mass outside the K tokens, right to about 1e-6 of mass and never less than MIN_TAIL.

    `is_all`: there is nothing outside.
    """
    if is_all:
        return np.full(len(topk_logprobs_TK), -np.inf, np.float32)
    inside = np.exp(topk_logprobs_TK.astype(np.float64)).sum(-1)
    outside = np.log1p(-np.minimum(inside, 1 - MIN_TAIL))
    return np.maximum(outside, math.log(MIN_TAIL)).astype(np.float32)
