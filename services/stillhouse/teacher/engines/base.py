"""What a teacher needs of an engine. Light: the engines themselves import torch or vLLM.

Axes: T completion tokens, K top-k or targets, D model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Protocol

import numpy as np

from stillhouse.v1 import rollout_pb2

SCORE_KINDS: Final = (
    rollout_pb2.SCORE_KIND_SAMPLED,
    rollout_pb2.SCORE_KIND_TOPK,
    rollout_pb2.SCORE_KIND_TARGETS,
    rollout_pb2.SCORE_KIND_HIDDEN,
    rollout_pb2.SCORE_KIND_SPANS,
)
"""What a teacher can be asked for. For spans, an engine scores sampled tokens."""


class Spans(NamedTuple):
    """Pieces of a completion's text at whose ends student and teacher both have the end of a token (SpansScore)."""

    student_ends: list[int]
    """[S] tokens of the student up to the end of each."""
    teacher_ends: list[int]
    """[S] tokens of the teacher."""
    is_canonical: list[bool]
    """[S] the student's tokens are those with which its own tokenizer writes the text."""


@dataclass(frozen=True, slots=True)
class ScoreItem:
    """One rollout to be scored."""

    key: str
    prompt_ids: list[int]
    """[P] the prompt as the teacher reads it."""
    completion_ids: list[int]
    """[T]"""
    kind: rollout_pb2.ScoreKind
    temperature: float = 1.0
    top_k: int = 0
    """Tokens per position of SCORE_KIND_TOPK."""
    half: bool = True
    """Payload (hidden states, top-k log-probabilities) as float16 instead of float32."""
    target_ids: np.ndarray[Any, Any] | None = None
    """[T, K] of SCORE_KIND_TARGETS; of SCORE_KIND_TOPK where these tokens are wanted beside the teacher's own."""
    spans: Spans | None = None
    """Of SCORE_KIND_SPANS, for an engine SCORE_KIND_SAMPLED: `completion_ids` are the teacher's own tokens."""
    traceparent: str = ""
    """The span that asked for it; the score does not depend on it."""

    @property
    def length(self) -> int:
        """Tokens of the forward pass."""
        return len(self.prompt_ids) + len(self.completion_ids)


@dataclass(frozen=True, slots=True)
class Scored:
    """A scored rollout: `teacher_logprobs[t]` belongs to `completion_ids[t]`, the rest depends on the kind."""

    key: str
    teacher_logprobs: np.ndarray[Any, Any]
    """[T] float32, nats."""
    hidden: np.ndarray[Any, Any] | None = None
    """[T, D] float16 or float32 after the final norm; row t predicts `completion_ids[t]`."""
    topk_ids: np.ndarray[Any, Any] | None = None
    """[T, K] int32, likeliest first."""
    topk_logprobs: np.ndarray[Any, Any] | None = None
    """[T, K] float16 or float32, nats."""
    tail_logprobs: np.ndarray[Any, Any] | None = None
    """[T] float32, log of the mass outside the K tokens."""
    target_logprobs: np.ndarray[Any, Any] | None = None
    """[T, K] float32, nats."""


@dataclass(frozen=True, slots=True)
class Unscored:
    """A rollout without score, and why."""

    key: str
    reason: str
    """Short code: "too_long", "bad_ids", "non_finite", "fp16_overflow", ..."""
    message: str


@dataclass(frozen=True, slots=True)
class Head:
    """Output head of a model, as `HeadInfo` describes it: logits = soft_cap(scale * (hidden @ weight.T + bias))."""

    sha256: str
    """Of `parts` joined."""
    dtype: str
    shape: tuple[int, int]
    """[V_padded, D] of the weight."""
    has_bias: bool
    vocab_size: int
    logit_scale: float
    logit_soft_cap: float
    """0 = none."""
    parts: list[memoryview]
    """Raw bytes of the weight, and of the bias if there is one."""

    @property
    def size_bytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


@dataclass(frozen=True, slots=True)
class Abilities:
    """What an engine can do: known before a model is loaded."""

    engine: str
    """Its name in the setting `engine`."""
    lacks: Mapping[int, str] = field(default_factory=dict)
    """Kinds of scores that it does not give, and what to do about it."""
    temperatures: bool = True
    """It scores at any temperature; False = at 1 only."""
    follows: bool = True
    """It takes new weights while it runs, so that its teacher can follow a student."""
    threads: int = 0
    """The setting `threads`."""

    @property
    def kinds(self) -> list[rollout_pb2.ScoreKind]:
        """Kinds of scores that it gives."""
        return [kind for kind in SCORE_KINDS if kind not in self.lacks]

    def refusal(self, task: rollout_pb2.TeacherTask) -> str:
        """Why a stream's rollouts cannot all be scored here, for people; empty = they can."""
        if task.threads and (self.engine, self.threads) != ("transformers", task.threads):
            return (
                f"the job is deterministic and needs engine transformers with {task.threads} threads, as in its "
                f"trainer; this teacher has engine {self.engine} with {self.threads}"
            )
        if task.follows_student and not self.follows:
            return f"engine {self.engine} serves registered weights only; 'ema_of_student' needs engine transformers"
        for ask in task.asks:
            if ask.kind in self.lacks:
                return f"engine {self.engine} {self.lacks[ask.kind]}"
            if not self.temperatures and ask.temperature not in (0.0, 1.0):
                return (
                    f"engine {self.engine} scores at temperature 1 only, asked for {ask.temperature:g}; use "
                    "temperature 1 (sampling.temperature of a job), or a teacher with engine transformers"
                )
        return ""


TRANSFORMERS: Final = Abilities(engine="transformers")


class Engine(Protocol):
    """A model that judges. Used from the compute thread only."""

    vocab_size: int
    """Token ids it can read; padding rows of the head are not among them."""
    max_sequence_length: int
    """Prompt and completion together, tokens."""
    size_bytes: int
    """Memory of the weights."""

    def score(self, items: Sequence[ScoreItem]) -> list[Scored | Unscored]:
        """Score the items as one batch, in order."""
        ...

    def head(self) -> Head:
        """The output head, hashed."""
        ...

    def load_weights(self, arrays: Mapping[str, np.ndarray[Any, Any]], dtypes: Mapping[str, int]) -> None:
        """Take over published weights, by state-dict name (bfloat16 as uint16 bits) with their wire element types.

        Raises:
            WeightsError: they do not fit the model; what is loaded then is undefined.
        """
        ...

    def close(self) -> None:
        """Free the memory and end child processes; nothing is called afterwards."""
        ...
