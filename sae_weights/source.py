"""Where an SAE's rows come from: a file that is read a few rows at a time, or tensors in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

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
    def d_model(self) -> int: ...

    @property
    def n_features(self) -> int: ...

    @property
    def b_dec(self) -> Tensor:
        """[d]"""

    def read(self, rows: Rows) -> Block:
        """Those rows and no others. Raises SAEFormatError if the file changed since it was opened."""

    def release(self) -> None:
        """Forget what was cached for partial reads: the whole dictionary has been read."""


class MemoryRows:
    """A ``RowSource`` over tensors already in memory."""

    label = "tensors in memory"

    def __init__(self, block: Block, b_dec: Tensor) -> None:
        self._block = block
        self.b_dec = b_dec
        self.n_features, self.d_model = block.W_enc.shape

    def read(self, rows: Rows) -> Block:
        index = rows if isinstance(rows, slice) else list(rows)
        block = self._block
        return Block(block.W_enc[index], block.W_dec[index], {name: v[index] for name, v in block.gate.items()})

    def release(self) -> None:
        pass
