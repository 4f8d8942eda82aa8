"""The deployment."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stillhouse.core.schemas.base import Answer, Page


class Queue(Answer):
    """Work for one kind of service."""

    object: Literal["queue"] = "queue"
    role: str
    """Who takes from it: trainer (jobs), sampler (groups of samples) or teacher (samples)."""
    model: str = ""
    """Teachers: the model they score with."""
    waiting: int
    """Entries that nobody has taken."""
    in_work: int
    """Entries that somebody holds."""
    oldest_s: float | None = None
    """Age of the oldest of them, seconds; null = there are none."""


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
    health: Literal["ok", "late", "problem", "draining"] = "ok"
    """late = its heartbeat is overdue; problem = it cannot do what it was asked for (`extra.problem`); draining = it
    ends what it has and takes nothing new."""
    heartbeat_age_s: float = 0.0
    """Seconds since its last heartbeat."""
    queue: Queue | None = None
    """Work for services of its role, all models together; null = its role takes none from a queue."""


class Services(Page[Service]):
    """The deployment's processes, and the work that waits for them."""

    queues: list[Queue] = Field(default_factory=list)
    """By role and model, also where no service is there to take from them."""


class Health(Answer):
    """The process is alive."""

    status: str
    version: str
