"""Arrays on the wire."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.core.errors import WireError
from stillhouse.core.tensors import DTYPE_NAMES, dtype_name, from_bytes, from_tensor, ids_list, ids_tensor, to_tensor
from stillhouse.v1 import tensor_pb2

DTYPES = ["float32", "float16", "int32", "int64", "uint8"]


@given(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3))
def test_what_goes_in_comes_out(dtype: str, shape: list[int]) -> None:
    array = np.random.default_rng(0).integers(0, 100, size=shape).astype(dtype)
    message = tensor_pb2.Tensor.FromString(to_tensor(array).SerializeToString())
    np.testing.assert_array_equal(from_tensor(message), array)
    assert from_tensor(message).dtype == array.dtype


def test_arrays_that_are_not_contiguous_are_sent_in_row_major_order() -> None:
    array = np.arange(6, dtype=np.int32).reshape(2, 3).T
    np.testing.assert_array_equal(from_tensor(to_tensor(array)), array)


@pytest.mark.parametrize("dtype", ["float64", "bool", "complex64"])
def test_types_without_a_wire_form_are_refused(dtype: str) -> None:
    with pytest.raises(WireError, match=dtype):
        to_tensor(np.zeros(3, dtype=dtype))


def test_a_wrong_number_of_bytes_is_refused_with_both_numbers() -> None:
    with pytest.raises(WireError, match=r"got 8 bytes .* needs 12"):
        from_bytes(b"\0" * 8, tensor_pb2.DATA_TYPE_FLOAT32, [3])
    with pytest.raises(WireError, match="negative"):
        from_bytes(b"", tensor_pb2.DATA_TYPE_FLOAT32, [-1, 0])
    with pytest.raises(WireError, match="unknown element type"):
        from_bytes(b"", 99, [0])


def test_token_ids_are_int32_vectors() -> None:
    assert ids_list(ids_tensor([1, 2, 3])) == [1, 2, 3]
    with pytest.raises(WireError, match="int32"):
        ids_list(to_tensor(np.zeros(3, dtype=np.float32)))


def test_names_and_enums_agree() -> None:
    assert [dtype_name(value) for value in DTYPE_NAMES.values()] == list(DTYPE_NAMES)
