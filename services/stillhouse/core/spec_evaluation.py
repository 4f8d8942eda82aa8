"""The part of a job's format about held-out measurements."""

from __future__ import annotations

from pydantic import Field, model_validator

from stillhouse.core.spec_base import Closed, Name
from stillhouse.core.spec_data import DataSpec

SHOWN_MAX = 16
"""Held-out prompts whose completions are kept as text, at most: they lie in the job's record."""


class EvaluationSpec(Closed):
    """Held-out measurements before the first step, after the last and in between."""

    data: DataSpec | None = None
    """Held-out prompts; none = no evaluation. They must not be training prompts."""
    num_prompts: int = Field(default=32, ge=1, le=4096)
    """So many rows are used: the first ones, of each teacher in turn."""
    max_tokens: int = Field(default=48, ge=1, le=32_768)
    """Completion length, tokens."""
    every_steps: int = Field(default=0, ge=0, le=1_000_000)
    """Also every so many steps; 0 = only before and after."""
    show: int = Field(default=3, ge=0, le=SHOWN_MAX)
    """The first so many prompts are kept with the student's and the teacher's greedy completions as text."""
    verifier: Name | None = None
    """Verifier of held-out rows that name none. Greedy completions of rows with a verifier are judged: `accuracy`."""
    verdict_timeout_s: float = Field(default=10.0, ge=0.1, le=600)
    """Deadline of one verdict; a completion without one in time counts as wrong."""

    @model_validator(mode="after")
    def _reads_what_is_given(self) -> EvaluationSpec:
        if self.verifier is not None and self.data is None:
            raise ValueError(
                f"'verifier' {self.verifier} judges held-out completions, and there is no 'data'; give both"
            )
        if self.data is not None and self.data.mix is not None:
            raise ValueError(
                "'data.mix' is of training: held-out prompts are the first num_prompts rows, of each teacher in turn; "
                "leave it out"
            )
        return self
