"""The part of a job's format about experiment trackers: who gets its metrics beside metrics.jsonl."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from stillhouse.core.spec_base import Closed

TrackerKind = Literal["tensorboard", "wandb", "trackio", "mlflow"]


class TrackerSpec(Closed):
    """A tracker. Addresses and secrets are of the trainer's environment (WANDB_API_KEY, MLFLOW_TRACKING_URI ...)."""

    kind: TrackerKind
    """Which; its package must be installed where the trainer runs (extra of the same name)."""
    project: str = Field(default="stillhouse", min_length=1, max_length=100, pattern=r"^[A-Za-z0-9._ -]+$")
    """Project or experiment that the job's run belongs to; TensorBoard has none."""
    run_name: str = Field(default="", max_length=200)
    """Left out: the job's name, or its id."""
    mode: Literal["online", "offline"] = "online"
    """offline: wandb writes beside the job's artifacts and sends nothing. The others go by their environment."""


def _by_name(value: Any) -> Any:
    """`wandb` is short for `{kind: wandb}`."""
    return {"kind": value} if isinstance(value, str) else value


Tracked = Annotated[TrackerSpec, BeforeValidator(_by_name)]
