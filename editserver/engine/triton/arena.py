"""Typed columns of fixed size in one device allocation, filled from pinned memory without waiting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from editserver.engine.triton.capacity import CapacityError

ALIGNMENT = 256
"""Bytes; what CUDA's allocator gives, so that every column may be loaded in the widest units."""

Array = npt.NDArray[Any]
T = TypeVar("T")
Spec = tuple[tuple[int, ...], torch.dtype]


def at(place: object, columns: Mapping[str, T]) -> dict[str, T]:
    """The columns of one of several places that all have such ones, under names of their own."""
    return {f"{place}.{name}": one for name, one in columns.items()}


class Arena:
    """Columns by name, at addresses that never change.

    :meth:`write` puts the used part of a column into a staging buffer and starts its copy to the device on the current
    stream, behind whatever reads the old content there. Staging buffers take turns: one is written again only when the
    copies out of it are done, which they have been for a long time when its turn comes.

    Args:
        columns: name → (shape, dtype).
        turns: number of staging buffers.
    """

    def __init__(self, columns: Mapping[str, Spec], device: torch.device, turns: int = 2) -> None:
        self.device = device
        self._places: dict[str, tuple[int, int, Spec]] = {}
        end = 0
        for name, (shape, dtype) in columns.items():
            size = int(np.prod(shape)) * dtype.itemsize
            self._places[name] = (end, size, (shape, dtype))
            end += -(-size // ALIGNMENT) * ALIGNMENT
        self.n_bytes = end
        self._memory = torch.zeros(end, dtype=torch.uint8, device=device)
        on_gpu = device.type == "cuda"
        self._staging = [torch.zeros(end, dtype=torch.uint8, pin_memory=on_gpu) for _ in range(turns if on_gpu else 1)]
        self._events = [torch.cuda.Event() for _ in self._staging] if on_gpu else []
        self._turn = 0
        self._content: dict[str, bytes] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        """The whole column on the device; always the same memory."""
        start, size, (shape, dtype) = self._places[name]
        return self._memory[start : start + size].view(dtype).view(shape)

    def of(self, place: object) -> dict[str, torch.Tensor]:
        """All columns of one place (:func:`at`)."""
        before = f"{place}."
        return {name.removeprefix(before): self[name] for name in self._places if name.startswith(before)}

    def check(self, columns: Mapping[str, Array]) -> None:
        """Raises CapacityError for the first column that is longer than what was reserved."""
        for name, array in columns.items():
            room = self._places[name][2][0][0]
            if len(array) > room:
                raise CapacityError(name, len(array), room)

    def write(self, columns: Mapping[str, Array]) -> int:
        """Make these the first entries of their columns; all or, with CapacityError, none. Returns the bytes copied."""
        self.check(columns)
        changed: dict[str, bytes] = {}
        for name, array in columns.items():
            shape, dtype = self._places[name][2]
            expected = np.dtype(str(dtype).removeprefix("torch."))
            if array.dtype != expected or array.shape[1:] != shape[1:]:
                raise ValueError(f"{name} is {array.dtype} {array.shape}, expected {expected} [n, {shape[1:]}]")
            content = array.tobytes()
            if self._content.get(name) != content:
                changed[name] = content
        if not changed:
            return 0
        self._turn = (self._turn + 1) % len(self._staging)
        staging = self._staging[self._turn]
        if self._events:
            self._events[self._turn].synchronize()
        copied = 0
        for name, content in changed.items():
            start, stop = self._places[name][0], self._places[name][0] + len(content)
            staging[start:stop] = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else staging[:0]
            self._memory[start:stop].copy_(staging[start:stop], non_blocking=True)
            self._content[name] = content
            copied += len(content)
        if self._events:
            self._events[self._turn].record()
        return copied
