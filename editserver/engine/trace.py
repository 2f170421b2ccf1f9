"""What one request's rules said at its tokens, joined from the step records by position; the last write wins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from editserver.engine.wire import RuleRecord
from interventions.rules.code import RuleProgram
from interventions.rules.machine import RuleTrace

Array = npt.NDArray[Any]


class RuleLog:
    """The records of one request's rules.

    Attributes:
        refuses: whether any action can end the request.
        refusal: the first position at which a refusing action was active, as (action, position).
    """

    def __init__(self, program: RuleProgram) -> None:
        self.refusal: tuple[int, int] | None = None
        self._counts = (len(program.propositions), len(program.conclusions), len(program.actions))
        self._bits: list[Array] = [np.zeros((0, (count + 63) // 64), np.uint64) for count in self._counts]
        self._scores: Array = np.zeros((0, self._counts[0]), np.float32)
        self._refusing = _packed([action.refuses for action in program.actions])
        self.refuses = bool(self._refusing.any())
        self._n = 0
        self._noted: list[tuple[RuleRecord, int, int]] = []

    def add(self, record: RuleRecord, start: int, n: int) -> None:
        """Note the step whose own tokens are at ``start … start + n − 1``."""
        self._noted.append((record, start, n))
        if self.refuses and self.refusal is None:
            words = np.frombuffer(record.active, np.uint64)
            if (words.reshape(-1, self._bits[2].shape[1]) & self._refusing).any():
                action, token = self._first(words)
                self.refusal = action, record.first + token

    def trace(self, start: int = 0) -> RuleTrace:
        """The positions from ``start`` on, as far as they are known, in time proportional to their number.

        Scores are NaN where nothing holds, and at positions that only a prefix cache has seen.
        """
        for noted in self._noted:
            self._join(*noted)
        self._noted.clear()
        here = slice(start, self._n)
        held, concluded, active = (
            _unpacked(bits[here], count) for bits, count in zip(self._bits, self._counts, strict=True)
        )
        return RuleTrace(held, concluded, active, np.where(held, self._scores[here], np.float32(np.nan)))

    def _join(self, record: RuleRecord, start: int, n: int) -> None:
        stop = start + n
        self._reserve(stop)
        for array, data in zip(self._bits, (record.held, record.concluded, record.active), strict=True):
            array[record.first : stop] = np.frombuffer(data, np.uint64).reshape(stop - record.first, -1)
        self._n = max(self._n, stop)
        scores = self._scores[start:stop]
        scores[:] = np.nan
        if record.scores:
            scores[_unpacked(self._bits[0][start:stop], self._counts[0])] = np.frombuffer(record.scores, np.float32)

    def _first(self, words: Array) -> tuple[int, int]:
        """The refusing action that is active first, and how many tokens after the first of ``words``."""
        active = _unpacked(words.reshape(-1, self._bits[2].shape[1]) & self._refusing, self._counts[2])
        token, action = np.argwhere(active)[0].tolist()
        return action, token

    def _reserve(self, size: int) -> None:
        have = len(self._scores)
        if size <= have:
            return
        grow = ((0, max(size, 2 * have) - have), (0, 0))
        self._bits = [np.pad(array, grow) for array in self._bits]
        self._scores = np.pad(self._scores, grow, constant_values=np.nan)


def _unpacked(words: Array, count: int) -> npt.NDArray[np.bool_]:
    """Rows of 64-bit words as ``count`` bits each, bool ``[n, count]``."""
    if not count:
        return np.zeros((len(words), 0), np.bool_)
    flat = np.ascontiguousarray(words, "<u8").view(np.uint8)
    return np.unpackbits(flat, axis=1, count=count, bitorder="little").astype(np.bool_)


def _packed(bits: Sequence[bool]) -> Array:
    """The opposite for one row: uint64 ``[words]``."""
    flat = np.packbits(np.array(bits, np.bool_), bitorder="little")
    return np.pad(flat, (0, -len(flat) % 8)).view("<u8")
