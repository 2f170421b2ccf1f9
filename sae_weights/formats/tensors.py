"""Named tensors in a file, of which only the parts asked for are read: what every format loader reads through."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Protocol

from torch import Tensor

from sae_weights.errors import SAEFormatError

FLOATING = ("F64", "F32", "F16", "BF16")
"""Storage dtypes that weights may have, by safetensors' names."""


class Tensors(Protocol):
    """A file of named tensors. Reading raises SAEFormatError if the file changed since it was opened."""

    path: Path
    shapes: dict[str, list[int]]
    dtypes: dict[str, str]

    def require(self, name: str, *shapes: list[int]) -> None:
        """Raise SAEFormatError unless the tensor is there, floating point and, if shapes are given, of one of them."""

    def tensor(self, name: str) -> Tensor:
        """The whole tensor in its storage dtype."""

    def rows(self, name: str, rows: slice | list[int]) -> Tensor:
        """Rows [m, …]."""

    def columns(self, name: str, columns: slice | list[int]) -> Tensor:
        """Columns of a matrix, transposed: [m, rows]."""


def require(file: Tensors, name: str, shapes: Collection[list[int]]) -> None:
    """The check behind ``Tensors.require``."""
    wanted = " or ".join(map(str, shapes))
    if name not in file.shapes:
        of_shape = f" of shape {wanted}" if shapes else ""
        raise SAEFormatError(f"{file.path}: no tensor {name!r}; expected one{of_shape}. It holds {shown(file.shapes)}")
    if shapes and file.shapes[name] not in shapes:
        raise SAEFormatError(f"{file.path}: tensor {name!r} has shape {file.shapes[name]}; expected {wanted}")
    if file.dtypes[name] not in FLOATING:
        raise SAEFormatError(
            f"{file.path}: tensor {name!r} has dtype {file.dtypes[name]}; expected {', '.join(FLOATING)}"
        )


def whole_number(file: Tensors, name: str) -> int:
    """A count that is stored among the tensors (k), of any dtype; raises SAEFormatError if it is none."""
    shape = file.shapes[name]
    value = float(file.tensor(name).double().sum()) if shape in ([], [1]) else None
    if value is None or not value.is_integer() or value < 0:
        given = f"has shape {shape}" if value is None else f"is {value:g}"
        raise SAEFormatError(f"{file.path}: tensor {name!r} {given}; expected a whole number")
    return int(value)


def refuse_others(file: Tensors, known: Collection[str], what: str) -> None:
    """Raise SAEFormatError if the file holds a tensor that is none of ``known``: it could change the meaning."""
    for name in sorted(file.shapes):
        if name not in known:
            raise SAEFormatError(
                f"{file.path}: tensor {name!r} of shape {file.shapes[name]} does not belong to {what}; "
                f"expected {shown(known)}"
            )


def shown(names: Collection[str]) -> str:
    """A sorted list of names, cut off where it gets long."""
    ordered = sorted(names)
    return str(ordered[:24]) if len(ordered) <= 24 else f"{ordered[:24]} and {len(ordered) - 24} more"
