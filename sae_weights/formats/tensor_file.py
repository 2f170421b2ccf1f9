"""A safetensors file of which only the parts asked for are read."""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sae_weights.errors import SAEFormatError
from sae_weights.source import Bits

from .devices import refuse_devices
from .loaded import stamp
from .tensors import require

# safetensors' floating dtypes: integers of their width, for numpy (which lacks bfloat16), and torch's dtype.
_STORED_AS: dict[str, tuple[type, torch.dtype]] = {
    "F64": (np.int64, torch.float64),
    "F32": (np.int32, torch.float32),
    "F16": (np.int16, torch.float16),
    "BF16": (np.int16, torch.bfloat16),
}


class TensorFile:
    """Names, shapes and dtypes of a safetensors file; tensors and slices of them on demand, through a memory map.

    Never unpickles: a file that is not safetensors raises SAEFormatError. So does reading from a file that was replaced
    or changed after it was opened, because two reads would then mix two dictionaries.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map: mmap.mmap | None = None
        refuse_devices(path)
        try:
            self._stamp = stamp(path)
            file: Any = cast(Any, safe_open)(path, framework="pt")
            names = list(file.keys())
            self._slices: dict[str, Any] = {name: file.get_slice(name) for name in names}
            self.shapes: dict[str, list[int]] = {name: list(s.get_shape()) for name, s in self._slices.items()}
            self.dtypes: dict[str, str] = {name: str(s.get_dtype()) for name, s in self._slices.items()}
            self.metadata: dict[str, str] = dict(file.metadata() or {})
        except FileNotFoundError:
            raise SAEFormatError(f"{path}: no such file") from None
        except IsADirectoryError:
            raise SAEFormatError(f"{path}: is a folder; expected a safetensors file") from None
        except (SafetensorError, OSError, ValueError) as error:
            raise SAEFormatError(f"{path}: not a readable safetensors file ({error})") from error

    def require(self, name: str, *shapes: list[int]) -> None:
        """Raise SAEFormatError unless the tensor is there, floating point and, if shapes are given, of one of them."""
        require(self, name, shapes)

    def tensor(self, name: str) -> Tensor:
        """The whole tensor in its storage dtype."""
        return self._part(name, ...)

    def rows(self, name: str, rows: slice | list[int]) -> Tensor:
        """Rows [m, …] of a matrix."""
        if isinstance(rows, slice):
            return self._part(name, rows)
        if len(self.shapes[name]) == 2:
            return self._picked(name, rows, slice(None))
        if not rows:
            return self._part(name, slice(0, 0))
        return torch.cat([self._part(name, slice(i, i + 1)) for i in rows])

    def columns(self, name: str, columns: slice | list[int]) -> Tensor:
        """Columns of a matrix, transposed: [m, rows]."""
        if isinstance(columns, slice):
            return self._part(name, (slice(None), columns)).T
        return self._picked(name, slice(None), columns).T

    def bits(self, name: str) -> Bits | None:
        """A matrix of float32 or bfloat16 where it lies in the memory map; :meth:`refuse_change` tells whether it still does."""
        unsigned = {"F32": np.uint32, "BF16": np.uint16}.get(self.dtypes[name])
        return None if unsigned is None else self._matrix(name, unsigned)

    def _picked(self, name: str, rows: Any, columns: Any) -> Tensor:
        """Some rows or columns of a matrix: the pages that hold them, without the read-ahead around them."""
        self.refuse_change()
        numbers, dtype = _STORED_AS[self.dtypes[name]]
        chosen: np.ndarray[Any, Any] = self._matrix(name, numbers)[rows, columns]
        return torch.from_numpy(np.array(chosen, order="C")).view(dtype)

    def _matrix(self, name: str, numbers: type) -> np.ndarray[Any, Any]:
        if self._map is None:
            with open(self.path, "rb") as file:
                header_bytes = int.from_bytes(file.read(8), "little")
                self._header = json.loads(file.read(header_bytes))
                self._data_start = 8 + header_bytes
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._map.madvise(mmap.MADV_RANDOM)
        shape = self.shapes[name]
        start = self._data_start + self._header[name]["data_offsets"][0]
        return np.frombuffer(self._map, numbers, shape[0] * shape[1], start).reshape(shape)

    def _part(self, name: str, where: Any) -> Tensor:
        self.refuse_change()
        # A copy: the memory map must not outlive a replaced file inside some tensor.
        part: Tensor = self._slices[name][where].clone()
        return part

    def refuse_change(self) -> None:
        """Raise SAEFormatError if the file was replaced or changed since it was opened."""
        try:
            unchanged = stamp(self.path) == self._stamp
        except OSError:
            unchanged = False
        if not unchanged:
            raise SAEFormatError(f"{self.path}: changed on disk since it was opened; open the SAE again")
