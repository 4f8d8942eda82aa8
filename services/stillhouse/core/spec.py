"""What a user submits: `JobSpec` and its parts. Frozen, closed to unknown keys, every field documented.

The same classes validate the REST body, the YAML file of the CLI and the record a trainer claims. Checks that need the
model registry or the data (does the model exist, does the prompt fit) live in gateway/validation.py.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9._-]{0,63}$")]
"""1-64 letters, digits, dots, dashes or underscores; also used in queue keys, hence no colon or slash."""
Dtype = Literal["float32", "bfloat16"]
SHOWN_MAX = 16
"""Held-out prompts whose completions are kept as text, at most: they lie in the job's record."""


class Closed(BaseModel):
    """Frozen, and a key it does not know is an error rather than a silent typo."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class Message(Closed):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    """Who speaks."""
    content: str = Field(max_length=1_000_000)
    """What is said."""


class Row(Closed):
    """One prompt of the data: a line of the JSONL file."""

    prompt: str | None = Field(default=None, max_length=1_000_000)
    """The user's message. Either this or `messages`."""
    messages: tuple[Message, ...] | None = Field(default=None, min_length=1, max_length=256)
    """A conversation whose last turn is the user's. Either this or `prompt`."""
    teacher: Name | None = None
    """Name of the teacher that scores this row; default: the job's only teacher."""
    teacher_prompt: tuple[Message, ...] | None = Field(default=None, min_length=1, max_length=256)
    """The conversation as the teacher reads it, where it differs from the student's."""
    answer: str | None = None
    """Reference answer, for verifiers."""
    verifier: Name | None = None
    """Name of the verifier that judges the completion."""
    weight: float = Field(default=1.0, ge=0, le=1000)
    """Weight of the row in the loss."""
    completion: str | None = None
    """Completion for off-policy training."""

    @model_validator(mode="after")
    def _one_prompt(self) -> Row:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give exactly one of 'prompt' and 'messages'")
        if self.prompt is not None and not self.prompt.strip():
            raise ValueError("the prompt is empty")
        _check_last("messages", self.messages)
        _check_last("teacher_prompt", self.teacher_prompt)
        return self

    def conversation(self) -> list[dict[str, str]]:
        """The messages as the student's chat template takes them."""
        if self.messages is not None:
            return [m.model_dump() for m in self.messages]
        return [{"role": "user", "content": self.prompt or ""}]


def _check_last(name: str, messages: tuple[Message, ...] | None) -> None:
    if messages is None:
        return
    if messages[-1].role != "user":
        raise ValueError(f"the last message must be the user's, got role '{messages[-1].role}' in '{name}'")
    if not messages[-1].content.strip():
        raise ValueError(f"the last message of '{name}' is empty")


class StudentSpec(Closed):
    """The model that learns."""

    model: Name
    """Registered name of the model (`stillhouse models ls`)."""
    dtype: Dtype = "float32"
    """Element type that trainer and sampler compute in."""


class TeacherSpec(Closed):
    """A frozen model that judges the student's tokens."""

    model: Name
    """Registered name of the model."""
    dtype: Dtype = "float32"
    """Element type it computes in."""
    system_prompt: str | None = Field(default=None, max_length=100_000)
    """System message that only the teacher reads: the student learns to behave as if it had it."""
    weight: float = Field(default=1.0, gt=0, le=1000)
    """Weight of this teacher's samples in the loss."""


class DataSpec(Closed):
    """Where the prompts come from. Exactly one of `file`, `rows`."""

    file: str | None = Field(default=None, pattern=r"^file_[a-z0-9]{8,40}$")
    """Id of an uploaded JSONL file (`POST /v1/files`). In a job file write `path:` instead; the CLI uploads it."""
    rows: tuple[Row, ...] | None = Field(default=None, max_length=10_000)
    """The prompts themselves."""
    shuffle: bool = True
    """New order in every pass over the data, drawn from the job's seed."""

    @model_validator(mode="after")
    def _one_source(self) -> DataSpec:
        if (self.file is None) == (self.rows is None):
            raise ValueError("give exactly one of 'file' and 'rows'")
        if self.rows is not None and not self.rows:
            raise ValueError("no prompts: 'rows' is empty")
        return self


