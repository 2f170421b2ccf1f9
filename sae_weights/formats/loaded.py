"""Tensors that were read into memory, or mapped, in one go: the common part of the pickled and the numpy files."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from .tensors import require

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
# The readable limit of a file that is not weights (a config, a list of indices).
Stamp = tuple[int, int, int]


class LoadedTensors:
    """``Tensors`` over a dict of tensors that belong to ``path``."""

    def __init__(self, path: Path, tensors: dict[str, Tensor]) -> None:
        self.path = path
        self._tensors = tensors
        self.shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        self.dtypes = {name: _NAMES.get(tensor.dtype, str(tensor.dtype)) for name, tensor in tensors.items()}

    def require(self, name: str, *shapes: list[int]) -> None:
        require(self, name, shapes)

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name].clone()

    def rows(self, name: str, rows: slice | list[int]) -> Tensor:
        return self._tensors[name][rows].clone()

    def columns(self, name: str, columns: slice | list[int]) -> Tensor:
        return self._tensors[name][:, columns].T.contiguous()


def stamp(path: Path) -> Stamp:
    """What changes when a file is replaced or rewritten."""
    status = os.stat(path)
    return status.st_ino, status.st_size, status.st_mtime_ns
