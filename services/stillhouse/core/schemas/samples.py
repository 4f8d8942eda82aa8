"""What a job trained on, token by token, and what its services said about it.

p = the student's probability of a token as it drew it, q = a teacher's of the same token, both at the sampling
temperature.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from stillhouse.core.schemas.base import Answer


class TokenChoice(Answer):
    """A token that could have stood there."""

    id: int
    text: str
    """By itself; what is no text alone shows as U+FFFD."""
    logprob: float | None
    """log q, nats; null = minus infinity."""


class SampleToken(Answer):
    """A token of a completion. Numbers are nats; null = nobody recorded it, or it is not finite."""

    id: int
    text: str
    """All of them, joined, are the completion. A character of several tokens is the last one's, the others have ''."""
    is_trained: bool
    """The loss has a term for it."""
    student_logprob: float | None
    """log p as it was drawn; null of texts that the student did not write."""
    teacher_logprob: float | None
    """log q; null without a teacher, and where the teacher scores spans of text."""
    kl: float | None
    """log p - log q: what this token adds to a one-sample estimate of KL(student || teacher). Negative where the
    teacher likes the token better than the student did."""
    top: list[TokenChoice] = Field(default_factory=list)
    """The teacher's likeliest tokens, likeliest first, where the job stored them (`support: teacher` or `union`)."""
    student_top: list[TokenChoice] = Field(default_factory=list)
    """The student's likeliest tokens as it drew, with the teacher's log q of them, where the job stored them."""


class SampleSpan(Answer):
    """A piece of text at whose ends student and teacher both have the end of a token: teachers with another tokenizer
    score these. Numbers are nats, of the whole span."""

    first_token: int
    """Index in `tokens`."""
    num_tokens: int
    """Of the student."""
    text: str
    num_teacher_tokens: int
    is_trained: bool
    student_logprob: float | None
    teacher_logprob: float | None
    kl: float | None
    """log p - log q of the span."""


class SampleFailure(Answer):
    """Why a sample has no score."""

    reason: str
    """Short code, for programs."""
    message: str
    service: str
    """Who gave up: sampler, teacher or trainer."""
    attempts: int


class Sample(Answer):
    """A completion that a step trained on, and what a teacher said about it; or a sample that failed."""

    id: str
    """group/index."""
    object: Literal["sample"] = "sample"
    step: int
    """Optimizer step that trained on it; the first is 1."""
    epoch: int
    """Claim of the job that journalled it."""
    stage: str
    row: int
    """Row of the data, from 0."""
    teacher: str
    """Whose words `tokens` and `spans` show; '' in a job without teachers."""
    teachers: list[str]
    """All that judged it: several in a mixture. Ask with `teacher=` for another one's words."""
    origin: Literal["student", "data", "teacher"]
    """Who wrote the completion."""
    prompt: str
    """As the student read it, chat template applied, special tokens shown."""
    num_prompt_tokens: int
    completion: str
    """Special tokens shown."""
    finish_reason: Literal["stop", "length", "abort", ""]
    """stop = it ended itself; length = cut off at `max_tokens`; '' = it has no completion."""
    policy_version: int | None
    """Optimizer steps behind the oldest weights that wrote a token of it; null of other texts."""
    reward: float | None
    """By the verifier; null = none was asked for."""
    reward_note: str
    """What the verifier had to say."""
    kl: float | None
    """Mean of the tokens' `kl`, nats per token; of spans: their sum divided by the tokens in them."""
    num_tokens: int
    tokens: list[SampleToken]
    spans: list[SampleSpan] = Field(default_factory=list)
    """Only where the teacher has another tokenizer."""
    failure: SampleFailure | None = None
    """Null = it was scored."""


class LogLine(Answer):
    """What a service wrote to its log about a job."""

    id: str
    """Position; give it as `after` or Last-Event-ID to continue."""
    object: Literal["log"] = "log"
    created_at: str
    service: str
    """sampler, teacher, trainer or gateway."""
    instance: str
    level: str
    message: str
    data: dict[str, Any]
    """Everything else of the line; `exception` has a traceback."""


class LetterRetry(Answer):
    """What became of one dead letter."""

    id: str
    is_retried: bool
    """It is on its queue again, as a new attempt."""
    message: str
    """Why not, and what helps; '' if it is."""


class LetterRetries(Answer):
    """What became of dead letters that were to be tried again, in the order of the request."""

    object: Literal["list"] = "list"
    data: list[LetterRetry]
