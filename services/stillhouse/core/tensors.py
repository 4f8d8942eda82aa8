"""numpy arrays as `v1.Tensor`: flat bytes, row-major, little-endian. bfloat16 travels as its uint16 bit pattern.

Converting to torch is the leaf modules' job; nothing here imports it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from stillhouse.core.errors import WireError
from stillhouse.v1 import tensor_pb2 as pb

_TO_NUMPY: Final[dict[int, np.dtype]] = {
    pb.DATA_TYPE_FLOAT32: np.dtype("<f4"),
    pb.DATA_TYPE_FLOAT16: np.dtype("<f2"),
    pb.DATA_TYPE_BFLOAT16: np.dtype("<u2"),
    pb.DATA_TYPE_INT32: np.dtype("<i4"),
    pb.DATA_TYPE_INT64: np.dtype("<i8"),
    pb.DATA_TYPE_UINT8: np.dtype("u1"),
}
_FROM_NUMPY: Final[dict[np.dtype, pb.DataType]] = {
    np.dtype("<f4"): pb.DATA_TYPE_FLOAT32,
    np.dtype("<f2"): pb.DATA_TYPE_FLOAT16,
    np.dtype("<i4"): pb.DATA_TYPE_INT32,
    np.dtype("<i8"): pb.DATA_TYPE_INT64,
    np.dtype("u1"): pb.DATA_TYPE_UINT8,
}
DTYPE_NAMES: Final[dict[str, pb.DataType]] = {
    "float32": pb.DATA_TYPE_FLOAT32,
    "float16": pb.DATA_TYPE_FLOAT16,
    "bfloat16": pb.DATA_TYPE_BFLOAT16,
    "int32": pb.DATA_TYPE_INT32,
    "int64": pb.DATA_TYPE_INT64,
    "uint8": pb.DATA_TYPE_UINT8,
}
"""Name in specs and files -> wire enum."""


def dtype_name(dtype: int) -> str:
    """Wire enum -> name (`float32`)."""
    for name, value in DTYPE_NAMES.items():
        if value == dtype:
            return name
    raise WireError(f"unknown element type {dtype} on the wire; known: {', '.join(DTYPE_NAMES)}")


def itemsize(dtype: int) -> int:
    """Bytes per element of a wire element type."""
    if dtype not in _TO_NUMPY:
        raise WireError(f"unknown element type {dtype} on the wire; known: {', '.join(DTYPE_NAMES)}")
    return _TO_NUMPY[dtype].itemsize


def to_tensor(array: np.ndarray) -> pb.Tensor:
    """`array` as a message. float64 and bool are refused: say which precision you mean."""
    dtype = _FROM_NUMPY.get(array.dtype)
    if dtype is None:
        raise WireError(
            f"no wire type for numpy {array.dtype}; convert to float32, float16, int32, int64 or uint8 first"
        )
    return pb.Tensor(dtype=dtype, shape=list(array.shape), data=np.ascontiguousarray(array).tobytes())


def from_tensor(tensor: pb.Tensor) -> np.ndarray:
    """The message as a read-only array (bfloat16 as its uint16 bits).

    Raises:
        WireError: the number of bytes does not match shape and type.
    """
    return from_bytes(tensor.data, tensor.dtype, tensor.shape)


def from_bytes(data: bytes | bytearray | memoryview, dtype: int, shape: Sequence[int]) -> np.ndarray:
    """Flat bytes of a payload as an array; checks that they fit `shape` exactly."""
    if dtype not in _TO_NUMPY:
        raise WireError(f"unknown element type {dtype} on the wire; known: {', '.join(DTYPE_NAMES)}")
    if any(n < 0 for n in shape):
        raise WireError(f"negative dimension in shape {list(shape)}")
    numpy_dtype = _TO_NUMPY[dtype]
    expected = int(np.prod(shape, dtype=np.int64)) * numpy_dtype.itemsize
    if len(data) != expected:
        raise WireError(f"got {len(data)} bytes for shape {list(shape)} of {numpy_dtype.name}, which needs {expected}")
    return np.frombuffer(data, dtype=numpy_dtype).reshape(tuple(shape))


def ids_tensor(ids: Sequence[int] | np.ndarray) -> pb.Tensor:
    """Token ids as an int32 tensor."""
    return to_tensor(np.asarray(ids, dtype="<i4"))


def ids_list(tensor: pb.Tensor) -> list[int]:
    """An int32 tensor of token ids as a list."""
    array = from_tensor(tensor)
    if array.dtype != np.dtype("<i4") or array.ndim != 1:
        raise WireError(f"token ids must be int32 [T], got {array.dtype} {list(array.shape)}")
    return array.tolist()


def floats_tensor(values: Sequence[float] | np.ndarray) -> pb.Tensor:
    """Log-probabilities as a float32 tensor."""
    return to_tensor(np.asarray(values, dtype="<f4"))
