"""A safetensors file of which only the parts asked for are read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sae_weights.errors import SAEFormatError

_FLOATS = {"F64", "F32", "F16", "BF16"}


class TensorFile:
    """Names, shapes and dtypes of a safetensors file; tensors and slices of them on demand, through a memory map.

    Never unpickles: a file that is not safetensors raises SAEFormatError. So does reading from a file that was replaced
    or changed after it was opened, because two reads would then mix two dictionaries.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._stamp = _stamp(path)
            file: Any = cast(Any, safe_open)(path, framework="pt")
            names = list(file.keys())
            self._slices: dict[str, Any] = {name: file.get_slice(name) for name in names}
            self.shapes: dict[str, list[int]] = {name: list(s.get_shape()) for name, s in self._slices.items()}
            self.dtypes: dict[str, str] = {name: str(s.get_dtype()) for name, s in self._slices.items()}
        except FileNotFoundError:
            raise SAEFormatError(f"{path}: no such file") from None
        except IsADirectoryError:
            raise SAEFormatError(f"{path}: is a folder; expected a safetensors file") from None
        except (SafetensorError, OSError, ValueError) as error:
            raise SAEFormatError(f"{path}: not a readable safetensors file ({error})") from error

    def require(self, name: str, *shapes: list[int]) -> None:
        """Raise SAEFormatError unless the tensor is there, floating point and of one of these shapes."""
        wanted = " or ".join(map(str, shapes))
        if name not in self.shapes:
            raise SAEFormatError(
                f"{self.path}: no tensor {name!r}; expected one of shape {wanted}. It holds {sorted(self.shapes)}"
            )
        if self.shapes[name] not in shapes:
            raise SAEFormatError(f"{self.path}: tensor {name!r} has shape {self.shapes[name]}; expected {wanted}")
        if self.dtypes[name] not in _FLOATS:
            raise SAEFormatError(
                f"{self.path}: tensor {name!r} has dtype {self.dtypes[name]}; expected {', '.join(sorted(_FLOATS))}"
            )

    def tensor(self, name: str) -> Tensor:
        """The whole tensor in its storage dtype."""
        return self._part(name, ...)

    def rows(self, name: str, rows: slice | list[int]) -> Tensor:
        """Rows [m, …] of a matrix."""
        if isinstance(rows, slice):
            return self._part(name, rows)
        if not rows:
            return self._part(name, slice(0, 0))
        return torch.cat([self._part(name, slice(i, i + 1)) for i in rows])

    def columns(self, name: str, columns: slice | list[int]) -> Tensor:
        """Columns of a matrix, transposed: [m, rows]."""
        if isinstance(columns, slice):
            return self._part(name, (slice(None), columns)).T
        if not columns:
            return self._part(name, (slice(None), slice(0, 0))).T
        return torch.cat([self._part(name, (slice(None), slice(i, i + 1))).T for i in columns])

    def _part(self, name: str, where: Any) -> Tensor:
        try:
            unchanged = _stamp(self.path) == self._stamp
        except OSError:
            unchanged = False
        if not unchanged:
            raise SAEFormatError(f"{self.path}: changed on disk since it was opened; open the SAE again")
        # A copy: the memory map must not outlive a replaced file inside some tensor.
        part: Tensor = self._slices[name][where].clone()
        return part


def _stamp(path: Path) -> tuple[int, int, int]:
    status = os.stat(path)
    return status.st_ino, status.st_size, status.st_mtime_ns
