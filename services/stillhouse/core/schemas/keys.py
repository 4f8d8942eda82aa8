"""API keys."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field

from stillhouse.core.schemas.base import Answer

KeyScope = Literal["read", "write", "admin"]


class KeyLimits(Answer):
    """Limits of a key. Where one is not given: the deployment's (settings `limit_...`), for administrators none."""

    model_config = ConfigDict(extra="forbid")

    requests_per_minute: float | None = Field(default=None, ge=1, le=1_000_000)
    """Of the key. After a quiet minute so many at once; then they come back evenly."""
    writes_per_minute: float | None = Field(default=None, ge=1, le=1_000_000)
    """The same of requests that may change something (not GET)."""
    active_jobs: int | None = Field(default=None, ge=1, le=1_000_000)
    """Jobs of its owner that have not ended."""
    job_tokens: float | None = Field(default=None, ge=1, le=1e15)
    """Completion tokens that a job may ask for: steps x prompts x group size x max_tokens, over its stages."""
    daily_tokens: float | None = Field(default=None, ge=1, le=1e15)
    """The same, of all jobs that its owner submits in a day (UTC)."""
    file_mib: float | None = Field(default=None, gt=0, le=1e12)
    """Uploaded files of its owner, together."""


class Key(Answer):
    """An API key, without the key itself."""

    object: Literal["key"] = "key"
    name: str
    owner: str
    """Whose jobs and files it makes and sees."""
    scopes: list[KeyScope]
    """What it may do: read; write brings read; admin brings both, and everybody's objects."""
    limits: KeyLimits
    created_at: str


class NewKey(Key):
    """A key that was made just now."""

    key: str
    """The key itself: shown here and never again."""


class KeyInfo(Answer):
    """Who a caller is."""

    object: Literal["key_info"] = "key_info"
    name: str
    """Of the key; empty where authentication is off."""
    owner: str
    scopes: list[KeyScope]
    limits: KeyLimits
    """In force: the key's own, else the deployment's; null = none."""
    usage: dict[str, float] = Field(default_factory=dict)
    """What counts towards them, under the same names."""
