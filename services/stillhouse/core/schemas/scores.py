"""Texts, scored by a model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stillhouse.core.schemas.base import Answer


class ScoreError(Answer):
    """Why a text has no score."""

    code: str
    """Short, for programs: non_finite, teacher_error."""
    message: str


class TextScore(Answer):
    """A text, scored. Numbers are nats; null = minus infinity, a token that the model forbids."""

    index: int
    """Of the item in the request."""
    num_prompt_tokens: int
    """Tokens that were only read."""
    num_tokens: int
    """Tokens that are scored; the lists below have so many entries."""
    token_ids: list[int]
    tokens: list[str]
    """Each token as text by itself; what is no text alone shows as U+FFFD."""
    logprobs: list[float | None] = Field(default_factory=list)
    """Of each token, given all before it."""
    logprob: float | None = None
    """Their sum."""
    perplexity: float | None = None
    """exp(-mean of the log-probabilities)."""
    top_token_ids: list[list[int]] | None = None
    """[tokens][top_k] likeliest tokens at each place, likeliest first; null unless asked for."""
    top_tokens: list[list[str]] | None = None
    top_logprobs: list[list[float | None]] | None = None
    rest_logprobs: list[float | None] | None = None
    """Of all other tokens together at each place; null = nothing is left for them."""
    error: ScoreError | None = None
    """Why this text has no score; the others of the request may have theirs."""


class ScoreUsage(Answer):
    """What a request cost."""

    prompt_tokens: int
    scored_tokens: int


class Scores(Answer):
    """Texts, scored by one model."""

    object: Literal["scores"] = "scores"
    model: str
    model_sha256: str
    """The very weights that scored."""
    temperature: float
    teacher: str
    """Process that scored."""
    data: list[TextScore]
    """In the order of the request's items."""
    usage: ScoreUsage
