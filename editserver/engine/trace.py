"""What one request's rules said at its tokens, joined from the step records by position; the last write wins."""

from __future__ import annotations

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
        refusal: the first position at which a refusing action was active, as (action, position).
    """

    def __init__(self, program: RuleProgram) -> None:
        self.refusal: tuple[int, int] | None = None
        self._counts = (len(program.propositions), len(program.conclusions), len(program.actions))
        self._bits: list[Array] = [np.zeros((0, (count + 63) // 64), np.uint64) for count in self._counts]
        self._scores: Array = np.zeros((0, self._counts[0]), np.float32)
        self._refusing = np.flatnonzero([action.refuses for action in program.actions])
        self._n = 0

    @property
    def refuses(self) -> bool:
        """Whether any action can end the request."""
        return len(self._refusing) > 0

    def add(self, record: RuleRecord, start: int, n: int) -> None:
        """Note the step whose own tokens are at ``start … start + n − 1``."""
        covered = start + n - record.first
        self._reserve(start + n)
        for array, data in zip(self._bits, (record.held, record.concluded, record.active), strict=True):
            array[record.first : start + n] = np.frombuffer(data, np.uint64).reshape(covered, -1)
        self._n = max(self._n, start + n)
        scores = self._scores[start : start + n]
        scores[:] = np.nan
        if record.scores:
            scores[self._unpacked(0, start, start + n)] = np.frombuffer(record.scores, np.float32)
        if self.refuses and self.refusal is None:
            tokens, actions = np.nonzero(self._unpacked(2, record.first, start + n)[:, self._refusing])
            if len(tokens):
                self.refusal = int(self._refusing[actions[0]]), record.first + int(tokens[0])

    def trace(self) -> RuleTrace:
        """Everything so far; scores are NaN where nothing holds, and at positions that only a prefix cache has seen."""
        held, concluded, active = (self._unpacked(which, 0, self._n) for which in range(3))
        return RuleTrace(held, concluded, active, np.where(held, self._scores[: self._n], np.float32(np.nan)))

    def _reserve(self, size: int) -> None:
        have = len(self._scores)
        if size <= have:
            return
        grow = ((0, max(size, 2 * have) - have), (0, 0))
        self._bits = [np.pad(array, grow) for array in self._bits]
        self._scores = np.pad(self._scores, grow, constant_values=np.nan)

    def _unpacked(self, which: int, start: int, stop: int) -> npt.NDArray[np.bool_]:
        words = self._bits[which][start:stop].astype("<u8", copy=False)
        count = self._counts[which]
        if not count:
            return np.zeros((stop - start, 0), np.bool_)
        return np.unpackbits(words.view(np.uint8), axis=1, count=count, bitorder="little").astype(np.bool_)
