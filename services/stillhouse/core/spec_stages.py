"""The part of a job's format about stages: how one moves the weights, how much it trains, which steps it has."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Final, Literal

from pydantic import Field

from stillhouse.core.spec_base import Closed

if TYPE_CHECKING:
    from stillhouse.core.spec import StageSpec

START: Final = "start"
"""No stage is called so: it names the weights that a job begins with."""


class OptimizerSpec(Closed):
    """AdamW and its learning-rate schedule; both begin anew in every stage."""

    lr: float = Field(default=1e-5, gt=0, le=1)
    """Peak learning rate."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """Decay rates of the moments."""
    eps: float = Field(default=1e-8, ge=1e-20, le=1)
    """Added to the root of the second moment."""
    weight_decay: float = Field(default=0.0, ge=0, le=1)
    """Decoupled weight decay."""
    warmup_steps: int = Field(default=0, ge=0, le=1_000_000)
    """Steps over which the rate rises linearly from 0."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """Shape after the warm-up, down to `min_lr_ratio` at the stage's last step."""
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    """Rate at the end / peak rate."""
    max_grad_norm: float = Field(default=1.0, gt=0, le=1e6)
    """Gradients are scaled down to this global norm."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Also keep an exponential moving average of the weights with this decay per step, from the stage's beginning on.
    The last stage's is what gets exported and evaluated at the end. None = the last weights are."""


class ScheduleSpec(Closed):
    """How much is trained, and how far sampling may run ahead."""

    steps: int = Field(ge=1, le=1_000_000)
    """Optimizer steps."""
    prompts_per_step: int = Field(default=16, ge=1, le=4096)
    """Prompt groups consumed by a step."""
    group_size: int = Field(default=1, ge=1, le=256)
    """Completions per prompt."""
    max_staleness: int = Field(default=1, ge=0, le=64)
    """A sample is trained at most this many policy versions after the weights that wrote it. 0 = strictly on-policy."""
    micro_batch_tokens: int = Field(default=4096, ge=16, le=1_000_000)
    """Tokens (prompt + completion, padding included) per forward pass, at most."""
    packing: Literal["auto", "off", "on"] = "auto"
    """on: samples lie one after the other in a forward pass, without padding, where the student's attention keeps them
    apart exactly (checked when it loads). off: sorted by length and padded. auto: on where that is also fast."""


@dataclass(frozen=True, slots=True)
class StageSpan:
    """What of a job a stage has. Steps, policy versions and groups count up through the whole job."""

    index: int
    """Its place among the stages, from 0."""
    stage: StageSpec
    first_step: int
    stop_step: int
    """Its last step + 1."""
    first_group: int

    @property
    def prompts_per_step(self) -> int:
        """P, groups consumed by a step."""
        return self.stage.schedule.prompts_per_step

    @property
    def max_staleness(self) -> int:
        """Policy versions that a trained sample may lie behind."""
        return self.stage.schedule.max_staleness

    def first_group_of(self, step: int) -> int:
        """The first group that `step` consumes; of `stop_step` the next stage's first."""
        return self.first_group + (step - self.first_step) * self.prompts_per_step

    def step_of(self, group: int) -> int:
        """The step that consumes `group`."""
        return self.first_step + (group - self.first_group) // self.prompts_per_step

    def oldest_version(self, step: int) -> int:
        """Oldest weights that may have written what `step` trains on: none from before the stage."""
        return max(self.first_step, step - self.max_staleness)

    def min_policy_version(self, group: int) -> int:
        """Oldest weights that may start `group`."""
        return self.oldest_version(self.step_of(group))

    def order_seed(self, job_seed: int) -> str:
        """What the order of the stage's prompts follows from."""
        return f"{job_seed}/stage/{self.index}" if self.index else str(job_seed)


def spans_of(stages: Iterable[StageSpec]) -> tuple[StageSpan, ...]:
    """Which steps and groups each stage has: one after the other."""
    spans: list[StageSpan] = []
    step = group = 0
    for index, stage in enumerate(stages):
        span = StageSpan(index, stage, step, step + stage.schedule.steps, group)
        spans.append(span)
        step, group = span.stop_step, span.first_group_of(span.stop_step)
    return tuple(spans)


def step_of(group: int, schedules: Iterable[ScheduleSpec]) -> int:
    """The step that consumes `group` in a job of stages with these schedules."""
    first_step = 0
    for schedule in schedules:
        groups = schedule.steps * schedule.prompts_per_step
        if group < groups:
            return first_step + group // schedule.prompts_per_step
        first_step, group = first_step + schedule.steps, group - groups
    return first_step


def check_names(stages: Sequence[StageSpec]) -> None:
    """Refuse stages that cannot be told apart.

    Raises:
        ValueError: names the field and what to do.
    """
    seen: dict[str, int] = {}
    for index, stage in enumerate(stages if len(stages) > 1 else ()):
        if stage.name == START:
            raise ValueError(f"stages.{index}.name: '{START}' is what the job begins with; call the stage otherwise")
        if (other := seen.setdefault(stage.name, index)) != index:
            raise ValueError(f"stages.{index}.name: '{stage.name}' is stage {other}'s, too; give each its own")
