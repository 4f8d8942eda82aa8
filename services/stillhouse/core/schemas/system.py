"""The deployment."""

from __future__ import annotations

from typing import Literal

from stillhouse.core.schemas.base import Answer


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
