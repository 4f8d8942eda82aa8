"""What the REST interface answers, as pydantic models: the source of the OpenAPI document. Times are RFC 3339, UTC."""

from __future__ import annotations

from typing import Annotated, Any, Generic, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field

T = TypeVar("T")
Status = Literal[
    "queued", "validating", "starting", "running", "cancelling", "stalled", "succeeded", "failed", "cancelled"
]
"""core/queue/jobs.py's STATUSES, for type checkers and the OpenAPI document."""
JobId = Annotated[str, Field(pattern=r"^job_[a-z0-9]{8,40}$", max_length=44)]


class Answer(BaseModel):
    """Base of all answers."""

    model_config = ConfigDict(use_attribute_docstrings=True, protected_namespaces=())


class Page(Answer, Generic[T]):
    """One page of a list."""

    object: Literal["list"] = "list"
    data: list[T]
    has_more: bool = False
    """There are more: ask again with `after` = the last id of this page."""


class Progress(Answer):
    """How far a job is. The trainer may add fields."""

    model_config = ConfigDict(extra="allow")

    step: int
    """Optimizer steps trained."""
    total_steps: int
    percent: float
    eta_s: float | None = None
    """Expected time to the end, seconds."""
    phase: str = ""
    """What it is doing: sampling, scoring, training ..."""
    stage: str = ""
    """Name of the stage that is on."""
    bottleneck: str = ""
    """The service that the others wait for."""


class Job(Answer):
    """A distillation job."""

    id: str
    object: Literal["job"] = "job"
    name: str
    status: str = Field(json_schema_extra={"enum": list(get_args(Status))})
    is_terminal: bool
    """The status will not change any more."""
    status_reason: str
    """Why it has this status, for programs; may be empty."""
    status_message: str
    """Why it has this status, for people; may be empty."""
    spec: dict[str, Any]
    """As accepted, defaults filled in. In lists without the inline rows."""
    created_at: str
    started_at: str | None
    finished_at: str | None
    progress: Progress
    usage: dict[str, Any]
    error: dict[str, Any] | None
    """code, message and where it happened, when the job failed."""
    result: dict[str, Any] | None
    epoch: int
    """Claims so far: more than 1 means that a trainer took the job over from another."""
    policy_version: int
    """Optimizer steps behind the newest published weights."""
    trainer: str
    """Process that leads or led the job."""
    metadata: dict[str, str]


class Event(Answer):
    """Something that happened to a job."""

    id: str
    """Position in the job's history; give it as `after` or Last-Event-ID to continue."""
    object: Literal["event"] = "event"
    type: str
    level: str
    message: str
    data: dict[str, Any]
    created_at: str


class MetricPoint(Answer):
    """The metrics of one optimizer step."""

    object: Literal["metrics"] = "metrics"
    epoch: int
    step: int
    stage: str = ""
    """Name of the stage that trained the step."""
    created_at: str
    values: dict[str, float | None]
    """null = not a finite number."""


class Checkpoint(Answer):
    """Committed weights of a job."""

    id: str
    object: Literal["checkpoint"] = "checkpoint"
    job_id: str
    kind: Literal["checkpoint", "export"]
    """checkpoint: state to continue from. export: the finished student as a model folder."""
    step: int
    stage: str = ""
    """Name of the stage that trained its last step."""
    epoch: int
    policy_version: int
    created_at: str
    size_bytes: int
    sha256: str
    """sha256 of its manifest; empty for the export."""


class DeadLetter(Answer):
    """A sample that could not be sampled or scored."""

    id: str
    """The sample: group/index."""
    object: Literal["dead_letter"] = "dead_letter"
    step: int | None
    """Optimizer step that goes on without it; null for samples of an evaluation."""
    epoch: int
    row: int
    """Row of the data, from 0."""
    teacher: str
    reason: str
    """Short code, for programs."""
    message: str
    service: str
    """Who gave up: sampler, teacher or trainer."""
    attempts: int
    is_journalled: bool
    """For good; else its step is still being collected."""


class File(Answer):
    """An uploaded file of prompts."""

    id: str
    object: Literal["file"] = "file"
    num_rows: int
    sha256: str
    size_bytes: int
    created_at: str


