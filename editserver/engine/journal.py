"""What really happened to one request, by absolute position; the last write wins.

Recomputation after preemption, merged chunks and rejected tokens need no special case: a position that is computed
again simply overwrites what was noted for it, and positions past the last delivered token are never asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from editserver.engine.trace import RuleLog
from editserver.engine.wire import StepRecord
from interventions.errors import InterventionError
from interventions.program import Payload
from interventions.rules.machine import RuleTrace


@dataclass(frozen=True)
class Stats:
    """Receipt numbers of one intervention at one layer. Doses are ||delta|| / ||h|| over the tokens where it fired."""

    fired: int
    dose_mean: float
    dose_max: float
    clamped: int


class Journal:
    """Step records of one request (one choice), joined by position.

    Attributes:
        error: set as soon as the request must end (``dose_exceeded``); the server then stops it.
    """

    def __init__(self, payload: Payload) -> None:
        self.payload = payload
        self.error: InterventionError | None = None
        program = payload.program
        self._layers = {} if program is None else {lp.layer: i for i, lp in enumerate(program.layers)}
        gates = (
            [(lp.layer, i) for lp in program.layers for i, g in enumerate(lp.gates) if g.over_sequence]
            if program
            else []
        )
        self._gates = {place: i for i, place in enumerate(gates)}
        self._heard: tuple[tuple[int, float], ...] = ((-1, 0.0),) * len(gates)
        self._seen: npt.NDArray[np.bool_] = np.zeros(0, np.bool_)
        self._fired: npt.NDArray[np.uint64] = np.zeros((len(self._layers), 0), np.uint64)
        self._dose: npt.NDArray[np.float32] = np.zeros((len(self._layers), 0), np.float32)
        self._clamped: npt.NDArray[np.uint8] = np.zeros((len(self._layers), 0), np.uint8)
        self._reads: list[dict[int, tuple[npt.NDArray[np.float32], npt.NDArray[np.int32], npt.NDArray[np.float32]]]]
        self._reads = [{} for _ in payload.reads]
        self._rules = RuleLog(program.rules) if program is not None and program.rules is not None else None

    def _reserve(self, size: int) -> None:
        have = len(self._seen)
        if size <= have:
            return
        grow = max(size, 2 * have) - have
        self._seen = np.pad(self._seen, (0, grow))
        self._fired = np.pad(self._fired, ((0, 0), (0, grow)))
        self._dose = np.pad(self._dose, ((0, 0), (0, grow)))
        self._clamped = np.pad(self._clamped, ((0, 0), (0, grow)))

    def add(self, record: StepRecord) -> None:
        """Note one step."""
        here = slice(record.start, record.start + record.n)
        self._reserve(here.stop)
        self._seen[here] = True
        self._heard = record.gates
        if self._layers:
            shape = (len(self._layers), record.n)
            self._fired[:, here] = np.frombuffer(record.fired, np.uint64).reshape(shape)
            self._dose[:, here] = np.frombuffer(record.dose, np.float32).reshape(shape)
            clamped = np.frombuffer(record.clamped, np.uint8).reshape(shape)
            self._clamped[:, here] = clamped
            if self.error is None and b"\x02" in record.clamped:
                layer, token = (int(i[0]) for i in np.nonzero(clamped == 2))
                dose = float(self._dose[layer, record.start + token])
                assert self.payload.program is not None
                self.error = InterventionError(
                    "dose_exceeded",
                    f"the edit at layer {self.payload.program.layers[layer].layer}, position {record.start + token} has "
                    f"dose {dose:.3f}; this server refuses doses above {self.payload.program.max_dose:g}",
                    "interventions",
                )
        if self._rules is not None and record.rules is not None:
            self._rules.add(record.rules, record.start, record.n)
        for read, (listed, top_index, top_value) in zip(self._reads, record.reads, strict=True):
            values = np.frombuffer(listed, np.float32).reshape(record.n, -1)
            indices = np.frombuffer(top_index, np.int32).reshape(record.n, -1)
            tops = np.frombuffer(top_value, np.float32).reshape(record.n, -1)
            for i in range(record.n):
                read[record.start + i] = (values[i], indices[i], tops[i])

    def covers(self, start: int, stop: int) -> bool:
        """Whether every position in ``[start, stop)`` was reported by the engine."""
        return stop <= len(self._seen) and bool(self._seen[start:stop].all())

    @property
    def computed_from(self) -> int:
        """First position that was computed (not taken from the prefix cache) for this request."""
        return int(self._seen.argmax()) if self._seen.any() else 0

    def stats(self, intervention: int, layer: int, stop: int) -> Stats:
        """Numbers of intervention ``intervention`` (index in the request) at ``layer`` over positions below ``stop``."""
        if layer not in self._layers:
            return Stats(0, 0.0, 0.0, 0)
        row = self._layers[layer]
        fired = (self._fired[row, :stop] >> np.uint64(intervention)) & np.uint64(1) != 0
        doses = self._dose[row, :stop][fired]
        clamped = int((self._clamped[row, :stop][fired] != 0).sum())
        if not len(doses):
            return Stats(0, 0.0, 0.0, 0)
        return Stats(int(fired.sum()), float(doses.mean(dtype=np.float64)), float(doses.max()), clamped)

    def gate(self, layer: int, gate: int) -> tuple[int | None, float]:
        """Sequence gate number ``gate`` of the program at ``layer``: first position at which it was open (None: never) and
        the largest statistic so far, over cached positions too.

        Raises:
            KeyError: there is no such gate, or it is a trigger.
        """
        open_from, statistic = self._heard[self._gates[layer, gate]]
        return (None if open_from < 0 else open_from), statistic

    @property
    def rules(self) -> RuleTrace | None:
        """What the request's rules said, over cached positions too; None without rules. Made anew on every access."""
        return self.rules_from(0)

    def rules_from(self, start: int) -> RuleTrace | None:
        """The rows of :attr:`rules` for the positions from ``start`` on, in time proportional to their number."""
        return None if self._rules is None else self._rules.trace(start)

    @property
    def refusal(self) -> tuple[int, int] | None:
        """The refusing action that was active first, and at which position: no output token from there on is delivered."""
        return None if self._rules is None else self._rules.refusal

    @property
    def may_refuse(self) -> bool:
        """Whether the request's rules have a refusing action: its outputs come one token late."""
        return self._rules is not None and self._rules.refuses

    def readings(self, read: int, start: int, stop: int) -> list[tuple[int, list[tuple[int, float]]]]:
        """Readings of inspection ``read`` for the positions in ``[start, stop)`` that it selects, in order.

        Each is ``(position, [(feature index, activation), …])``: the listed features first, zeros included, then the
        largest non-zero others of the top-k by |activation|.
        """
        spec = self.payload.reads[read]
        found: list[tuple[int, list[tuple[int, float]]]] = []
        for position in range(start, stop):
            values = self._reads[read].get(position)
            if values is None:
                continue
            listed, indices, tops = values
            if (len(listed) and np.isnan(listed[0])) or (len(indices) and indices[0] == NOT_SELECTED):
                continue
            features = [(index, float(value)) for index, value in zip(spec.features, listed, strict=True)]
            known = set(spec.features)
            features += [
                (int(index), float(value))
                for index, value in zip(indices, tops, strict=True)
                if value != 0.0 and int(index) not in known
            ]
            found.append((position, features))
        return found

    def listed(self, read: int, start: int, stop: int) -> npt.NDArray[np.float32]:
        """The listed features of inspection ``read`` alone, float32 ``[n, features]``: a row per position that it selects."""
        rows = [self._reads[read][position][0] for position in range(start, stop) if position in self._reads[read]]
        width = len(self.payload.reads[read].features)
        found = np.stack(rows) if rows else np.zeros((0, width), np.float32)
        selected: npt.NDArray[np.float32] = found[~np.isnan(found).all(axis=1)]
        return selected


NOT_SELECTED = -2
"""Top-k index (NaN for listed features) that marks a token outside the inspection's selector."""
