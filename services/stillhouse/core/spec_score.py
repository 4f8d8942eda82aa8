"""What a user asks of `POST /v1/score`: texts, and a registered model that judges every token of them."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import Field, model_validator

from stillhouse.core.spec_base import Closed, Dtype, Name

MAX_ITEMS: Final = 64
"""Texts in a request."""
MAX_TOKENS: Final = 8192
"""Tokens in a request, those that are only read included: the demo's teacher, of 135M parameters, judged 9,215 tokens
in 76 s on two busy CPU cores, and a request has 60 s."""
MAX_TOP_K: Final = 50
"""Alternatives per token."""
MAX_ALTERNATIVES: Final = 16_384
"""Alternatives in an answer, which holds about 40 bytes of each."""
MAX_TEXT: Final = 200_000
"""Characters of a text: more than MAX_TOKENS are in practically every tokenizer, and counting them costs time."""

TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class ScoreItem(Closed):
    """A text to be scored, as text or as token ids, and what the model reads before it."""

    text: str | None = Field(default=None, min_length=1, max_length=MAX_TEXT)
    """What is scored. It is tokenized apart from `prompt`; the names of special tokens in it become these tokens."""
    prompt: str = Field(default="", max_length=MAX_TEXT)
    """What is read before `text`, chat template applied. Without it the first token of `text` is only read."""
    token_ids: list[TokenId] | None = Field(default=None, min_length=1, max_length=MAX_TOKENS)
    """What is scored, in place of `text`."""
    prompt_ids: list[TokenId] = Field(default=[], max_length=MAX_TOKENS)
    """What is read before `token_ids`, in place of `prompt`."""

    @model_validator(mode="after")
    def _one_form(self) -> ScoreItem:
        if (self.text is None) == (self.token_ids is None):
            raise ValueError("give either 'text' or 'token_ids'")
        if self.prompt_ids and self.token_ids is None:
            raise ValueError("'prompt_ids' go with 'token_ids'; with 'text' give 'prompt'")
        if self.prompt and self.text is None:
            raise ValueError("'prompt' goes with 'text'; with 'token_ids' give 'prompt_ids'")
        return self


class ScoreRequest(Closed):
    """Texts to be scored by one model."""

    model: Name
    """Registered name of the model."""
    items: list[ScoreItem] = Field(min_length=1, max_length=MAX_ITEMS)
    """Scored together, answered in order."""
    top_k: int = Field(default=0, ge=0, le=MAX_TOP_K)
    """Likeliest tokens to report at each place; 0 = only the tokens of the text."""
    temperature: float = Field(default=1.0, ge=0.05, le=10)
    """Log-probabilities are log-softmax(logits / temperature)."""
    dtype: Dtype = "float32"
    """Element type the model computes in."""