class SamplingSpec(Closed):
    """How the student writes. Student, teacher and sampler log-probabilities are all taken at this temperature."""

    temperature: float = Field(default=1.0, ge=0.05, le=10)
    """Sampling temperature."""
    max_tokens: int = Field(default=256, ge=1, le=32_768)
    """Longest completion, tokens."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling; below 1 samples no longer come from the policy whose log-probabilities are recorded."""
    top_k: int = Field(default=0, ge=0, le=1_000_000)
    """Sample among the k likeliest tokens only; 0 = off."""
    stop_token_ids: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(), max_length=64)
    """Token ids that end a completion, besides the model's own end-of-sequence tokens."""


class PolicyGradientLoss(Closed):
    """Sampled-token reverse KL(student || teacher) as a policy gradient: 4 bytes of teacher signal a token."""

    objective: Literal["policy_gradient"]
    """Selects this loss."""
    advantage_clip: float | None = Field(default=None, gt=0, le=1000)
    """Clip of the per-token advantage log q - log p to +-this, nats; none = no clip."""
    student_term: Literal["trainer", "sampler"] = "trainer"
    """Whose p the advantage compares with the teacher's q: the current weights', or those that sampled."""
    ratio_gate: Literal["none", "is", "tis", "icepop", "seq_mask"] = "none"
    """Weight of tokens since which the policy has moved on, by rho = p(current) / p(sampled). is: rho. tis: rho clamped
    to the band. icepop: rho inside the band, else 0. seq_mask: rho, and 0 for whole sequences outside the band."""
    gate_low: float | None = Field(default=None, ge=0, le=1000)
    """Lower end of the band; none = 0.5, for seq_mask 0.999."""
    gate_high: float | None = Field(default=None, gt=0, le=1000)
    """Upper end of the band; none = 2, for seq_mask 1.002."""
    discount: float = Field(default=0.0, ge=0, le=1)
    """0: each token answers for itself. Above: also for the later tokens of its sequence, discounted."""
    estimator: Literal["advantage", "k2"] = "advantage"
    """advantage: -A log p, A held fixed. k2: half the squared log-ratio, differentiated. Same gradient on average."""
    reduction: Literal["token_mean", "seq_mean_token_mean"] = "token_mean"
    """token_mean: mean over all completion tokens of the step. seq_mean_token_mean: mean of the sequences' means."""

    def band(self) -> tuple[float, float]:
        """Ends of the gate's band."""
        low, high = (0.999, 1.002) if self.ratio_gate == "seq_mask" else (0.5, 2.0)
        return low if self.gate_low is None else self.gate_low, high if self.gate_high is None else self.gate_high

    @model_validator(mode="after")
    def _gate_makes_sense(self) -> PolicyGradientLoss:
        has_band = self.ratio_gate in ("tis", "icepop", "seq_mask")
        if not has_band and (self.gate_low is not None or self.gate_high is not None):
            raise ValueError(f"'gate_low' and 'gate_high' belong to tis, icepop and seq_mask, not to {self.ratio_gate}")
        low, high = self.band()
        if low >= high:
            raise ValueError(f"the band of the ratio gate is empty: gate_low {low:g}, gate_high {high:g}")
        has_advantage = self.advantage_clip is not None or self.discount > 0 or self.student_term != "trainer"
        if self.estimator == "k2" and has_advantage:
            raise ValueError("k2 has no advantage: leave out 'advantage_clip', 'discount' and 'student_term'")
        return self


