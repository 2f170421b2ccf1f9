"""PyTorch checkpoints (.pt, .pth, .bin), read by ``torch.load(weights_only=True)``: no code in the file ever runs."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_weights.errors import SAEFormatError

from .devices import refuse_devices
from .fields import shown
from .loaded import LoadedTensors, stamp

_MAX_DEPTH = 8


class PickledFile(LoadedTensors):
    """Names, shapes and tensors of a checkpoint; nested dicts are flattened with dots, numbers become 0-d tensors.

    ``others`` holds what is no number: strings, booleans, lists, None. Memory-mapped where the file allows it (the zip
    form, which torch writes since 1.6), so that opening one reads no weights. ``prefix`` keeps the names that start with
    it, without it (``state_dict.`` …).
    """

    def __init__(self, path: Path, *, prefix: str = "") -> None:
        content = load_pickled(path)
        tensors: dict[str, Tensor] = {}
        self.others: dict[str, Any] = {}
        _flatten(path, content, "", tensors, self.others, 0)
        if prefix:
            tensors = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            self.others = {name.removeprefix(prefix): v for name, v in self.others.items() if name.startswith(prefix)}
        super().__init__(path, tensors)
        self._stamp = stamp(path)

    def tensor(self, name: str) -> Tensor:
        self._refuse_change()
        return super().tensor(name)

    def rows(self, name: str, rows: slice | list[int]) -> Tensor:
        self._refuse_change()
        return super().rows(name, rows)

    def columns(self, name: str, columns: slice | list[int]) -> Tensor:
        self._refuse_change()
        return super().columns(name, columns)

    def _refuse_change(self) -> None:
        try:
            unchanged = stamp(self.path) == self._stamp
        except OSError:
            unchanged = False
        if not unchanged:
            raise SAEFormatError(f"{self.path}: changed on disk since it was opened; open the SAE again")


def load_pickled(path: Path) -> Any:
    """What a PyTorch file holds, tensors on the CPU. Raises SAEFormatError for anything but plain data."""
    if not path.exists():
        raise SAEFormatError(f"{path}: no such file")
    if path.is_dir():
        raise SAEFormatError(f"{path}: is a folder; expected a PyTorch file")
    refuse_devices(path)
    for mapped in (True, False):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except MemoryError as error:
            raise SAEFormatError(f"{path}: asks for more memory than there is; not a readable PyTorch file") from error
        except Exception as error:  # torch raises whatever its unpickler trips over
            # The older tar and plain pickle forms cannot be mapped: torch says so, and the second round reads them.
            if mapped and "mmap" in str(error):
                continue
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            if "weights only" in str(error).lower() or "unsupported" in str(error).lower():
                reason = "it holds more than tensors and plain values, and code in a file is never run"
            raise SAEFormatError(f"{path}: not a readable PyTorch file ({reason[:200]})") from error
    raise AssertionError("unreachable")


def _flatten(
    path: Path, content: Any, prefix: str, tensors: dict[str, Tensor], others: dict[str, Any], depth: int
) -> None:
    if depth > _MAX_DEPTH:
        raise SAEFormatError(f"{path}: {shown(prefix)} is nested deeper than a checkpoint ever is")
    if not isinstance(content, Mapping):
        raise SAEFormatError(f"{path}: holds {type(content).__name__}; expected named tensors (a state dict)")
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, Tensor):
            plain = value.layout is torch.strided and not value.is_nested and not value.is_quantized
            if not plain or value.device.type != "cpu":
                raise SAEFormatError(
                    f"{path}: tensor {shown(name)} is sparse, quantised or elsewhere; expected a plain one"
                )
            if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise SAEFormatError(
                    f"{path}: tensor {shown(name)} of shape {list(value.shape)} is larger than what is stored of it"
                )
            tensors[name] = value.detach()
        elif isinstance(value, bool) or value is None or isinstance(value, str | list | tuple | set):
            others[name] = value
        elif isinstance(value, float) or (isinstance(value, int) and abs(value) < 1 << 63):
            tensors[name] = torch.tensor(float(value), dtype=torch.float64)
        elif isinstance(value, Mapping):
            _flatten(path, value, f"{name}.", tensors, others, depth + 1)
        else:
            others[name] = value
