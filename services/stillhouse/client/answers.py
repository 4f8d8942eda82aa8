"""JSON of the gateway becomes typed answers, whatever version the gateway has.

A newer gateway may send fields and values that this client does not know, an older one may leave fields out. Neither
is a reason to break: what is unknown is kept as it came.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError

T = TypeVar("T")
_adapters: dict[Any, TypeAdapter[Any]] = {}


def read(kind: type[T], value: Any) -> T:
    """`value`, plain JSON, as `kind`: an answer's class, `list[Event]`, `dict[str, Any]` ..."""
    adapter = _adapters.get(kind) or _adapters.setdefault(kind, TypeAdapter(kind))
    try:
        return adapter.validate_python(value, extra="allow")
    except ValidationError:
        return _read_leniently(kind, value)


def _read_leniently(kind: Any, value: Any) -> Any:
    """Field by field, each as far as it can be read; a field that is missing stays missing."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        fitting = [one for one in arguments if _is_answer(one)]
        return _read_leniently(fitting[0], value) if fitting else value
    if origin is list and isinstance(value, list):
        return [read(arguments[0], item) for item in value]
    if origin is dict and isinstance(value, Mapping):
        return {name: read(arguments[1], item) for name, item in value.items()}
    if _is_answer(kind) and isinstance(value, Mapping):
        fields = kind.model_fields
        known = {name: read(fields[name].annotation, item) for name, item in value.items() if name in fields}
        made = kind.model_construct(**known)
        unknown = {name: item for name, item in value.items() if name not in fields}
        object.__setattr__(made, "__pydantic_extra__", unknown)
        return made
    return value


def _is_answer(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)
