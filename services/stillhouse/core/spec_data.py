"""The part of a job's format that says what the student reads and writes: rows, data, sampling, which tokens train."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, field_validator, model_validator

from stillhouse.core.spec_base import Closed, Name

OUR_ARGUMENTS: Final = frozenset(
    (
        *("conversation", "conversations", "messages", "tools", "documents", "chat_template"),
        *("add_generation_prompt", "continue_final_message", "tokenize", "padding", "truncation"),
        *("max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
        *("tokenizer_kwargs", "processor_kwargs"),
    )
)
"""What we, or the code that applies a template, pass or mean ourselves."""


def _are_theirs(arguments: dict[str, Any]) -> dict[str, Any]:
    if ours := sorted(arguments.keys() & OUR_ARGUMENTS):
        raise ValueError(f"'{ours[0]}' is not the template's: leave it out")
    return arguments


TemplateArguments = Annotated[
    dict[
        Annotated[str, Field(pattern=r"^[a-zA-Z_][a-zA-Z0-9_]{0,63}$")],
        bool | int | float | Annotated[str, Field(max_length=1000)] | None,
    ],
    Field(max_length=16),
    AfterValidator(_are_theirs),
]
"""Arguments of a chat template by name."""


Mixture = Annotated[dict[Name, Annotated[float, Field(gt=0, le=1000)]], Field(min_length=2, max_length=64)]
"""Teachers that judge one sample together, with their weights in its loss."""


def _one_or_several(value: Any) -> str:
    return "mixture" if isinstance(value, dict) else "name"


Judges = Annotated[Annotated[Name, Tag("name")] | Annotated[Mixture, Tag("mixture")], Discriminator(_one_or_several)]
"""A teacher's name, or a mixture."""


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
    teacher: Judges | None = None
    """Name of the teacher that scores this row; default: the job's only teacher. Or several with their weights,
    `{math: 0.7, general: 0.3}`: each scores the same completion, and the loss is the sum of weight times loss."""
    teacher_prompt: tuple[Message, ...] | None = Field(default=None, min_length=1, max_length=256)
    """The whole conversation as the teacher reads it, where it differs from the student's; a `system_prompt` of the
    teacher is not added."""
    answer: str | None = None
    """Reference answer, for verifiers."""
    verifier: Name | None = None
    """Name of the verifier that judges the completion."""
    weight: float = Field(default=1.0, ge=0, le=1000)
    """Weight of the row in the loss."""
    completion: str | None = None
    """Completion for off-policy training."""
    chat_template_kwargs: TemplateArguments = Field(default_factory=dict)
    """Arguments of the chat template for this row; they win over those of the data."""

    @model_validator(mode="before")
    @classmethod
    def _answer_is_completion(cls, value: Any) -> Any:
        """OpenAI's chat format: a last turn of the assistant is the row's `completion`."""
        messages = value.get("messages") if isinstance(value, dict) and "completion" not in value else None
        if not isinstance(messages, (list, tuple)) or len(messages) < 2 or not isinstance(messages[-1], dict):
            return value
        last = messages[-1]
        if last.get("role") != "assistant" or set(last) != {"role", "content"}:
            return value
        return {**value, "messages": messages[:-1], "completion": last["content"]}

    @model_validator(mode="after")
    def _one_prompt(self) -> Row:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give exactly one of 'prompt' and 'messages'")
        if self.prompt is not None and not self.prompt.strip():
            raise ValueError("the prompt is empty")
        _check_last("messages", self.messages)
        _check_last("teacher_prompt", self.teacher_prompt)
        return self

    def mixture(self, teachers: Collection[str]) -> dict[str, float]:
        """The row's teachers and their weights, the heaviest first, of equals by name; a row that names none has the
        only one of the job's `teachers`. Empty = there is none, or no telling which."""
        if isinstance(self.teacher, dict):
            return dict(sorted(self.teacher.items(), key=lambda item: (-item[1], item[0])))
        names = [self.teacher] if self.teacher is not None else list(teachers)
        return {names[0]: 1.0} if len(names) == 1 else {}

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


