"""One step's plan: for every token of the flat batch, the program it runs and the selectors that hold for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from editserver.engine.kernel_plan import select_tokens
from editserver.engine.resident import Resident, ResidentSet


@dataclass(slots=True)
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
        stop: the flat batch has at least so many tokens: the last planned one is right before.
        all_places: where each planned token stands in the flat batch, int64, ascending; valid up to ``n``.
        all_requests: resident index of each planned token, int32; valid up to ``n``.
        all_selected: selector bits of each planned token, uint64; valid up to ``n``.
        all_positions: position of each planned token, int64; valid up to ``n`` in steps without segments alone.
    """

    def __init__(self, max_tokens: int) -> None:
        self.all_places: npt.NDArray[np.int64] = np.zeros(max_tokens, np.int64)
        self.all_requests: npt.NDArray[np.int32] = np.zeros(max_tokens, np.int32)
        self.all_selected: npt.NDArray[np.uint64] = np.zeros(max_tokens, np.uint64)
        self.all_positions: npt.NDArray[np.int64] = np.zeros(max_tokens, np.int64)
        self.segments: list[Segment] = []
        self.active = False
        self.n = self.stop = 0
        self._known: tuple[int, Sequence[str], list[int], npt.NDArray[np.int32]] = (-1, (), [], np.zeros(0, np.int32))

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
        index, rows = self._rows(residents, request_ids)
        if max(index, default=-1) < 0:
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
            self.all_places,
            self.all_requests,
            self.all_selected,
        )
        if not self.n:
            return
        starts = query_start.tolist()
        at = 0
        for row, q in enumerate(index):
            start, stop = starts[row], starts[row + 1]
            if q < 0 or start == stop:
                continue
            segment = slice(at, at + stop - start)
            resident = residents.requests[request_ids[row]]
            first = int(positions[start])
            self.segments.append(Segment(resident, q, segment, first, row))
            if resident.history is not None:
                self.all_selected[segment] |= resident.history.take(first, token_ids[start:stop])
            at = segment.stop
        self.stop = int(self.all_places[self.n - 1]) + 1
        self.active = True

    def resume(self, n: int, stop: int) -> None:
        """The arrays hold a step of ``n`` tokens, written by somebody else, without segments; ``stop`` as above."""
        self.n, self.stop, self.active = n, stop, True

    def _rows(self, residents: ResidentSet, request_ids: Sequence[str]) -> tuple[list[int], npt.NDArray[np.int32]]:
        """Resident index of every row of the batch, -1 for none: mostly the same as in the step before."""
        version, names, index, rows = self._known
        if version != residents.version or names != request_ids:
            index = [residents.index.get(name, -1) for name in request_ids]
            rows = np.array(index, np.int32)
            self._known = residents.version, list(request_ids), index, rows
        return index, rows

    @property
    def places(self) -> npt.NDArray[np.int64]:
        """``all_places`` of this step, ``[n]``."""
        return self.all_places[: self.n]

    @property
    def request(self) -> npt.NDArray[np.int32]:
        """``all_requests`` of this step, ``[n]``."""
        return self.all_requests[: self.n]

    @property
    def selected(self) -> npt.NDArray[np.uint64]:
        """``all_selected`` of this step, ``[n]``."""
        return self.all_selected[: self.n]
