"""What every part of a job's format rests on."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9._-]{0,63}$")]
"""1-64 letters, digits, dots, dashes or underscores; also used in queue keys, hence no colon or slash."""
NO_TEACHER: Final = ""
"""Stands for a teacher's name where the job has none: in prompts, rollouts, samples and micro-batches."""
Dtype = Literal["float32", "bfloat16"]


class Closed(BaseModel):
    """Frozen, and a key it does not know is an error rather than a silent typo."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
