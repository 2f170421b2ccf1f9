"""Field types of the request models: strict, bounded, and with messages for the person who filled them in.

Nothing is coerced: a number is not a string, a boolean is not a number, and every float must be finite in float32.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import BeforeValidator, Field, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from interventions.float32 import float32
from interventions.selectors import UNBOUNDED
from interventions.wording import choices, nearest, printable, show

Path = tuple[str | int, ...]

MAX_VALUES = 2**22
"""Most numbers in one ``values`` field: 128 layers of d_model 32,768."""

MAX_TOKEN_TEXT = 256
"""Longest string (characters) accepted as one token."""


def fault(message: str, *path: str | int) -> PydanticCustomError:
    """A validation error at ``path`` below the field being validated."""
    return PydanticCustomError("intervention", "{message}", {"message": printable(message), "path": path})


def number(value: Any, *path: str | int) -> float:
    """``value`` rounded to float32; a fault if it is not a number or not finite there."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise fault(f"expected a number, got {show(value)}", *path)
    try:
        rounded = float32(value)
    except OverflowError:  # an integer beyond float64
        rounded = math.inf
    if not math.isfinite(rounded):
        raise fault(f"expected a finite number in the range of float32, got {show(value)}", *path)
    return rounded


def integer(value: Any, *path: str | int) -> int:
    """``value`` if it is an integer (not a boolean, not 3.0)."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise fault(f"expected an integer, got {show(value)}", *path)
    return value


def text(value: Any, *path: str | int, at_most: int) -> str:
    """``value`` if it is a non-empty string of at most ``at_most`` characters that UTF-8 can carry."""
    if not isinstance(value, str):
        raise fault(f"expected a string, got {show(value)}", *path)
    if not 0 < len(value) <= at_most:
        raise fault(f"expected 1 to {at_most} characters, got {len(value)}", *path)
    if printable(value) != value:
        raise fault(f"{show(value)} is not valid Unicode text", *path)
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise fault(f"expected true or false, got {show(value)}")
    return value


def _name(value: Any) -> str:
    return text(value, at_most=256)


def _label(value: Any) -> str:
    return text(value, at_most=64)


def one_of(*options: str) -> Callable[[Any], str]:
    """Validator for a string out of ``options``."""

    def check(value: Any) -> str:
        if not isinstance(value, str) or value not in options:
            hint = nearest(value, options) if isinstance(value, str) else ""
            raise fault(f"{show(value)} is not one of {choices(options)}.{hint}")
        return value

    return check


def integers(value: Any) -> list[int]:
    """A non-empty list of distinct integers."""
    if not isinstance(value, list):
        raise fault(f"expected a list of integers, got {show(value)}")
    if not value:
        raise fault("the list is empty; name at least one")
    seen: dict[int, int] = {}
    for i, item in enumerate(value):
        first = seen.setdefault(integer(item, i), i)
        if first != i:
            raise fault(f"{show(item)} is already at [{first}]", i)
    return value


def _not_negative(value: Any) -> float:
    """A number ≥ 0."""
    found = number(value)
    if found < 0:
        raise fault(f"expected a number ≥ 0, got {show(value)}")
    return found + 0.0


def _statistic(value: Any) -> float | list[float]:
    """One number, or a non-empty list of them."""
    if not isinstance(value, list):
        return number(value)
    if not value:
        raise fault("the list is empty; expected one number per feature, or one for all")
    return [number(item, i) for i, item in enumerate(value)]


Number = Annotated[float, BeforeValidator(number)]
NotNegative = Annotated[float, BeforeValidator(_not_negative), Field(json_schema_extra={"minimum": 0})]
Statistic = Annotated[
    float | list[float],
    PlainValidator(_statistic),
    WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "array", "items": {"type": "number"}, "minItems": 1}]}),
]
"""A number per feature, or one for all."""
Integer = Annotated[int, BeforeValidator(integer)]
Integers = Annotated[
    list[int], BeforeValidator(integers), Field(json_schema_extra={"minItems": 1, "uniqueItems": True})
]
Flag = Annotated[bool, BeforeValidator(_flag)]
Name = Annotated[str, BeforeValidator(_name), Field(json_schema_extra={"minLength": 1, "maxLength": 256})]
Label = Annotated[str, BeforeValidator(_label), Field(json_schema_extra={"minLength": 1, "maxLength": 64})]


# values: one vector, or one per layer --------------------------------------------------------------------------------

Array = npt.NDArray[np.float32]

_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def _row(items: list[Any], *path: int) -> Array:
    if not items:
        raise fault("the list is empty; expected d_model numbers", *path)
    if len(items) > MAX_VALUES:
        raise fault(f"expected at most {MAX_VALUES} numbers, got {len(items)}", *path)
    if set(map(type, items)) <= {float, int}:
        with np.errstate(over="ignore"):
            try:
                row = np.asarray(items, dtype=np.float64).astype(np.float32)
            except OverflowError:
                row = np.full(1, np.inf, np.float32)
        if np.isfinite(row).all():
            return row
    return np.asarray([number(item, *path, i) for i, item in enumerate(items)], dtype=np.float32)


def _encoded(value: dict[Any, Any]) -> Array:
    fields = {k: v for k, v in value.items() if v is not None}
    known = ("dtype", "shape", "data")
    for key in fields:
        if key not in known:
            name = key if isinstance(key, str) else show(key)
            raise fault(f"unknown field; encoded values have {choices(known)}.{nearest(name, known)}", printable(name))
    for key in known:
        if key not in fields:
            raise fault(f"is required; encoded values have {choices(known)}", key)
    dtype, shape, data = fields["dtype"], fields["shape"], fields["data"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise fault(f"{show(dtype)} is not one of {choices(_ITEM_BYTES)}", "dtype")
    if not isinstance(shape, list) or len(shape) not in (1, 2):
        raise fault(f"expected [d_model] or [layers, d_model], got {show(shape)}", "shape")
    for i, extent in enumerate(shape):
        if not 0 < integer(extent, "shape", i) <= MAX_VALUES:
            raise fault(f"expected 1 to {MAX_VALUES}, got {show(extent)}", "shape", i)
    count = math.prod(shape)
    if count > MAX_VALUES:
        raise fault(f"expected at most {MAX_VALUES} numbers, got {count}", "shape")
    if not isinstance(data, str):
        raise fault(f"expected a base64 string, got {show(data)}", "data")
    n_bytes = count * _ITEM_BYTES[dtype]
    if len(data) != 4 * math.ceil(n_bytes / 3):
        have = f"{len(data)} base64 characters"
        raise fault(f"{dtype} of shape {shape} is {4 * math.ceil(n_bytes / 3)} base64 characters, got {have}", "data")
    try:
        raw = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise fault("expected base64 (standard alphabet, padded)", "data") from None
    if len(raw) != n_bytes:
        raise fault(f"{dtype} of shape {shape} is {n_bytes} bytes, got {len(raw)}", "data")
    if dtype == "bfloat16":
        array = (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        array = np.frombuffer(raw, "<f4" if dtype == "float32" else "<f2").astype(np.float32)
    if not np.isfinite(array).all():
        at = int(np.flatnonzero(~np.isfinite(array))[0])
        raise fault(f"number {at} of the decoded data is not finite", "data")
    return array.reshape(shape)


def _values(value: Any) -> Array:
    if isinstance(value, dict):
        return _encoded(value)
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, list):
        raise fault(f"expected numbers, lists of numbers, or an object with dtype, shape, data; got {show(value)}")
    if not value or not isinstance(value[0], list):
        return _row(value)
    rows: list[Array] = []
    for i, items in enumerate(value):
        if not isinstance(items, list):
            raise fault(f"expected a list of numbers like [0], got {show(items)}", i)
        if len(items) != len(value[0]):
            raise fault(f"has {len(items)} numbers, [0] has {len(value[0])}", i)
        if len(value) * len(items) > MAX_VALUES:
            raise fault(f"expected at most {MAX_VALUES} numbers, got {len(value) * len(items)}")
        rows.append(_row(items, i))
    return np.stack(rows)


Values = Annotated[
    Array,
    PlainValidator(_values),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "array", "items": {"type": "number"}, "minItems": 1},
                {"type": "array", "items": {"type": "array", "items": {"type": "number"}}, "minItems": 1},
                {
                    "type": "object",
                    "additionalProperties": False,
                    "required": ["dtype", "shape", "data"],
                    "properties": {
                        "dtype": {"enum": list(_ITEM_BYTES)},
                        "shape": {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 2},
                        "data": {"type": "string", "contentEncoding": "base64", "description": "little-endian"},
                    },
                },
            ]
        }
    ),
]
"""float32 ``[d]`` or ``[layers, d]``."""


# tokens: which positions ---------------------------------------------------------------------------------------------

KEYWORDS = ("all", "prompt", "generated", "last_prompt_token")


@dataclass(frozen=True)
class Part:
    """One member of a selector: exactly one of a keyword, a slice and a set of tokens.

    ``path`` is its place below the ``tokens`` field, for messages.
    """

    path: Path = ()
    keyword: str | None = None
    slice: tuple[int | None, int | None] | None = None
    tokens: tuple[int | str, ...] = ()


def _part(value: Any, *path: str | int) -> Part:
    if isinstance(value, str):
        if value not in KEYWORDS:
            raise fault(f"{show(value)} is not one of {choices(KEYWORDS)}.{nearest(value, KEYWORDS)}", *path)
        return Part(path, keyword=value)
    if not isinstance(value, dict):
        expected = f'one of {choices(KEYWORDS)}, {{"from", "to"}} or {{"tokens": […]}}'
        raise fault(f"expected {expected}, got {show(value)}", *path)
    fields = {k: v for k, v in value.items() if v is not None}
    known = ("from", "to", "tokens")
    for key in fields:
        if key not in known:
            name = key if isinstance(key, str) else show(key)
            message = f"unknown field; a selector has {choices(known)}.{nearest(name, known)}"
            raise fault(message, *path, printable(name))
    if "tokens" in fields:
        if len(fields) > 1:
            raise fault('"tokens" does not go with "from" or "to"; a list of both is their union', *path)
        items = fields["tokens"]
        if not isinstance(items, list) or not items:
            raise fault(f"expected a non-empty list of token ids or strings, got {show(items)}", *path, "tokens")
        return Part(path, tokens=tuple(_token(item, *path, "tokens", i) for i, item in enumerate(items)))
    if not fields:
        raise fault('needs "from" or "to", or "tokens"', *path)
    bounds = [None if fields.get(k) is None else _position(fields[k], *path, k) for k in ("from", "to")]
    return Part(path, slice=(bounds[0], bounds[1]))


def _token(value: Any, *path: str | int) -> int | str:
    if isinstance(value, str):
        return text(value, *path, at_most=MAX_TOKEN_TEXT)
    if isinstance(value, bool) or not isinstance(value, int):
        raise fault(f"expected a token id or a string, got {show(value)}", *path)
    return value


def _position(value: Any, *path: str | int) -> int:
    if abs(integer(value, *path)) > UNBOUNDED:
        raise fault(f"expected a position within ±{UNBOUNDED}, got {show(value)}", *path)
    return int(value)


def _tokens(value: Any) -> tuple[Part, ...]:
    if not isinstance(value, list):
        return (_part(value),)
    if not value:
        raise fault("an empty list selects nothing; leave the field out to select all tokens")
    return tuple(_part(item, i) for i, item in enumerate(value))


_PART_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"enum": list(KEYWORDS)},
        {
            "type": "object",
            "additionalProperties": False,
            "properties": {"from": {"type": "integer"}, "to": {"type": "integer"}},
            "minProperties": 1,
            "description": "Positions from <= p < to; negatives count from the end of the prompt.",
        },
        {
            "type": "object",
            "additionalProperties": False,
            "required": ["tokens"],
            "properties": {
                "tokens": {
                    "type": "array",
                    "minItems": 1,
                    "items": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
                }
            },
            "description": "Every token with one of these ids; a string must be exactly one token.",
        },
    ]
}

Tokens = Annotated[
    tuple[Part, ...],
    PlainValidator(_tokens),
    WithJsonSchema(
        {"anyOf": [*_PART_SCHEMA["anyOf"], {"type": "array", "items": _PART_SCHEMA, "minItems": 1}], "default": "all"}
    ),
]
"""Union of :class:`Part`."""

ALL_TOKENS: tuple[Part, ...] = (Part(keyword="all"),)