class FullVocabularyLoss(Closed):
    """Exact KL over the whole vocabulary from the teacher's hidden states: low variance, 2*d bytes a token."""

    objective: Literal["full_vocabulary"]
    """Selects this loss."""
    divergence: Literal["reverse_kl", "forward_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "entropy_mix"] = (
        "reverse_kl"
    )
    """reverse_kl: KL(student || teacher), mode-seeking. forward_kl: KL(teacher || student), mass-covering. jsd: between
    them, by `beta`. skew_forward_kl, skew_reverse_kl: towards a mixture of both, by `alpha`. entropy_mix: reverse_kl,
    plus forward_kl where the teacher is unsure."""
    beta: float = Field(default=0.5, gt=0, lt=1)
    """jsd: share of the teacher in the mixture; near 0 it acts as forward_kl, near 1 as reverse_kl."""
    beta_rescale: bool = False
    """jsd: divide by beta (1 - beta), so that its size is that of the KLs it lies between."""
    alpha: float = Field(default=0.1, gt=0, lt=1)
    """skew_*: share of the other model that is mixed in; 0 would be the plain KL."""
    entropy_threshold: float = Field(default=1.0, ge=0, le=100)
    """entropy_mix: the teacher counts as unsure where its entropy is above this, nats."""
    forward_weight: float = Field(default=1.0, gt=0, le=1000)
    """entropy_mix: weight of the forward KL there."""
    hidden_dtype: Literal["float16", "float32"] = "float16"
    """Element type of the hidden states on the wire."""
    reduction: Literal["token_mean", "seq_mean_token_mean"] = "token_mean"
    """As in policy_gradient."""

    @model_validator(mode="after")
    def _no_idle_knobs(self) -> FullVocabularyLoss:
        for name, divergences in _KNOBS.items():
            is_set = getattr(self, name) != type(self).model_fields[name].default
            if is_set and self.divergence not in divergences:
                raise ValueError(
                    f"'{name}' belongs to {' and '.join(divergences)}, the divergence is {self.divergence}"
                )
        return self


_KNOBS = {
    "beta": ("jsd",),
    "beta_rescale": ("jsd",),
    "alpha": ("skew_forward_kl", "skew_reverse_kl"),
    "entropy_threshold": ("entropy_mix",),
    "forward_weight": ("entropy_mix",),
}
"""Fields that only some divergences read: given with another, they would be ignored in silence."""


class TopKLoss(Closed):
    """KL over the tokens the teacher finds likeliest, with what is outside accounted for: 8*k bytes a token."""

    objective: Literal["top_k"]
    """Selects this loss."""
    divergence: Literal["reverse_kl", "forward_kl"] = "reverse_kl"
    """reverse_kl: KL(student || teacher), mode-seeking. forward_kl: KL(teacher || student), mass-covering."""
    correction: Literal["tail", "generalised"] = "tail"
    """tail: all other tokens are one more bucket. generalised: terms -p + q make the mass on the k tokens right.
    Leaving the rest out, or renormalising over the k tokens, would train towards something else and is not offered."""
    k: int = Field(default=64, ge=1, le=1024)
    """Tokens per position."""
    reduction: Literal["token_mean", "seq_mean_token_mean"] = "token_mean"
    """As in policy_gradient."""


LossSpec = Annotated[PolicyGradientLoss | TopKLoss | FullVocabularyLoss, Field(discriminator="objective")]


