"""What a user submits: `JobSpec` and its parts. Frozen, closed to unknown keys, every field documented.

The same classes validate the REST body, the YAML file of the CLI and the record a trainer claims. Checks that need the
model registry or the data (does the model exist, does the prompt fit) live in gateway/validation.py.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from stillhouse.core.recipes import FromRecipe
from stillhouse.core.spec_base import CheckpointName, Closed, Dtype, ModelName, Name
from stillhouse.core.spec_data import (
    DataSpec,
    HorizonSpec,
    Message,
    Row,
    SamplingSpec,
    SelectSpec,
    TemplateArguments,
    TokensSpec,
)
from stillhouse.core.spec_evaluation import BestSpec, EarlyStopSpec, EvaluationSpec
from stillhouse.core.spec_loss import (
    CrossEntropyLoss,
    FullVocabularyLoss,
    LossSpec,
    PolicyGradientLoss,
    Reduced,
    RewardSpec,
    TopKLoss,
)
from stillhouse.core.spec_stages import OptimizerSpec, ScheduleSpec, StageSpan, check_names, spans_of
from stillhouse.core.spec_teacher import EmaSpec, check_followers, check_stage_references
from stillhouse.core.spec_trackers import Tracked

__all__ = [  # the whole format, from one module
    "BestSpec",
    "CheckpointSpec",
    "Closed",
    "CrossEntropyLoss",
    "DataSpec",
    "Dtype",
    "EarlyStopSpec",
    "EmaSpec",
    "EvaluationSpec",
    "FullVocabularyLoss",
    "HorizonSpec",
    "JobSpec",
    "LoraSpec",
    "LossSpec",
    "Message",
    "Name",
    "OptimizerSpec",
    "PolicyGradientLoss",
    "Reduced",
    "RewardSpec",
    "Row",
    "SamplersSpec",
    "SamplingSpec",
    "ScheduleSpec",
    "SelectSpec",
    "StageSpan",
    "StageSpec",
    "StudentSpec",
    "TeacherSpec",
    "TokensSpec",
    "TopKLoss",
    "json_schema",
]


class LoraSpec(Closed):
    """Low-rank adapters: weight + (alpha / rank) B A, where only A and B learn (arXiv:2106.09685)."""

    rank: int = Field(default=32, ge=1, le=4096)
    """Rows of A."""
    alpha: float = Field(default=64, gt=0, le=65_536)
    """The adapter is scaled by alpha / rank."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Names of the layers that get one; all-linear: every linear layer but the output head."""


class StudentSpec(Closed):
    """The model that learns."""

    model: Name
    """Registered name of the model (`stillhouse models ls`)."""
    dtype: Dtype = "float32"
    """Element type that trainer and sampler compute in; the optimizer always moves float32 weights."""
    lora: LoraSpec | None = None
    """Train a low-rank adapter instead of all weights; none = all weights."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, a third more time."""


class TeacherSpec(Closed):
    """A model that judges the student's tokens; frozen, unless it follows the student."""

    model: ModelName
    """Registered name of the model; or `job_ID/ckpt_...`, a checkpoint of a job (`job_ID` = its newest); or
    `stage/NAME`, the job's own student at the end of its earlier stage NAME (`stage/start` = as the job began)."""
    dtype: Dtype = "float32"
    """Element type it computes in."""
    system_prompt: str | None = Field(default=None, max_length=100_000)
    """System message that only the teacher reads: the student learns to behave as if it had it."""
    chat_template_kwargs: TemplateArguments = Field(default_factory=dict)
    """Arguments of the chat template where this teacher reads; they win over those of data and row."""
    weight: float = Field(default=1.0, gt=0, le=1000)
    """Weight of this teacher's samples in the loss."""
    ema_of_student: EmaSpec | None = None
    """Not the registered weights but a moving average of the student's; `model` and `dtype` are then the student's."""


