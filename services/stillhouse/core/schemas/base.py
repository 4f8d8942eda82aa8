"""What all answers share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

T = TypeVar("T")


JobId = Annotated[str, Field(pattern=r"^job_[a-z0-9]{8,40}$", max_length=44)]


class Answer(BaseModel):
    """Base of all answers. `job.status` and `job["status"]` are the same; `{**job}` and `dict(job)` copy the fields.

    There are no `values()` and `items()`: answers may have fields of such names.
    """

    model_config = ConfigDict(use_attribute_docstrings=True, protected_namespaces=())

    def __getitem__(self, name: str) -> Any:
        if name in self:
            return getattr(self, name)
        raise KeyError(f"{type(self).__name__} has no field '{name}'; it has {', '.join(self.keys())}")

    def __contains__(self, name: object) -> bool:
        return name in self.__dict__ or name in (self.model_extra or ())

    def keys(self) -> Iterator[str]:
        """Names of the fields."""
        return (name for name, _ in self)

    def get(self, name: str, default: Any = None) -> Any:
        """A field, also one that only newer servers send."""
        return getattr(self, name) if name in self else default

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types. Has, unlike `model_dump`, also the fields that only newer servers send."""
        return {name: _plain(value) for name, value in self}


def _plain(value: Any) -> Any:
    if isinstance(value, Answer):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


class Page(Answer, Generic[T]):
    """One page of a list."""

    object: Literal["list"] = "list"
    data: list[T]
    has_more: bool = False
    """There are more: ask again with `after` = the last id of this page."""