class OptimizerSpec(Closed):
    """AdamW and its learning-rate schedule."""

    lr: float = Field(default=1e-5, gt=0, le=1)
    """Peak learning rate."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """Decay rates of the moments."""
    eps: float = Field(default=1e-8, gt=0, le=1)
    """Added to the root of the second moment."""
    weight_decay: float = Field(default=0.0, ge=0, le=1)
    """Decoupled weight decay."""
    warmup_steps: int = Field(default=0, ge=0, le=1_000_000)
    """Steps over which the rate rises linearly from 0."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """Shape after the warm-up, down to `min_lr_ratio` at the last step."""
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    """Rate at the end / peak rate."""
    max_grad_norm: float = Field(default=1.0, gt=0, le=1e6)
    """Gradients are scaled down to this global norm."""


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
    """Padded tokens (prompt + completion) per forward pass, at most."""


class StageSpec(Closed):
    """One phase of training: data, how to sample, what to minimise, for how long."""

    name: Name = "main"
    """Shown in events and metrics."""
    data: DataSpec
    """The prompts."""
    sampling: SamplingSpec = SamplingSpec()
    """How the student writes."""
    loss: LossSpec
    """What is minimised."""
    optimizer: OptimizerSpec = OptimizerSpec()
    """How the weights move."""
    schedule: ScheduleSpec
    """For how long."""

    @model_validator(mode="after")
    def _ratios_are_of_one_distribution(self) -> StageSpec:
        truncates = self.sampling.top_p < 1 or self.sampling.top_k > 0
        if isinstance(self.loss, PolicyGradientLoss) and self.loss.ratio_gate != "none" and truncates:
            raise ValueError(
                f"ratio_gate '{self.loss.ratio_gate}' compares with the policy that sampled, but top_p "
                f"{self.sampling.top_p:g} and top_k {self.sampling.top_k} sample from another; set top_p: 1, top_k: 0"
            )
        return self


class CheckpointSpec(Closed):
    """When training is made durable."""

    every_steps: int = Field(default=50, ge=1, le=1_000_000)
    """A checkpoint at least every so many steps."""
    max_redo_s: float = Field(default=60, ge=1, le=86_400)
    """And at the latest after so many seconds of training, so that a crash costs no more."""
    keep_last: int = Field(default=2, ge=1, le=1000)
    """Older checkpoints are deleted. At least two that verify are always kept."""
    keep_best: int = Field(default=1, ge=0, le=1000)
    """Of the checkpoints that were evaluated, so many with the lowest held-out reverse KL stay, however old."""


class EvaluationSpec(Closed):
    """Held-out measurements before the first step, after the last and in between."""

    data: DataSpec | None = None
    """Held-out prompts; none = no evaluation. They must not be training prompts."""
    num_prompts: int = Field(default=32, ge=1, le=4096)
    """The first so many rows are used."""
    max_tokens: int = Field(default=48, ge=1, le=32_768)
    """Completion length, tokens."""
    every_steps: int = Field(default=0, ge=0, le=1_000_000)
    """Also every so many steps; 0 = only before and after."""
    show: int = Field(default=3, ge=0, le=SHOWN_MAX)
    """The first so many prompts are kept with the student's and the teacher's greedy completions as text."""


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
    init_from: str | None = Field(default=None, pattern=r"^job_[a-z0-9]{8,40}(/ckpt_[a-z0-9-]{1,80})?$")
    """Start from a checkpoint of an earlier job (`job_...` = its newest) instead of the registered weights."""
    teachers: dict[Name, TeacherSpec] = Field(min_length=1, max_length=64)
    """Teachers by name; rows are routed by their `teacher` field."""
    stages: tuple[StageSpec, ...] = Field(min_length=1, max_length=16)
    """Phases, one after the other; one is the usual case."""
    checkpoint: CheckpointSpec = CheckpointSpec()
    """When training is made durable."""
    evaluation: EvaluationSpec = EvaluationSpec()
    """Held-out measurements."""
    samplers: SamplersSpec = SamplersSpec()
    """How many samplers may serve."""
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

    @field_validator("teachers", mode="before")
    @classmethod
    def _has_teacher(cls, teachers: Any) -> Any:
        if teachers == {}:
            raise ValueError("name at least one teacher")
        return teachers

    @model_validator(mode="after")
    def _consistent(self) -> JobSpec:
        if self.samplers.max < self.samplers.min:
            raise ValueError(f"samplers.max {self.samplers.max} is below samplers.min {self.samplers.min}")
        for index, stage in enumerate(self.stages):
            for number, row in enumerate(stage.data.rows or ()):
                where = f"stages.{index}.data.rows.{number}"
                if row.teacher is not None and row.teacher not in self.teachers:
                    raise ValueError(f"{where}: unknown teacher '{row.teacher}'; the job has {sorted(self.teachers)}")
                if row.teacher is None and len(self.teachers) > 1:
                    raise ValueError(f"{where}: name the row's 'teacher', the job has {sorted(self.teachers)}")
        return self

    def stop_step(self) -> int:
        """Optimizer steps of all stages together."""
        return sum(stage.schedule.steps for stage in self.stages)


def json_schema() -> dict[str, Any]:
    """JSON schema of a job, field docs included."""
    return JobSpec.model_json_schema()