class StageSpec(FromRecipe):
    """One phase of training: data, how to sample, what to minimise, for how long."""

    name: Name = "main"
    """Shown in events and metrics; of several stages each has its own."""
    data: DataSpec
    """The prompts."""
    sampling: SamplingSpec = SamplingSpec()
    """How the student writes."""
    on_policy_fraction: float = Field(default=1.0, ge=0, le=1)
    """Share of the prompt groups that the student answers itself (lambda of GKD, arXiv:2306.13649); 1 = on-policy.
    Which ones follows from the job's seed."""
    off_policy_source: Literal["data", "teacher"] = "data"
    """Whose completions the others train on: the rows' `completion`, or texts that the row's teacher writes, sampled
    as the stage says. Rows may have a `completion` that is not used."""
    tokens: TokensSpec = TokensSpec()
    """Which tokens of a completion train."""
    loss: LossSpec
    """What is minimised."""
    optimizer: OptimizerSpec = OptimizerSpec()
    """How the weights move."""
    schedule: ScheduleSpec
    """For how long."""

    @model_validator(mode="after")
    def _draws_suit_the_loss(self) -> StageSpec:
        """What holds on average over the whole distribution only is refused where samples come from part of it."""
        filters = self.sampling.filters()
        reason = self.loss.needs_whole_distribution() if isinstance(self.loss, PolicyGradientLoss) else ""
        if filters and reason:
            raise ValueError(f"{reason}, but {filters} samples from another; set top_p: 1, top_k: 0, min_p: 0")
        return self

    @model_validator(mode="after")
    def _prefixes_suit_the_loss(self) -> StageSpec:
        """Whose texts an objective can be taken on."""
        share = self.on_policy_fraction
        if isinstance(self.loss, CrossEntropyLoss) and share > 0:
            raise ValueError(
                "cross_entropy on the student's own samples has zero gradient on average; set on_policy_fraction to 0, "
                f"it is {share:g}"
            )
        if share < 1:
            if isinstance(self.loss, PolicyGradientLoss):
                raise ValueError(
                    "policy_gradient is taken over the student's own tokens; set on_policy_fraction to 1 (it is "
                    f"{share:g}), or use full_vocabulary or top_k"
                )
            if isinstance(self.loss, FullVocabularyLoss) and self.loss.divergence == "k2":
                raise ValueError(
                    "divergence k2 is taken over the student's own tokens; set on_policy_fraction to 1 (it is "
                    f"{share:g}), or use another divergence"
                )
            if isinstance(self.loss, TopKLoss) and self.loss.support != "teacher":
                raise ValueError(
                    f"support '{self.loss.support}' is recorded when the student samples; set on_policy_fraction to 1 "
                    f"(it is {share:g}), or use support: teacher"
                )
            if self.tokens.select is not None:
                raise ValueError(
                    "'tokens.select' rests on what the student said when it sampled; set on_policy_fraction to 1"
                )
        return self

    @model_validator(mode="after")
    def _something_to_select_by(self) -> StageSpec:
        select = self.tokens.select
        if select is not None and self.loss.crosses_tokenizers():
            raise ValueError(
                "'tokens.select' takes single tokens, and with 'cross_tokenizer' only whole spans of text train: leave "
                "out one of the two"
            )
        if select is not None and select.by == "kl" and self.loss.payload() == "none":
            raise ValueError(
                "'tokens.select' by kl compares with what a teacher says, and this loss asks none; select by entropy"
            )
        return self

    @model_validator(mode="after")
    def _source_is_used(self) -> StageSpec:
        """The source of given texts, and how many of them there are."""
        if self.on_policy_fraction == 1:
            if self.off_policy_source != "data":
                raise ValueError(
                    f"'off_policy_source' {self.off_policy_source} is never read at on_policy_fraction 1; lower it, or "
                    "leave out the source"
                )
        elif self.off_policy_source == "data" and self.schedule.group_size > 1:
            raise ValueError(
                f"a row has one completion, and schedule.group_size {self.schedule.group_size} would train on copies "
                "of it; set it to 1, or off_policy_source to teacher"
            )
        if self.on_policy_fraction == 0 and self.off_policy_source == "data":
            default = SamplingSpec()  # by value: a stored job has all fields set
            knobs = ("top_p", "top_k", "min_p", "stop", "stop_token_ids")
            idle = [name for name in knobs if getattr(self.sampling, name) != getattr(default, name)]
            if idle:
                raise ValueError(f"nothing is sampled: leave out sampling.{idle[0]}, all texts are the data's")
        return self

    @model_validator(mode="after")
    def _reward_has_groups(self) -> StageSpec:
        reward = self.loss.reward if isinstance(self.loss, PolicyGradientLoss) else None
        if reward is not None and self.schedule.group_size < 2:
            raise ValueError(
                "an outcome reward is compared within the completions of a prompt; schedule.group_size is "
                f"{self.schedule.group_size}, set it to 2 at least"
            )
        return self

    def reads_completions(self) -> bool:
        """Rows need a `completion`."""
        return self.on_policy_fraction < 1 and self.off_policy_source == "data"

    def asks_teachers(self) -> bool:
        """Teacher services have to be there for scores."""
        return self.loss.payload() != "none"

    def asks_samplers(self) -> bool:
        """Something has to be written: by the student, or by a teacher that a sampler runs."""
        return self.on_policy_fraction > 0 or self.off_policy_source == "teacher"

    def needs_teacher(self) -> bool:
        """False: nothing of a teacher enters the loss or the texts."""
        if isinstance(self.loss, CrossEntropyLoss):
            return self.off_policy_source == "teacher"
        return not (isinstance(self.loss, PolicyGradientLoss) and self.loss.teacher_weight == 0)


