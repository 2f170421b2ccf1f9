"""Decoding: a step in which every request has one token, and the requests are those of the step before.

Most steps of a server are such. What is new in them are positions and tokens; all else, the form of the message with the step's
records included, is written down when such steps begin, and two calls of compiled functions are left. For steps in which the C++
op can do all there is to do (:mod:`editserver.engine.native`): the records then speak of edits only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from editserver.engine.kernel_cpu import A
from editserver.engine.kernel_plan import N_DECODING, D, begin_decoding, end_decoding
from editserver.engine.native import Jobs, address
from editserver.engine.outcome import Outcomes
from editserver.engine.plan import Plan
from editserver.engine.resident import ResidentSet
from editserver.engine.wire import form_of, step_of

Array = npt.NDArray[Any]


class Decoding:
    """One such step after the other, as long as :meth:`goes_on`."""

    def __init__(
        self, residents: ResidentSet, names: Sequence[str], plan: Plan, outcomes: Outcomes, jobs: Jobs
    ) -> None:
        """``names``: the batch's rows, in order; the rest is the worker's, as it was in the step before."""
        self._version, self._names = residents.version, list(names)
        rows = np.array([residents.index.get(name, -1) for name in names], np.int32)
        planned = [residents.requests[name] for name in names if name in residents.requests]
        forms = [form_of(one.request_id, len(one.edited)) for one in planned]
        self._message = bytearray(step_of([form for form, _ in forms]))
        sizes = [len(form) for form, _ in forms]
        begins = np.cumsum([len(self._message) - sum(sizes), *sizes[:-1]])
        layer_ptr = np.cumsum([0, *(len(one.edited) for one in planned)], dtype=np.int32)
        layers = np.array([outcomes.place[layer] for one in planned for layer in one.edited], np.int32)
        selectors = residents.selectors
        fired, dose, flags = outcomes.arrays
        arrays: dict[int, Array] = {
            D.query_start: np.arange(len(names) + 1, dtype=np.int32),
            D.row_request: rows,
            D.request_selectors: selectors.requests,
            D.interval_ptr: selectors.interval_ptr,
            D.interval_rows: selectors.intervals,
            D.id_ptr: selectors.id_ptr,
            D.wanted_ids: selectors.ids,
            D.bos: selectors.bos,
            D.places: plan.all_places,
            D.token_request: plan.all_requests,
            D.token_selected: plan.all_selected,
            D.kept: plan.all_positions,
            D.at: begins + np.array([place for _, place in forms], np.int64),
            D.layer_ptr: layer_ptr,
            D.layers: layers,
            D.fired: fired,
            D.dose: dose,
            D.flags: flags,
            D.message: np.frombuffer(self._message, np.uint8),
            D.jobs: jobs.table,
            D.due: jobs.due.copy(),
        }
        block = np.zeros(N_DECODING, np.int64)
        for column, array in arrays.items():
            block[column] = address(array)
        numbers = {
            D.n: len(planned),
            D.rows: len(names),
            D.stop: int(np.flatnonzero(rows >= 0)[-1]) + 1,
            D.tokens: len(plan.all_places),
            D.residents: len(selectors.requests) - 1,
            D.selectors: len(selectors.bos),
            D.intervals: len(selectors.intervals),
            D.ids: len(selectors.ids),
            D.armed: len(fired),
            D.told_layers: len(layers),
            D.message_bytes: len(self._message),
            D.job_rows: len(jobs.table),
            D.tokens_at: A.n,
        }
        for column, number in numbers.items():
            block[column] = number
        self._kept, self._block = arrays, block
        self._at = address(block)
        self.n, self.stop = numbers[D.n], numbers[D.stop]

    def goes_on(self, residents: ResidentSet, names: Sequence[str]) -> bool:
        """Whether the step that follows, a token for each of ``names``, is one more of this kind."""
        return residents.version == self._version and not residents.stale and names == self._names

    def begin(self, positions: torch.Tensor, token_ids: torch.Tensor) -> None:
        """Plan the step. Both are the batch's, int64 and int32, contiguous."""
        begin_decoding(self._at, positions.data_ptr(), token_ids.data_ptr())

    def end(self, *, certain: bool = False) -> bytes | None:
        """The step's records, encoded. None where the C++ op did not do its part at all layers: if somebody else did, that is
        ``certain``."""
        return bytes(self._message) if end_decoding(self._at, certain) else None


def readable(positions: torch.Tensor, token_ids: torch.Tensor) -> bool:
    """Whether :meth:`Decoding.begin` can read them where they are."""
    return (
        positions.dtype is torch.int64
        and token_ids.dtype is torch.int32
        and positions.is_contiguous()
        and token_ids.is_contiguous()
    )
