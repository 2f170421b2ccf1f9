"""Arrays that hold blocks of rows of many owners, one behind the other: a block comes at the end, any of them go.

What is there stays contiguous, as kernels and copies to a device want it, and moves by as little as can be: whoever arrives
costs a copy of its own rows, and who leaves one of the rows behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from editserver.engine.kernel_rows import keep_blocks, keep_rows, rows_of_owners

Array = npt.NDArray[Any]


class Stack:
    """Rows of one type and shape.

    Attributes:
        at: address of the first one, which changes when room runs out.
    """

    def __init__(self, dtype: type[np.generic], *shape: int) -> None:
        self._n = 0
        self._room: Array
        self._make_room(np.zeros((16, *shape), dtype))

    def __len__(self) -> int:
        return self._n

    @property
    def rows(self) -> Array:
        """All of them, ``[n, *shape]``: a view, good until the next change."""
        return self._room[: self._n]

    def push(self, blocks: Sequence[Array]) -> None:
        """Put blocks of rows behind the others, in their order."""
        alone = len(blocks) == 1  # mostly: who arrives, arrives alone
        n = self._n + (len(blocks[0]) if alone else sum(map(len, blocks)))
        if n > len(self._room):
            room = np.zeros((2 * n, *self._room.shape[1:]), self._room.dtype)
            room[: self._n] = self.rows
            self._make_room(room)
        if alone:
            self._room[self._n : n] = blocks[0]
        elif n > self._n:
            np.concatenate(blocks, out=self._room[self._n : n])
        self._n = n

    def clear(self) -> None:
        """Take all rows out."""
        self._n = 0

    def _make_room(self, room: Array) -> None:
        self._room, self._bytes = room, room.view(np.uint8).reshape(len(room), -1)
        self.at: int = room.__array_interface__["data"][0]

    def keep(self, which: Array) -> None:
        """Take the rows out of which ``which`` (bool ``[n]``) is not true."""
        if self._n:
            self._n = keep_rows(which, self._bytes)


class Pointers(Stack):
    """Where the blocks of every owner begin in some stack, int32 ``[owners + 1]``: 0, and where each block ends."""

    def __init__(self) -> None:
        super().__init__(np.int32)
        self._n = 1  # the 0 that is there from the start and never changes

    def push(self, blocks: Sequence[Array]) -> None:
        """Owners behind the others; of each block, ends counted from where its first owner begins."""
        n = self._n
        start = self._room[n - 1]
        if len(blocks) == 1:
            super().push((blocks[0] + start,))
            return
        super().push(blocks)
        lasts = np.array([ends[-1] if len(ends) else 0 for ends in blocks], np.int32)
        starts = start + np.cumsum(lasts, dtype=np.int32) - lasts
        self._room[n : self._n] += np.repeat(starts, [len(ends) for ends in blocks])

    def clear(self) -> None:
        """Take all owners out."""
        self._n = 1

    def rows_of(self, which: Array) -> Array:
        """Of every row of all owners, whether it is of one of ``which`` (bool ``[owners]``)."""
        marked: Array = rows_of_owners(which, self.rows)
        return marked

    def keep(self, which: Array) -> None:
        """Take out the owners of whom ``which`` (bool ``[owners]``) is not true, with their rows."""
        self._n = keep_blocks(which, self.rows)
