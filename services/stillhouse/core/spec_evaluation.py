"""The part of a job's format about held-out measurements, and what follows from them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from stillhouse.core.spec_base import Closed, Name
from stillhouse.core.spec_data import DataSpec

SHOWN_MAX = 16
"""Held-out prompts whose completions are kept as text, at most: they lie in the job's record."""
SAMPLES_MAX = 256
"""Completions of a held-out prompt, at most: pass@k of larger k is a benchmark's, not a training job's."""
Mode = Literal["min", "max"]
Metric = Annotated[
    str,
    Field(
        pattern=r"^(reverse_kl|accuracy|teacher_nll_greedy|repeated_4grams|mean_length|truncated"
        r"|ended|pass@[1-9][0-9]{0,2})(/[A-Za-z0-9][A-Za-z0-9._-]{0,99})?$"
    ),
]
"""A measure of an evaluation, of all prompts or with `/TEACHER` of its own: reverse_kl, pass@4, accuracy/math."""
LARGER_IS_BETTER = ("accuracy", "pass@", "ended")


class BestSpec(Closed):
    """Which checkpoint is the best."""

    metric: Metric = "reverse_kl"
    """Measure of the held-out evaluations."""
    mode: Mode | None = None
    """min: the lowest is the best. Left out: max for accuracy, pass@k and ended, else min."""


class EarlyStopSpec(Closed):
    """When evaluations end the job before its last step."""

    metric: Metric | None = None
    """Measure that is watched; left out: that of `best`."""
    mode: Mode | None = None
    """As in `best`."""
    when: Literal["plateau", "regression"] = "plateau"
    """plateau: no evaluation is better than the best before it by more than `min_delta`. regression: each is worse than
    that by more than `min_delta`."""
    patience: int = Field(default=3, ge=1, le=1000)
    """For so many evaluations in a row."""
    min_delta: float = Field(default=0.0, ge=0)
    """In the unit of the measure."""


class EvaluationSpec(Closed):
    """Held-out measurements before the first step, after the last and in between."""

    data: DataSpec | None = None
    """Held-out prompts; none = no evaluation. They must not be training prompts."""
    num_prompts: int = Field(default=32, ge=1, le=4096)
    """So many rows are used: the first ones, of each teacher in turn."""
    max_tokens: int = Field(default=48, ge=1, le=32_768)
    """Completion length, tokens."""
    every_steps: int = Field(default=0, ge=0, le=1_000_000)
    """Also every so many steps; 0 = only before and after. Training goes on meanwhile, unless the job is
    deterministic. Each evaluated step gets a checkpoint."""
    samples_per_prompt: int = Field(default=1, ge=1, le=SAMPLES_MAX)
    """Completions sampled of each prompt at temperature 1; the KL, lengths and pass@k are of these."""
    pass_k: tuple[Annotated[int, Field(ge=1, le=SAMPLES_MAX)], ...] = ()
    """pass@k for each of these, at most `samples_per_prompt`, of rows with a verifier. Empty: none for one sample, else
    1 and `samples_per_prompt`."""
    show: int = Field(default=3, ge=0, le=SHOWN_MAX)
    """The first so many prompts are kept with the student's and the teacher's greedy completions as text."""
    verifier: Name | None = None
    """Verifier of held-out rows that name none. Greedy completions of rows with a verifier are judged: `accuracy`."""
    verdict_timeout_s: float = Field(default=10.0, ge=0.1, le=600)
    """Deadline of one verdict; a completion without one in time counts as wrong."""
    best: BestSpec | None = None
    """Left out: the lowest `reverse_kl`, or without teachers the highest `accuracy`."""
    early_stop: EarlyStopSpec | None = None
    """Ends the job early; left out: never. In a job of several stages only evaluations of the last one count."""

    @field_validator("pass_k")
    @classmethod
    def _sorted(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(set(value)))

    def ks(self) -> tuple[int, ...]:
        """The k of pass@k."""
        return self.pass_k or ((1, self.samples_per_prompt) if self.samples_per_prompt > 1 else ())

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
        if self.pass_k and self.pass_k[-1] > self.samples_per_prompt:
            raise ValueError(
                f"pass@{self.pass_k[-1]} needs as many completions of a prompt, samples_per_prompt is "
                f"{self.samples_per_prompt}; raise it"
            )
        if self.early_stop is not None and (self.data is None or self.every_steps == 0):
            raise ValueError("'early_stop' watches evaluations during the job: give 'data' and 'every_steps'")
        wanted = {
            part.metric.partition("/")[0] for part in (self.best, self.early_stop) if part is not None and part.metric
        }
        for name in sorted(name for name in wanted if name.startswith("pass@")):
            if int(name.removeprefix("pass@")) not in self.ks():
                raise ValueError(f"'{name}' is not measured: pass_k has {list(self.ks())}; add it there")
        return self


def mode_of(metric: str, mode: Mode | None) -> Mode:
    """Which way a measure is better."""
    return mode or ("max" if metric.startswith(LARGER_IS_BETTER) else "min")