class DataSpec(Closed):
    """Where the prompts come from. Exactly one of `file`, `rows`."""

    file: str | None = Field(default=None, pattern=r"^file_[a-z0-9]{8,40}$")
    """Id of an uploaded JSONL file (`POST /v1/files`). In a job file write `path:` instead; the CLI uploads it."""
    rows: tuple[Row, ...] | None = Field(default=None, max_length=10_000)
    """The prompts themselves."""
    shuffle: bool = True
    """New order in every pass over the data, drawn from the job's seed."""
    mix: dict[Name, Annotated[float, Field(gt=0, le=1000)]] | None = Field(default=None, min_length=1, max_length=64)
    """Which share of the prompts goes to which teacher, in any unit: `{math: 2, code: 1}` takes two of three from the
    rows of `math`. Each teacher's rows then have passes of their own. None = rows as they come."""
    chat_template_kwargs: TemplateArguments = Field(default_factory=dict)
    """Arguments of the chat template for all rows, for example `{enable_thinking: false}`."""

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
    """Sampling temperature. Greedy texts (0) are written by the held-out evaluation only."""
    max_tokens: int = Field(default=256, ge=1, le=32_768)
    """Longest completion, tokens."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling; below 1 samples no longer come from the policy whose log-probabilities are recorded."""
    top_k: int = Field(default=0, ge=0, le=1_000_000)
    """Sample among the k likeliest tokens only; 0 = off."""
    min_p: float = Field(default=0.0, ge=0, lt=1)
    """Sample only tokens at least this many times as likely as the likeliest; 0 = off."""
    stop: tuple[Annotated[str, Field(min_length=1, max_length=256)], ...] = Field(default=(), max_length=16)
    """Texts that end a completion: it ends with the token that completes one. Special tokens count as text."""
    stop_token_ids: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(), max_length=64)
    """Token ids that end a completion, besides the model's own end-of-sequence tokens."""

    @field_validator("temperature", mode="before")
    @classmethod
    def _is_no_point(cls, value: Any) -> Any:
        if value == 0:
            raise ValueError(
                "0 is greedy: there is no distribution to take a divergence of, and every completion of a prompt would "
                "be the same; use 0.05 or more (held-out evaluation writes greedy texts, too)"
            )
        return value

    @field_validator("stop")
    @classmethod
    def _are_texts(cls, stop: tuple[str, ...]) -> tuple[str, ...]:
        for text in stop:
            if "\ufffd" in text:
                raise ValueError(f"{text!r} has the character that stands for bytes that are no text; leave it out")
        return stop

    def filters(self) -> str:
        """What keeps tokens from being drawn, in words; "" = samples come from the whole distribution."""
        values = {"top_p": (self.top_p, 1), "top_k": (self.top_k, 0), "min_p": (self.min_p, 0)}
        return ", ".join(f"{name} {value:g}" for name, (value, off) in values.items() if value != off)


class SelectSpec(Closed):
    """Train on part of the tokens only; the others cost nothing in head and loss."""

    by: Literal["entropy", "kl"]
    """entropy: the tokens at which the student was least sure when it sampled. kl: those at which teacher and student
    disagree most, by the one-sample estimate r - 1 - log r of KL(student || teacher), r = q / p."""
    fraction: float = Field(gt=0, le=1)
    """Share of a step's tokens that train, of each teacher's samples."""


class HorizonSpec(Closed):
    """Train on the beginnings of completions first."""

    start: int = Field(ge=1, le=32_768)
    """Tokens of each completion that train at the first step."""
    end: int = Field(ge=1, le=32_768)
    """And from step `steps` on."""
    steps: int = Field(ge=1, le=1_000_000)
    """Steps over which the horizon goes from `start` to `end`, linearly."""


class TokensSpec(Closed):
    """Which tokens of a completion train. The end-of-sequence token is one of them."""

    drop_truncated: bool = False
    """Leave out completions that were cut off at `max_tokens`; their share is a metric either way."""
    mask_special: bool = False
    """Leave out special tokens other than the one that ended the completion."""
    select: SelectSpec | None = None
    """Train on the most telling tokens only; none = on all."""
    horizon: HorizonSpec | None = None
    """Train on beginnings first; none = on whole completions."""
