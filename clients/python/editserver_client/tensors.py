"""Vectors on the wire: nested lists of floats, or packed as base64 of little-endian float32."""

from __future__ import annotations

import base64
import binascii
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

from pydantic import model_validator
from pydantic.dataclasses import dataclass

from .wire import STRICT, Wire


@runtime_checkable
class SupportsToList(Protocol):
    """numpy arrays, torch tensors, `array.array`, memoryviews."""

    def tolist(self) -> Any: ...


@dataclass(frozen=True, config=STRICT)
class PackedTensor(Wire):
    """`shape` float32 numbers in C order, little-endian, base64: 5.3 bytes a number, exact for float32."""

    dtype: Literal["float32"]
    shape: Sequence[int]
    data: str

    @model_validator(mode="after")
    def _data_has_the_shape(self) -> PackedTensor:
        try:
            n_bytes = len(base64.b64decode(self.data, validate=True))
        except binascii.Error as error:
            raise ValueError(f"data is not base64: {error}") from None
        if any(size < 0 for size in self.shape) or n_bytes != 4 * math.prod(self.shape):
            raise ValueError(
                f"shape {list(self.shape)} needs {4 * math.prod(self.shape)} bytes of float32, data has {n_bytes}"
            )
        return self

    def tolist(self) -> Any:
        """Nested lists of floats, as many levels as `shape` has."""
        flat: list[Any] = list(struct.unpack(f"<{math.prod(self.shape)}f", base64.b64decode(self.data)))
        for size in reversed(self.shape[1:]):
            flat = [flat[start : start + size] for start in range(0, len(flat), size)]
        return flat


TensorLike = Sequence[float] | Sequence[Sequence[float]] | SupportsToList | Mapping[str, Any] | PackedTensor
"""What a vector argument may be: (nested) lists, anything with `.tolist()`, a buffer of floats, or packed already."""


def pack(values: TensorLike) -> PackedTensor:
    """Pack a vector [d] or matrix [n, d] as float32.

    Raises:
        ValueError: not rectangular, not numbers, NaN or Inf, or too large for float32.
    """
    if isinstance(values, PackedTensor):
        return values
    if isinstance(values, Mapping):
        return PackedTensor(**values)
    rows = as_rows(values)
    flat = [x for row in rows for x in row] if _is_matrix(rows) else rows
    shape = [len(rows), len(rows[0])] if _is_matrix(rows) else [len(rows)]
    try:
        data = struct.pack(f"<{len(flat)}f", *flat)
    except OverflowError:
        raise ValueError(f"{max(flat, key=abs)} is beyond float32's range") from None
    return PackedTensor(dtype="float32", shape=shape, data=base64.b64encode(data).decode("ascii"))


def as_wire(values: TensorLike) -> list[Any] | PackedTensor:
    """Lists stay lists of floats; arrays are packed, a quarter of the size of the list in JSON.

    Raises:
        ValueError: as in `pack`.
    """
    return as_rows(values) if isinstance(values, (list, tuple)) else pack(values)


def shape_of(values: list[Any] | PackedTensor) -> tuple[int, ...]:
    """The shape of what `as_wire` returns: (d,) or (n, d)."""
    if isinstance(values, PackedTensor):
        return tuple(values.shape)
    return (len(values), len(values[0])) if _is_matrix(values) else (len(values),)


def as_rows(values: Any) -> list[Any]:
    """[d] or [n, d] nested lists of finite floats from a list, an object with `.tolist()` or a buffer."""
    if isinstance(values, (str, bytes, bytearray)):
        raise ValueError(f"expected numbers, got {type(values).__name__}; pack() makes the base64 form")
    if not isinstance(values, (list, tuple)):
        values = _listed(values)
    if not isinstance(values, (list, tuple)) or not values:
        raise ValueError("expected at least one number")
    if not any(_is_nested(row) for row in values):
        return [_finite(x) for x in values]
    matrix = [[_finite(x) for x in (row if isinstance(row, (list, tuple)) else _listed(row))] for row in values]
    widths = {len(row) for row in matrix}
    if len(widths) != 1 or widths == {0}:
        raise ValueError(f"expected rows of one length, got lengths {sorted(widths)}")
    return matrix


def _listed(values: Any) -> Any:
    if isinstance(values, SupportsToList):
        return values.tolist()
    try:
        view = memoryview(values)
    except TypeError:
        raise ValueError(
            f"expected numbers, an object with .tolist() or a buffer, got {type(values).__name__}"
        ) from None
    order, code = (view.format[0], view.format[1:]) if view.format[0] in "@=<>!" else ("@", view.format)
    if order == "@" or view.ndim != 1:
        return view.tolist()
    return list(struct.unpack(f"{order}{len(view)}{code}", view.tobytes()))  # memoryview knows native order only


def _is_nested(row: Any) -> bool:
    # a numpy scalar has .tolist() too, but it lists to a number
    return isinstance(row, (list, tuple)) or (isinstance(row, SupportsToList) and isinstance(row.tolist(), list))


def _is_matrix(rows: list[Any]) -> bool:
    return isinstance(rows[0], list)


def _finite(x: Any) -> float:
    if isinstance(x, (bool, str, bytes)) or not hasattr(x, "__float__"):
        raise ValueError(f"expected a number, got {x!r}")
    number = float(x)
    if not math.isfinite(number):
        raise ValueError(f"expected finite numbers, got {number}")
    return number
