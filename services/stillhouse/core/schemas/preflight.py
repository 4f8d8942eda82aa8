"""What is known of a job before it trains."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, Literal

from pydantic import Field

from stillhouse.core.schemas.base import Answer

Verdict = Literal["ok", "warning", "error", "skipped"]
SEVERITY: Final[dict[str, int]] = {"skipped": 0, "ok": 0, "warning": 1, "error": 2}


class Check(Answer):
    """One thing that was looked at. What is wrong in several places comes several times under one name."""

    name: str
    """What was looked at: tokenizers, memory, initial_kl ..."""
    verdict: Verdict
    """error = the job is refused; warning = it runs, but hardly means this; skipped = could not be looked at."""
    message: str
    """What was found, with both sides."""
    evidence: dict[str, Any] = Field(default_factory=dict)
    """The figures behind it: what was compared, where the first difference is."""
    fix: str = ""
    """What to do about it; empty where nothing is to be done."""
    param: str | None = None
    """Path of the field, for example teachers.main.model."""


class Tokens(Answer):
    """A number of tokens over the whole job."""

    at_most: int
    """If every completion is as long as it may be."""
    expected: int | None = None
    """With completions as long as the probes were; null = none were written."""


class Estimate(Answer):
    """What the job will cost, held-out evaluation included."""

    sampled_tokens: Tokens
    """Written by the samplers."""
    scored_tokens: Tokens
    """Completion tokens read by the teachers; twice where two teachers judge."""
    trained_tokens: Tokens
    """Completion tokens that the loss sees."""
    bytes: dict[str, int]
    """scores = answers of teachers, at most; weights = published to each sampler; checkpoints = on disk at the end."""
    seconds: float | None = None
    """Time of the steps at the speed of the probes; null = nothing was measured."""


class Preflight(Answer):
    """All checks of a job."""

    object: Literal["preflight"] = "preflight"
    is_live: bool
    """Models were loaded and probed; false = only what hashes, configurations and rows say."""
    verdict: Literal["ok", "warning", "error"]
    """The worst of the checks."""
    checks: list[Check]
    estimate: Estimate | None = None
    """null = a check that failed leaves nothing to count."""


def worst(checks: Iterable[Check]) -> Literal["ok", "warning", "error"]:
    """The verdict of a report."""
    highest = max((SEVERITY[check.verdict] for check in checks), default=0)
    return ("ok", "warning", "error")[highest]
