"""What a user asks of `POST /v1/generate`: a few completions of one prompt by a model, to be looked at."""

from __future__ import annotations

import re
from typing import Annotated, Any, Final

from pydantic import AfterValidator, Field, model_validator

from stillhouse.core.spec_base import CHECKPOINT_PATTERN, NAME_PATTERN, Closed, Dtype
from stillhouse.core.spec_data import Message, TemplateArguments
from stillhouse.core.spec_score import MAX_TEXT

MAX_COMPLETIONS: Final = 8
"""Completions in a request."""
MAX_NEW_TOKENS: Final = 2048
"""Tokens that a request may have written, all completions together: a sampler on two busy CPU cores writes 70 a second
with the demo's model, and a request has 85 s."""
WRITER_PATTERN: Final = f"{NAME_PATTERN}|{CHECKPOINT_PATTERN}"


def _writer(value: str) -> str:
    if not re.fullmatch(WRITER_PATTERN, value):
        raise ValueError(
            f"'{value}' names no model: write the name of a registered one, or job_ID or job_ID/ckpt_... for a "
            "checkpoint of a job"
        )
    return value


Writer = Annotated[str, AfterValidator(_writer), Field(json_schema_extra={"pattern": f"^({WRITER_PATTERN})$"})]


class GenerateRequest(Closed):
    """A prompt to be continued. Nothing of it is stored."""

    model: Writer
    """Name of a registered model, `job_ID/ckpt_...`, or `job_ID` for the newest checkpoint of a job."""
    prompt: str | None = Field(default=None, min_length=1, max_length=MAX_TEXT)
    """What the model reads, as it is: no chat template is applied. Either this or `messages`."""
    messages: list[Message] | None = Field(default=None, min_length=1, max_length=256)
    """A conversation, which the model reads through its chat template. Either this or `prompt`."""
    chat_template_kwargs: TemplateArguments = Field(default_factory=dict)
    """Arguments of the chat template."""
    max_tokens: int = Field(default=256, ge=1, le=MAX_NEW_TOKENS)
    """Longest completion, tokens."""
    temperature: float = Field(default=1.0, ge=0, le=10)
    """0 = greedy, the likeliest token each time."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling; 1 = off."""
    seed: int | None = Field(default=None, ge=0, lt=2**53)
    """The same seed gives the same texts; null = any. (A JSON number is exact up to 2^53.)"""
    n: int = Field(default=1, ge=1, le=MAX_COMPLETIONS)
    """Completions."""
    dtype: Dtype = "float32"
    """Element type the model computes in."""

    @model_validator(mode="after")
    def _fits(self) -> GenerateRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either 'prompt' or 'messages'")
        if self.chat_template_kwargs and self.messages is None:
            raise ValueError("'chat_template_kwargs' go with 'messages': no template is applied to 'prompt'")
        if 0 < self.temperature < 0.05:
            raise ValueError(f"temperature {self.temperature:g}: use 0 for greedy texts, or 0.05 and more")
        if self.n * self.max_tokens > MAX_NEW_TOKENS:
            raise ValueError(f"n x max_tokens is {self.n * self.max_tokens} tokens, at most {MAX_NEW_TOKENS}")
        return self

    def conversation(self) -> list[dict[str, Any]]:
        """The messages as a chat template reads them."""
        return [message.model_dump() for message in self.messages or []]
