"""One step's plan: for every token of the flat batch, the program it runs and the selectors that hold for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from editserver.engine.kernel_plan import select_tokens
from editserver.engine.resident import Resident, ResidentSet


@dataclass(frozen=True)
class Segment:
    """The tokens of one request in this step: a slice of the plan's compact arrays, at consecutive positions.

    ``row`` is the request's row of the batch.
    """

    resident: Resident
    index: int
    tokens: slice
    first_position: int
    row: int


class Plan:
    """Buffers of fixed size, filled before each forward pass and cleared for every pass that is not a real batch.

    Attributes:
        active: whether any token of this step belongs to a request with a program or an inspection.
        n: number of planned tokens; the compact arrays below are valid up to it.
        index: where each planned token stands in the flat batch, int64 ``[n]``, ascending.
        dense: whether the planned tokens are the first ``n`` of the batch without a gap.
        request: resident index of each planned token, int32 ``[n]``.
        selected: selector bits of each planned token, uint64 ``[n]``.
    """

    def __init__(self, max_tokens: int) -> None:
        self._index: npt.NDArray[np.int64] = np.zeros(max_tokens, np.int64)
        self._request: npt.NDArray[np.int32] = np.zeros(max_tokens, np.int32)
        self._selected: npt.NDArray[np.uint64] = np.zeros(max_tokens, np.uint64)
        self.segments: list[Segment] = []
        self.active = False
        self.dense = False
        self.n = 0

    def clear(self) -> None:
        """No token is edited or read until the next :meth:`build`."""
        self.active = False
        self.n = 0
        self.segments = []

    def build(
        self,
        residents: ResidentSet,
        request_ids: Sequence[str],
        query_start: npt.NDArray[np.int32],
        positions: npt.NDArray[np.int64],
        token_ids: npt.NDArray[Any],
    ) -> None:
        """Plan the step.

        Args:
            residents: the requests that carry programs or inspections.
            request_ids: the batch's rows in order.
            query_start: row r owns the tokens ``query_start[r] … query_start[r + 1]``, ``[rows + 1]``.
            positions, token_ids: of every token of the flat batch, ``[tokens]``.
        """
        self.clear()
        if not residents.requests:
            return
        residents.refresh()
        index = residents.index
        rows = np.array([index.get(r, -1) for r in request_ids], np.int32)
        if (rows < 0).all():
            return
        table = residents.selectors
        self.n = select_tokens(
            query_start,
            positions,
            token_ids,
            rows,
            table.requests,
            table.interval_ptr,
            table.intervals,
            table.id_ptr,
            table.ids,
            table.bos,
            self._index,
            self._request,
            self._selected,
        )
        at = 0
        for row, q in enumerate(rows.tolist()):
            if q < 0:
                continue
            start, stop = int(query_start[row]), int(query_start[row + 1])
            if start == stop:
                continue
            segment = slice(at, at + stop - start)
            resident = residents.requests[request_ids[row]]
            first = int(positions[start])
            self.segments.append(Segment(resident, q, segment, first, row))
            if resident.history is not None:
                self._selected[segment] |= resident.history.take(first, token_ids[start:stop])
            at = segment.stop
        self.dense = self.n > 0 and int(self._index[self.n - 1]) == self.n - 1
        self.active = self.n > 0

    @property
    def index(self) -> torch.Tensor:
        """See the class."""
        return torch.from_numpy(self._index[: self.n])

    @property
    def request(self) -> npt.NDArray[np.int32]:
        """See the class."""
        return self._request[: self.n]

    @property
    def selected(self) -> npt.NDArray[np.uint64]:
        """See the class."""
        return self._selected[: self.n]
