"""The selectors of all resident requests, as flat tables that a kernel can walk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from editserver.engine.stack import Pointers, Stack
from interventions.selectors import Selector

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class SelectorPart:
    """One request's selectors, resolved for its own prompt length; the attributes of :class:`SelectorTable`.

    ``n`` is how many they are, int32 ``[1]``.
    """

    n: Array
    interval_ends: Array
    intervals: Array
    id_ends: Array
    ids: Array
    bos: Array

    @classmethod
    def of(cls, selectors: tuple[Selector, ...], prompt_len: int) -> SelectorPart:
        """Resolve and flatten, once for all that select alike: parts are only read."""
        return _resolved(selectors, prompt_len if any(s.needs_prompt_len for s in selectors) else 0)


@lru_cache(maxsize=32)
def _resolved(selectors: tuple[Selector, ...], prompt_len: int) -> SelectorPart:
    intervals = [s.intervals(prompt_len) for s in selectors]
    return SelectorPart(
        np.array([len(selectors)], np.int32),
        np.cumsum([len(i) for i in intervals], dtype=np.int32),
        np.array([pair for i in intervals for pair in i], np.int32).reshape(-1, 2),
        np.cumsum([len(s.token_ids) for s in selectors], dtype=np.int32),
        np.array([t for s in selectors for t in s.token_ids], np.int32),
        np.array([s.include_bos for s in selectors], np.bool_),
    )


class SelectorTable:
    """CSR: resident → selector → intervals, ids.

    Attributes:
        requests: int32 ``[residents + 1]`` into the selectors.
        interval_ptr, intervals: int32 ``[selectors + 1]`` into int32 ``[k, 2]``, half open.
        id_ptr, ids: int32 ``[selectors + 1]`` into the token ids that they name.
        bos: bool ``[selectors]``, whether position 0 may be selected by its id.
    """

    def __init__(self) -> None:
        self._requests, self._interval_ptr, self._id_ptr = Pointers(), Pointers(), Pointers()
        self._intervals, self._ids, self._bos = Stack(np.int32, 2), Stack(np.int32), Stack(np.bool_)
        self.finish()

    def push(self, parts: Sequence[SelectorPart]) -> None:
        """Residents behind the others."""
        self._requests.push([part.n for part in parts])
        self._interval_ptr.push([part.interval_ends for part in parts])
        self._intervals.push([part.intervals for part in parts])
        self._id_ptr.push([part.id_ends for part in parts])
        self._ids.push([part.ids for part in parts])
        self._bos.push([part.bos for part in parts])

    def keep(self, which: Array) -> None:
        """The residents of whom ``which`` (bool) is not true are gone."""
        selectors = self._requests.rows_of(which)
        self._intervals.keep(self._interval_ptr.rows_of(selectors))
        self._ids.keep(self._id_ptr.rows_of(selectors))
        self._interval_ptr.keep(selectors)
        self._id_ptr.keep(selectors)
        self._bos.keep(selectors)
        self._requests.keep(which)

    def clear(self) -> None:
        """All residents are gone."""
        for stack in (self._requests, self._interval_ptr, self._intervals, self._id_ptr, self._ids, self._bos):
            stack.clear()

    def finish(self) -> None:
        """After changes: the attributes are those of the residents that are there now."""
        self.requests, self.interval_ptr, self.intervals = (
            stack.rows for stack in (self._requests, self._interval_ptr, self._intervals)
        )
        self.id_ptr, self.ids, self.bos = (stack.rows for stack in (self._id_ptr, self._ids, self._bos))
