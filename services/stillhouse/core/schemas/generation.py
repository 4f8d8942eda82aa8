"""Texts, written by a model."""

from __future__ import annotations

from typing import Literal

from stillhouse.core.schemas.base import Answer


class GeneratedText(Answer):
    """One completion."""

    index: int
    """From 0; it was drawn with the seed of the answer plus this."""
    text: str
    """Special tokens left out."""
    token_ids: list[int]
    """What the model wrote, with the token that ends it if it ended itself."""
    num_tokens: int
    finish_reason: Literal["stop", "length", "abort"]
    """stop = it ended itself; length = cut off at `max_tokens`; abort = its sampler was stopped."""
    logprob: float | None
    """Of all its tokens together, nats, at the temperature they were drawn at; null = minus infinity."""


class GenerationUsage(Answer):
    """What a request cost."""

    prompt_tokens: int
    completion_tokens: int
    """Of all completions."""


class Generation(Answer):
    """Completions of one prompt."""

    object: Literal["generation"] = "generation"
    model: str
    """The registered name, or the checkpoint that was meant: `job_ID/ckpt_...`."""
    model_sha256: str
    """The very weights that wrote."""
    prompt: str
    """What the model read, chat template applied."""
    seed: int
    """Ask with it again for the same texts."""
    sampler: str
    """Process that wrote."""
    data: list[GeneratedText]
    usage: GenerationUsage
