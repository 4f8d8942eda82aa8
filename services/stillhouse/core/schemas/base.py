"""What all answers share."""

from __future__ import annotations

from typing import Annotated, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

T = TypeVar("T")


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
