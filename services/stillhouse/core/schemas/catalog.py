"""What jobs may name."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from stillhouse.core.schemas.base import Answer


class File(Answer):
    """An uploaded file of prompts. It is what OpenAI's client reads, too."""

    id: str
    object: Literal["file"] = "file"
    num_rows: int
    sha256: str
    size_bytes: int
    uploaded_at: str
    created_at: int
    """The same as Unix time: the one integer among our times, because OpenAI's client reads this object."""
    bytes: int
    """`size_bytes` in OpenAI's words."""
    filename: str
    """As it was called when it was uploaded first."""
    purpose: Literal["fine-tune"] = "fine-tune"
    status: Literal["processed"] = "processed"
    """Every row was checked: what is wrong is not stored."""


class FileDeleted(Answer):
    """A file is gone."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


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
    loaded_by: list[str] = Field(default_factory=list)
    """Services that hold it in memory now, as role/instance."""
    used_by: list[str] = Field(default_factory=list)
    """The caller's jobs that name it and have not ended."""


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