class Model(Answer):
    """A model that jobs may name."""

    id: str
    object: Literal["model"] = "model"
    sha256: str
    tokenizer_sha256: str
    """Student and teachers of a job must have the same."""
    architecture: str
    vocab_size: int
    max_sequence_length: int
    """Longest sequence, tokens."""
    hidden_size: int
    num_layers: int
    num_parameters: int
    size_bytes: int
    has_chat_template: bool


class ScoreError(Answer):
    """Why a text has no score."""

    code: str
    """Short, for programs: non_finite, teacher_error."""
    message: str


class TextScore(Answer):
    """A text, scored. Numbers are nats; null = minus infinity, a token that the model forbids."""

    index: int
    """Of the item in the request."""
    num_prompt_tokens: int
    """Tokens that were only read."""
    num_tokens: int
    """Tokens that are scored; the lists below have so many entries."""
    token_ids: list[int]
    tokens: list[str]
    """Each token as text by itself; what is no text alone shows as U+FFFD."""
    logprobs: list[float | None] = []
    """Of each token, given all before it."""
    logprob: float | None = None
    """Their sum."""
    perplexity: float | None = None
    """exp(-mean of the log-probabilities)."""
    top_token_ids: list[list[int]] | None = None
    """[tokens][top_k] likeliest tokens at each place, likeliest first; null unless asked for."""
    top_tokens: list[list[str]] | None = None
    top_logprobs: list[list[float | None]] | None = None
    rest_logprobs: list[float | None] | None = None
    """Of all other tokens together at each place; null = nothing is left for them."""
    error: ScoreError | None = None
    """Why this text has no score; the others of the request may have theirs."""


class ScoreUsage(Answer):
    """What a request cost."""

    prompt_tokens: int
    scored_tokens: int


class Scores(Answer):
    """Texts, scored by one model."""

    object: Literal["scores"] = "scores"
    model: str
    model_sha256: str
    """The very weights that scored."""
    temperature: float
    teacher: str
    """Process that scored."""
    data: list[TextScore]
    """In the order of the request's items."""
    usage: ScoreUsage


class Verifier(Answer):
    """What judges completions for outcome rewards; rows name it. Trainers must have it installed, too."""

    id: str
    object: Literal["verifier"] = "verifier"
    about: str
    """What it rewards, for people."""
    needs_answer: bool
    """Rows must have an `answer`."""
    source: str
    """`built in`, or the package that brings it, with its version."""
    problem: str
    """Why it cannot be used; empty = nothing is known against it."""


class RecipePreset(Answer):
    """What a recipe gives one stage."""

    id: str
    """What `recipe` of a stage says."""
    about: str
    """What happens in the stage."""
    stage: dict[str, Any]
    """The values as part of a stage."""
    values: dict[str, dict[str, Any]]
    """By path in the stage: {value, source}; a source that begins with `ours:` is no publication."""
    variations: list[dict[str, Any]]
    """Other forms: {about, stage, rows}."""
    rows: list[dict[str, Any]]
    """Rows of the kind it trains on."""
    mix: dict[str, Any] | None
    """Shares of its teachers' prompts: {shares, source}; null = as the rows come."""


class Recipe(Answer):
    """A published method, or a baseline, as presets for stages."""

    id: str
    object: Literal["recipe"] = "recipe"
    title: str
    problem: str
    """What it is for."""
    sends: str
    """What teachers send and what is stored, in bytes a token."""
    when: str
    """When to choose it."""
    paper: str
    """What its source does, and reports."""
    ours: str
    """What the presets do."""
    differences: list[str]
    """What differs, and why."""
    sources: list[str]
    is_baseline: bool
    presets: list[RecipePreset]


class Service(Answer):
    """A live process."""

    object: Literal["service"] = "service"
    role: str
    instance: str
    address: str
    metrics_address: str
    pid: int
    version: str
    state: str
    job_id: str
    started_at: str
    seen_at: str
    extra: dict[str, str]


class Health(Answer):
    """The process is alive."""

    status: str
    version: str
