from __future__ import annotations

import base64
import ctypes
from array import array
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from editserver_client import PackedTensor, Steer, Vector, pack

SIZES = st.tuples(st.integers(1, 4), st.integers(1, 5))


@given(
    SIZES.flatmap(
        lambda s: st.lists(
            st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=s[1], max_size=s[1]),
            min_size=s[0],
            max_size=s[0],
        )
    )
)
def test_packing_keeps_every_float32_and_its_place(matrix: list[list[float]]) -> None:
    packed = pack(matrix)
    read_back = np.frombuffer(base64.b64decode(packed.data), dtype="<f4").reshape(packed.shape)
    assert np.array_equal(read_back, np.asarray(matrix, dtype=np.float32))
    assert packed.tolist() == matrix


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<f2", "<i4"])
def test_arrays_of_any_dtype_and_byte_order_are_sent_as_little_endian_float32(dtype: str) -> None:
    values = np.array([[1, -2, 3], [0, 5, 6]], dtype=dtype)
    sent = Steer(values=values, layers=[1, 2]).to_dict()["values"]
    assert (sent["dtype"], sent["shape"]) == ("float32", [2, 3])
    assert base64.b64decode(sent["data"]) == values.astype("<f4").tobytes()


def test_a_transposed_view_is_sent_in_its_own_order() -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3).T
    assert pack(values).tolist() == [[0, 3], [1, 4], [2, 5]]


@pytest.mark.parametrize(
    "values",
    [
        array("d", [1.5, -2.0]),
        memoryview(array("f", [1.5, -2.0])),
        (ctypes.c_float * 2)(1.5, -2.0),  # a buffer without .tolist(), of explicit byte order
        [np.float32(1.5), -2],
        (1.5, -2.0),
    ],
)
def test_buffers_arrays_and_lists_give_the_same_vector(values: Any) -> None:
    assert pack(values).tolist() == [1.5, -2.0]


def test_lists_stay_lists_and_packed_stays_packed() -> None:
    assert Steer(values=[1, 2], layer=0).to_dict()["values"] == [1.0, 2.0]
    packed = pack([1, 2])
    assert Steer(values=packed, layer=0).to_dict()["values"] == packed.to_dict()
    assert Steer(values=packed.to_dict(), layer=0).to_dict()["values"] == packed.to_dict()
    assert Steer(values=[np.ones(2), np.zeros(2)], layers=[0, 1]).to_dict()["values"] == [[1, 1], [0, 0]]


@pytest.mark.parametrize(
    "values, says",
    [
        ([], "at least one number"),
        (np.zeros((0,)), "at least one number"),
        ([[1.0], [1.0, 2.0]], "lengths [1, 2]"),
        ([[], []], "lengths [0]"),
        ([1.0, float("inf")], "finite"),
        (np.array([np.nan]), "finite"),
        (["1"], "expected a number"),
        ([True], "expected a number"),
        ([1.0, [2.0]], "expected numbers"),
        (np.zeros((2, 2, 2)), "expected a number"),
        ("abcd", "pack()"),
        (b"\x00\x00\x80\x3f", "pack()"),
        (object(), "got object"),
        (1.0, "got float"),
        (np.float64(1.0), "at least one number"),
        (np.array([1e39]), "beyond float32"),
    ],
)
def test_what_is_not_a_vector_is_refused(values: Any, says: str) -> None:
    with pytest.raises(ValueError) as refused:
        Steer(values=values, layer=1)
    assert says in str(refused.value)


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"dtype": "float32", "shape": [3], "data": base64.b64encode(b"\0" * 8).decode()}, "needs 12 bytes"),
        ({"dtype": "float32", "shape": [2], "data": "not base64!"}, "not base64"),
        ({"dtype": "int8", "shape": [2], "data": ""}, "float32"),
        ({"dtype": "float32", "shape": [-1], "data": ""}, "shape [-1]"),
        ({"dtype": "float32", "shape": [0], "data": "", "order": "F"}, "order"),
    ],
)
def test_a_packed_tensor_must_have_the_bytes_of_its_shape(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError) as refused:
        PackedTensor(**fields)
    assert says in str(refused.value)


def test_a_library_vector_has_one_vector_per_layer_under_string_keys() -> None:
    body = Vector({15: [1, 2], 20: np.ones(2)}, description="formal", meta={"n": 3}).to_dict()
    assert body["layers"]["15"] == [1.0, 2.0]
    assert body["layers"]["20"] == pack([1, 1]).to_dict()
    assert (body["description"], body["meta"]) == ("formal", {"n": 3})
    with pytest.raises(ValidationError, match="at least one layer"):
        Vector({})
