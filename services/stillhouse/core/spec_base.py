"""What every part of a job's format rests on."""

from __future__ import annotations

import re
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

NAME_PATTERN: Final = r"[a-zA-Z0-9][a-zA-Z0-9._-]{0,63}"
Name = Annotated[str, Field(pattern=f"^{NAME_PATTERN}$")]
"""1-64 letters, digits, dots, dashes or underscores; also used in queue keys, hence no colon or slash."""
CHECKPOINT_PATTERN: Final = r"job_[a-z0-9]{8,40}(/ckpt_[a-z0-9-]{1,80})?"
"""A checkpoint of a job, or its newest one."""
STAGE_PREFIX: Final = "stage/"
"""Before the name of a stage at whose end the job's own student is meant."""
MODEL_PATTERN: Final = f"{NAME_PATTERN}|{CHECKPOINT_PATTERN}|{STAGE_PREFIX}{NAME_PATTERN}"


def _checkpoint_name(value: str) -> str:
    if not re.fullmatch(CHECKPOINT_PATTERN, value):
        raise ValueError(
            f"'{value}' names no checkpoint: write job_ID, for the newest of a job, or job_ID/ckpt_..., as "
            "GET /v1/jobs/job_ID/checkpoints lists them"
        )
    return value


def _model_name(value: str) -> str:
    if not re.fullmatch(MODEL_PATTERN, value):
        raise ValueError(
            f"'{value}' names no model: write the name of a registered one, job_ID or job_ID/ckpt_... for a checkpoint "
            "of a job, or stage/NAME for this job's own student at the end of an earlier stage"
        )
    return value


CheckpointName = Annotated[
    str, AfterValidator(_checkpoint_name), Field(json_schema_extra={"pattern": f"^({CHECKPOINT_PATTERN})$"})
]
"""`job_ID` (its newest checkpoint) or `job_ID/ckpt_...`; see core/checkpoints.py."""
ModelName = Annotated[str, AfterValidator(_model_name), Field(json_schema_extra={"pattern": f"^({MODEL_PATTERN})$"})]
"""A registered model's name, a `CheckpointName`, `stage/NAME` or `stage/start`."""
NO_TEACHER: Final = ""
"""Stands for a teacher's name where the job has none: in prompts, rollouts, samples and micro-batches."""
Dtype = Literal["float32", "bfloat16"]


class Closed(BaseModel):
    """Frozen, and a key it does not know is an error rather than a silent typo."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