class CheckpointSpec(Closed):
    """When training is made durable."""

    every_steps: int = Field(default=50, ge=1, le=1_000_000)
    """A checkpoint at least every so many steps."""
    max_redo_s: float = Field(default=60, ge=1, le=86_400)
    """And at the latest after so many seconds of training, so that a crash costs no more."""
    keep_last: int = Field(default=2, ge=1, le=1000)
    """Older checkpoints are deleted. At least two that verify are always kept."""
    keep_best: int = Field(default=1, ge=0, le=1000)
    """Of the checkpoints that were evaluated, so many of the best (`evaluation.best`) stay, however old."""
    export: Literal["last", "best"] = "last"
    """The student that the job gives: that of its last step, or its best checkpoint by held-out evaluation."""

    @model_validator(mode="after")
    def _keeps_what_it_exports(self) -> CheckpointSpec:
        if self.export == "best" and self.keep_best == 0:
            raise ValueError("'export' best needs the best checkpoint: set 'keep_best' to 1 or more")
        return self


class SamplersSpec(Closed):
    """How many sampler processes may serve the job."""

    min: int = Field(default=1, ge=1, le=1024)
    """The job starts when so many are there."""
    max: int = Field(default=64, ge=1, le=1024)
    """And takes no more than so many."""


class JobSpec(Closed):
    """A distillation job."""

    schema_version: Literal[1] = 1
    """Version of this format."""
    name: str = Field(default="", max_length=200)
    """Free text for people."""
    student: StudentSpec
    """The model that learns."""
    init_from: CheckpointName | None = None
    """Start with the weights of a checkpoint, `job_ID/ckpt_...` (`job_ID` = its newest), instead of the registered ones
    of `student.model`."""
    stages: tuple[StageSpec, ...] = Field(min_length=1, max_length=16)
    """Phases, one after the other; one is the usual case."""
    teachers: dict[Name, TeacherSpec] = Field(default_factory=dict, max_length=64, validate_default=True)
    """Teachers by name; rows are routed by their `teacher` field. Only jobs whose losses use none may leave it out."""
    checkpoint: CheckpointSpec = CheckpointSpec()
    """When training is made durable."""
    evaluation: EvaluationSpec = EvaluationSpec()
    """Held-out measurements."""
    trackers: tuple[Tracked, ...] = Field(default=(), max_length=8)
    """Experiment trackers that get the metrics, too: tensorboard, wandb, trackio, mlflow, or with options
    `{kind: wandb, project: mine}`. metrics.jsonl is always written."""
    samplers: SamplersSpec = SamplersSpec()
    """How many samplers may serve."""
    priority: int = Field(default=0, ge=-100, le=100)
    """Jobs with a higher one begin first and get more samplers; see docs/jobs.md."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Every random choice of the job follows from it."""
    deterministic: bool = False
    """A run with crashes equals one without, bit for bit; slower."""
    max_failed_fraction: float = Field(default=0.1, ge=0, le=1)
    """The job fails when more than this share of its samples so far could not be sampled or scored."""
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] = Field(
        default_factory=dict, max_length=16
    )
    """Up to 16 pairs of your own."""

    @field_validator("teachers")
    @classmethod
    def _enough(cls, teachers: dict[str, TeacherSpec], info: ValidationInfo) -> dict[str, TeacherSpec]:
        if "mean" in teachers:
            raise ValueError("no teacher can be called 'mean': the metric loss/reverse_kl/mean is of all of them")
        learning = [stage for stage in info.data.get("stages", ()) if stage.needs_teacher()]
        if learning and not teachers:
            raise ValueError(f"name at least one teacher: stage '{learning[0].name}' learns from it")
        return teachers

    @field_validator("evaluation")
    @classmethod
    def _measures_something(cls, evaluation: EvaluationSpec, info: ValidationInfo) -> EvaluationSpec:
        if evaluation.data is not None and info.data.get("teachers") == {} and evaluation.verifier is None:
            raise ValueError(
                "held-out evaluation measures the KL to a teacher, or without one the accuracy: name a teacher, or "
                "evaluation.verifier, or leave out evaluation.data"
            )
        return evaluation

    @model_validator(mode="after")
    def _consistent(self) -> JobSpec:
        if self.samplers.max < self.samplers.min:
            raise ValueError(f"samplers.max {self.samplers.max} is below samplers.min {self.samplers.min}")
        check_names(self.stages)
        for index, stage in enumerate(self.stages):
            for number, row in enumerate(stage.data.rows or ()):
                where = f"stages.{index}.data.rows.{number}"
                mixture = row.mixture(self.teachers)
                if unknown := sorted(mixture.keys() - self.teachers.keys()):
                    raise ValueError(f"{where}: unknown teacher '{unknown[0]}'; the job has {sorted(self.teachers)}")
                if not mixture and self.teachers:
                    raise ValueError(f"{where}: name the row's 'teacher', the job has {sorted(self.teachers)}")
        self._check_measures()
        check_followers(self)
        check_stage_references(self)
        return self

    def _check_measures(self) -> None:
        """What checkpoints are compared by is measured."""
        if self.checkpoint.export == "best" and self.evaluation.data is None:
            raise ValueError("'checkpoint.export' best needs held-out measurements: give 'evaluation.data'")
        for part in (self.evaluation.best, self.evaluation.early_stop):
            name, _, teacher = (part.metric or "").partition("/") if part is not None else ("", "", "")
            if teacher and teacher not in self.teachers:
                raise ValueError(f"evaluation: '{name}' of teacher '{teacher}', the job has {sorted(self.teachers)}")
            if name in ("reverse_kl", "teacher_nll_greedy") and not self.teachers:
                raise ValueError(f"evaluation: '{name}' is measured against a teacher, and the job has none")

    def ema_of_student(self) -> EmaSpec | None:
        """The average that teachers follow; None = all are frozen."""
        return next((teacher.ema_of_student for teacher in self.teachers.values() if teacher.ema_of_student), None)

    def asks_teachers(self) -> bool:
        """Teacher services have to be there: for scores, or for held-out measurements."""
        return self.measures_kl() or any(stage.asks_teachers() for stage in self.stages)

    def measures_kl(self) -> bool:
        """Held-out completions are scored by teachers; without any they are only judged."""
        return self.evaluation.data is not None and bool(self.teachers)

    def asks_samplers(self) -> bool:
        """Something has to be written, for training or for held-out measurements."""
        return self.evaluation.data is not None or any(stage.asks_samplers() for stage in self.stages)

    def crosses_tokenizers(self) -> bool:
        """Teachers may have another tokenizer: every stage that learns from one compares texts."""
        learning = [stage for stage in self.stages if stage.needs_teacher()]
        return bool(learning) and all(stage.loss.crosses_tokenizers() for stage in learning)

    def spans(self) -> tuple[StageSpan, ...]:
        """Which steps and groups each stage has."""
        return spans_of(self.stages)

    def span_at(self, step: int) -> StageSpan:
        """The stage that trains `step`; after the end the last one."""
        spans = self.spans()
        return next((span for span in spans if step < span.stop_step), spans[-1])

    def lag(self, step: int) -> int:
        """Steps that a claim which goes on at `step` has to begin before it, at least: a deterministic job needs the
        weights of older versions again, and a replay gives them."""
        return step - self.span_at(step).oldest_version(step) if self.deterministic else 0

    def stop_step(self) -> int:
        """Optimizer steps of all stages together."""
        return sum(stage.schedule.steps for stage in self.stages)


def json_schema() -> dict[str, Any]:
    """JSON schema of a job, field docs included."""
    return JobSpec.model_json_schema()
