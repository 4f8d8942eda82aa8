"""What the learner trains on and what its engine measures, as numpy: samples, teachers' heads, measures of rows.

Plain arrays, so that loop, journal and queue code can build them without torch.
Letters: P prompt tokens, T completion tokens, D width of the teacher's hidden state, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

import numpy as np

from stillhouse.core.errors import WireError
from stillhouse.v1 import rollout_pb2

STUDENT_ORIGINS: Final = (rollout_pb2.ORIGIN_UNSPECIFIED, rollout_pb2.ORIGIN_STUDENT)
"""Origins of completions that the student wrote."""

MIN_LOG_Q = -30.0
"""Teacher log-probabilities of single tokens below it count as this much (1e-13): a token that the teacher forbids
outright (-inf) would make every reverse divergence infinite. A metric counts them."""

_PER_TOKEN = (
    "loss_mask",
    "rollout_logprobs",
    "teacher_logprobs",
    "hidden",
    "topk_ids",
    "topk_logprobs",
    "target_ids",
    "target_logprobs",
    "entropies",
    "spans",
)


@dataclass(frozen=True, eq=False)
class TrainSample:
    """One completion of the student and what its teacher says about it. `x[t]` belongs to `completion_ids[t]`."""

    sample_id: str
    """`group/i`."""
    teacher: str
    """Name of the job's teacher that it is routed to; NO_TEACHER in a job without."""
    prompt_ids: np.ndarray
    """[P] int32, P >= 1."""
    completion_ids: np.ndarray
    """[T] int32, T >= 1."""
    loss_mask: np.ndarray
    """[T] uint8 - 1 = the token is trained on."""
    rollout_logprobs: np.ndarray
    """[T] float32, nats - under the policy that sampled, at the sampling temperature. NaN of other origins."""
    teacher_logprobs: np.ndarray
    """[T] float32, nats - under the teacher, at the same temperature; NaN where it said nothing. Used by the policy
    gradient only."""
    hidden: np.ndarray | None
    """[T, D] float16 or float32 - the teacher's state after the final norm that predicts each token."""
    weight: float
    """Weight of the row in the loss. The teacher's own weight (`TeacherSpec.weight`) is applied by the learner."""
    oldest_policy_version: int
    """Oldest weights that wrote a token of it; of other origins it means nothing."""
    finish_reason: int
    """`v1.FinishReason`."""
    topk_ids: np.ndarray | None = None
    """[T, K] int32 - the teacher's likeliest tokens at each position."""
    topk_logprobs: np.ndarray | None = None
    """[T, K] float16 or float32, nats - under the teacher's whole distribution, at the same temperature."""
    target_ids: np.ndarray | None = None
    """[T, K'] int32 - the student's likeliest tokens as it sampled, no id twice in a row."""
    target_logprobs: np.ndarray | None = None
    """[T, K'] float32, nats - of them under the teacher, at the same temperature."""
    entropies: np.ndarray | None = None
    """[T] float32, nats - of the student as it sampled."""
    spans: np.ndarray | None = None
    """[T] int32 - number of the span of text that each token belongs to, ascending; -1 = to none, it does not train.
    `teacher_logprobs` are then those of the whole span, at each of its tokens. None = the teacher read these tokens."""
    outcome: float = 0.0
    """Advantage of the completion's reward within its group, normalised, not yet weighted."""
    is_filtered: bool = False
    """Drawn with top_p, top_k or min_p: from another distribution than `rollout_logprobs` are of."""
    origin: int = 0
    """`v1.Origin`: who wrote the completion."""

    def __post_init__(self) -> None:
        num_tokens = len(self.completion_ids)
        if num_tokens < 1 or len(self.prompt_ids) < 1:
            raise WireError(
                f"sample {self.sample_id}: {len(self.prompt_ids)} prompt and {num_tokens} completion tokens; "
                "both need one at least"
            )
        for name in _PER_TOKEN:
            array = getattr(self, name)
            if array is not None and len(array) != num_tokens:
                raise WireError(f"sample {self.sample_id}: {len(array)} rows of {name} for {num_tokens} tokens")

    @property
    def is_on_policy(self) -> bool:
        """The student wrote it."""
        return self.origin in STUDENT_ORIGINS

    @cached_property
    def num_tokens(self) -> int:
        """Tokens up to the last one that trains: what comes after it is not read. P + T where all do."""
        trained = np.flatnonzero(self.loss_mask)
        return len(self.prompt_ids) + (int(trained[-1]) + 1 if len(trained) else 1)

    @property
    def num_loss_tokens(self) -> int:
        """Tokens that are trained on."""
        return int(np.count_nonzero(self.loss_mask))


@dataclass(frozen=True, eq=False)
class TeacherHead:
    """A teacher's output head: logits = soft_cap(scale * (hidden @ weight.T + bias)), as HeadInfo in teacher.proto."""

    sha256: str
    """Name of its contents, hex."""
    weight: np.ndarray
    """[V_padded, D] float32, or uint16 = the bits of bfloat16."""
    dtype: str
    """Element type of `weight` and `bias`: float32 or bfloat16."""
    bias: np.ndarray | None
    """[V_padded], as `weight`."""
    vocab_size: int
    """Rows that belong to the tokenizer; the rest is padding."""
    logit_scale: float
    """1 = none."""
    logit_soft_cap: float
    """0 = none; otherwise logits = cap * tanh(logits / cap)."""

    def __post_init__(self) -> None:
        expected = {"float32": np.float32, "bfloat16": np.uint16}.get(self.dtype)
        if expected is None or self.weight.dtype != expected:
            raise WireError(
                f"teacher head {self.sha256[:12]}: {self.dtype} as numpy {self.weight.dtype}; "
                "give float32, or bfloat16 as its uint16 bits"
            )
        if self.weight.ndim != 2 or not 0 < self.vocab_size <= self.weight.shape[0]:
            raise WireError(
                f"teacher head {self.sha256[:12]}: vocabulary of {self.vocab_size} in a weight of {self.weight.shape}"
            )


@dataclass(frozen=True, eq=False)
class RowMeasures:
    """What a forward pass measured at its R rows (trained completion tokens)."""

    loss: float
    """Weighted sum over the rows."""
    values: np.ndarray
    """[R] float32 - loss of each row, without its weight."""
    reverse_kl: np.ndarray
    """[R] float32, nats - KL(student || teacher), exact for the full objectives, an estimate on samples otherwise."""
    logprobs: np.ndarray
    """[R] float32, nats - log p of the sampled tokens under the student."""
    entropy: np.ndarray
    """[R] float32, nats - of the student."""
    gate: np.ndarray
    """[R] float32 - weight that the objective gave each row: 1 without a ratio gate."""


@dataclass(frozen=True)
class Update:
    """How an optimizer step went."""

    norm: float
    """Norm of all gradients before clipping; not finite = nothing was changed."""
    bad_gradients: list[str] = field(default_factory=list)
    """Parameters whose gradient is not finite."""
    bad_weights: list[str] = field(default_factory=list)
    """Parameters that the update made non-finite."""
