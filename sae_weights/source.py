"""Where an SAE's rows come from: a file that is read a few rows at a time, or tensors in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from torch import Tensor

from .folding import Block

Rows = slice | Sequence[int]
"""Which rows: a slice with step 1, or indices within 0..n_features−1."""


class RowSource(Protocol):
    """Rows in the checkpoint's own conventions (before ``Folding``), in its storage dtype."""

    @property
    def label(self) -> str:
        """What error messages call it: the file, or "tensors in memory"."""

    @property
    def d_model(self) -> int:
        """Values that the encoder reads per token, d_in."""

    @property
    def d_out(self) -> int:
        """Values that the decoder writes per token."""

    @property
    def n_features(self) -> int: ...

    @property
    def b_dec(self) -> Tensor:
        """[d_out]"""

    @property
    def extras(self) -> Mapping[str, Tensor]:
        """Tensors that belong to no feature: W_skip [d_out, d_in] …"""

    @property
    def gate_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name → shape without the first dimension, of the gate's tensors: () for a vector [n]."""

    @property
    def recorded_digest(self) -> str | None:
        """The canonical digest, where the file carries it (``editserver sae import`` writes it)."""

    def read(self, rows: Rows) -> Block:
        """Those rows and no others. Raises SAEFormatError if the file changed since it was opened."""

    def release(self) -> None:
        """Forget what was cached for partial reads: the whole dictionary has been read."""


Bits = npt.NDArray[np.unsignedinteger[Any]]
"""Floating-point numbers as the bits they are stored in: uint32 for float32, uint16 for bfloat16."""


@dataclass(frozen=True)
class StoredRows:
    """All rows where they lie, for whoever gathers them itself.

    Nobody has looked at the numbers: rows that are not finite have to be refused. ``unchanged`` has to be called before
    each use, and raises SAEFormatError where the file that they lie in is another one now.
    """

    encoder: Bits  # [n, d_in]
    decoder: Bits  # [n, d_out]
    gate: Mapping[str, Tensor]  # [n]
    unchanged: Callable[[], None]


@runtime_checkable
class MappedSource(Protocol):
    """A ``RowSource`` whose rows may lie in memory one behind the other."""

    def stored(self) -> StoredRows | None:
        """Its matrices, in its own conventions; None where rows are not contiguous, or of another type."""


class MemoryRows:
    """A ``RowSource`` over tensors already in memory."""

    label = "tensors in memory"
    recorded_digest: str | None = None

    def __init__(self, block: Block, b_dec: Tensor, extras: Mapping[str, Tensor] | None = None) -> None:
        self._block = block
        self.b_dec = b_dec
        self.extras: Mapping[str, Tensor] = dict(extras or {})
        self.n_features, self.d_model = block.W_enc.shape
        self.d_out = block.W_dec.shape[1]
        self.gate_shapes = {name: tuple(tensor.shape[1:]) for name, tensor in block.gate.items()}

    def read(self, rows: Rows) -> Block:
        index = rows if isinstance(rows, slice) else list(rows)
        block = self._block
        W_enc = block.W_enc[index]
        W_dec = W_enc if block.W_dec is block.W_enc else block.W_dec[index]
        return Block(W_enc, W_dec, {name: v[index] for name, v in block.gate.items()})

    def release(self) -> None:
        pass


class FirstRows:
    """The first n rows of another source: a prefix of a Matryoshka dictionary."""

    recorded_digest: str | None = None

    def __init__(self, source: RowSource, n: int) -> None:
        self._source = source
        self.n_features = n
        self.label = source.label
        self.d_model, self.d_out = source.d_model, source.d_out
        self.b_dec, self.extras, self.gate_shapes = source.b_dec, source.extras, source.gate_shapes

    def read(self, rows: Rows) -> Block:
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(self.n_features)
            return self._source.read(slice(start, stop))
        return self._source.read(rows)

    def release(self) -> None:
        self._source.release()
