"""A set of weights on its way into vLLM: checked, then a file in memory that the engine's processes read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from safetensors import safe_open

from stillhouse.core.errors import WeightsError
from stillhouse.core.tensors import dtype_name

HEAD: Final = "lm_head.weight"
"""May be missing, or be there besides, where it is the embedding."""
SAFETENSORS_DTYPES: Final = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
BFLOAT16_EXPONENT: Final = 0x7F80
"""All of these bits set: infinity or NaN."""
Arrays = Mapping[str, np.ndarray[Any, Any]]
"""By state-dict name; bfloat16 as uint16 bits."""


def shapes_in(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor in the model's files, by name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return shapes


def check(arrays: Arrays, dtypes: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]], *, is_tied: bool) -> None:
    """Refuse what is not a whole set of weights for the model whose tensors have these shapes.

    Raises:
        WeightsError: a name, a shape or a value does not fit.
    """
    spare = {HEAD} if is_tied else set()
    if unknown := sorted(arrays.keys() - shapes.keys() - spare):
        raise WeightsError(f"weights for tensors the student does not have: {', '.join(unknown[:5])}")
    if missing := sorted(shapes.keys() - arrays.keys() - spare):
        raise WeightsError(f"{len(missing)} of {len(shapes)} tensors of the student are missing, first {missing[0]}")
    for name, array in arrays.items():
        if array.shape != shapes.get(name, array.shape):
            raise WeightsError(f"{name}: got shape {list(array.shape)}, the student has {list(shapes[name])}")
        if not _is_finite(array, dtypes[name]):
            raise WeightsError(f"{name}: NaN or infinity in the weights")


def _is_finite(array: np.ndarray[Any, Any], dtype: int) -> bool:
    if dtype_name(dtype) == "bfloat16":
        return not bool(((array & BFLOAT16_EXPONENT) == BFLOAT16_EXPONENT).any())
    return bool(np.isfinite(array).all())


def memory_file(arrays: Arrays, dtypes: Mapping[str, int]) -> int:
    """Descriptor of a new safetensors file that has no name on disk: nothing is left of it when this process dies."""
    descriptor = os.memfd_create("stillhouse-weights")
    with open(descriptor, "wb", closefd=False) as file:
        header = json.dumps(_header(arrays, dtypes)).encode()
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        for array in arrays.values():
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return descriptor


def _header(arrays: Arrays, dtypes: Mapping[str, int]) -> dict[str, Any]:
    header, end = {}, 0
    for name, array in arrays.items():
        start, end = end, end + array.nbytes
        dtype = SAFETENSORS_DTYPES[dtype_name(dtypes[name])]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [start, end]}
    return header
