"""What really happened to one request, by absolute position; the last write wins.

Recomputation after preemption and merged chunks need no special case: a position that is computed again simply overwrites
what was noted for it. Of speculation only accepted tokens come here (:meth:`editserver.engine.wire.StepRecord.cut`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

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


Numbers = TypeVar("Numbers", bound=np.generic)


def _longer(rows: npt.NDArray[Numbers], size: int) -> npt.NDArray[Numbers]:
    """``rows [..., n]`` with zeros up to ``size``."""
    longer = np.zeros((*rows.shape[:-1], size), rows.dtype)
    longer[..., : rows.shape[-1]] = rows
    return longer


class Journal:
    """Step records of one request (one choice), joined by position.

    Attributes:
        error: set as soon as the request must end (``dose_exceeded``); the server then stops it.
    """

    def __init__(self, payload: Payload) -> None:
        self.payload = payload
        self.error: InterventionError | None = None
        self._error_at = -1
        program = payload.program
        self._layers = {} if program is None else {lp.layer: i for i, lp in enumerate(program.layers)}
        gates = (
            [(lp.layer, i) for lp in program.layers for i, g in enumerate(lp.gates) if g.over_sequence]
            if program
            else []
        )
        self._gates = {place: i for i, place in enumerate(gates)}
        self._heard: tuple[tuple[tuple[int, float], ...], ...] = (((-1, 0.0),),) * len(gates)
        self._end = 0
        self._seen: npt.NDArray[np.bool_] = np.zeros(0, np.bool_)
        self._fired: npt.NDArray[np.uint64] = np.zeros((len(self._layers), 0), np.uint64)
        self._dose: npt.NDArray[np.float32] = np.zeros((len(self._layers), 0), np.float32)
        self._clamped: npt.NDArray[np.uint8] = np.zeros((len(self._layers), 0), np.uint8)
        self._reads: list[dict[int, tuple[npt.NDArray[np.float32], npt.NDArray[np.int32], npt.NDArray[np.float32]]]]
        self._reads = [{} for _ in payload.reads]
        self._rules = RuleLog(program.rules) if program is not None and program.rules is not None else None
        self._noted: list[StepRecord] = []

    def _reserve(self, size: int) -> None:
        have = len(self._seen)
        if size <= have:
            return
        size = max(size, 2 * have)
        self._seen = _longer(self._seen, size)
        self._fired, self._dose, self._clamped = (
            _longer(self._fired, size),
            _longer(self._dose, size),
            _longer(self._clamped, size),
        )

    def add(self, record: StepRecord) -> None:
        """Note one step."""
        self._noted.append(record)
        self._heard, self._end = record.gates, record.start + record.n
        if self.error is None and b"\x02" in record.clamped:
            self._refuse(record)
        if self._rules is not None and record.rules is not None:
            self._rules.add(record.rules, record.start, record.n)
        if len(self._noted) == MOST_NOTED:
            self._join()

    def _refuse(self, record: StepRecord) -> None:
        shape = (len(self._layers), record.n)
        over = np.frombuffer(record.clamped, np.uint8).reshape(shape) == 2
        token, layer = (int(i[0]) for i in np.nonzero(over.T))
        dose = float(np.frombuffer(record.dose, np.float32).reshape(shape)[layer, token])
        self._error_at = record.start + token
        assert self.payload.program is not None
        self.error = InterventionError(
            "dose_exceeded",
            f"the edit at layer {self.payload.program.layers[layer].layer}, position {self._error_at} has dose {dose:.3f}; "
            f"this server refuses doses above {self.payload.program.max_dose:g}",
            "interventions",
        )

    def _join(self) -> None:
        """Enter what was noted: while a request decodes, many steps of one token each at a time, which cost little more than
        one."""
        noted, self._noted = self._noted, []
        first = 0
        for i, record in enumerate(noted):
            after = noted[i + 1] if i + 1 < len(noted) else None
            if after is None or record.n != 1 or after.n != 1 or after.start != record.start + 1:
                self._enter(noted[first : i + 1])
                first = i + 1

    def _enter(self, records: list[StepRecord]) -> None:
        """One record, or several of one token each, at consecutive positions."""
        start, n = records[0].start, sum(record.n for record in records)
        here = slice(start, start + n)
        self._reserve(here.stop)
        self._seen[here] = True
        if self._layers:
            # of one token, [layers, 1]: then joined as [tokens, layers]
            turned = len(records) > 1
            shape = (n, len(self._layers)) if turned else (len(self._layers), n)
            for target, parts in (
                (self._fired, [record.fired for record in records]),
                (self._dose, [record.dose for record in records]),
                (self._clamped, [record.clamped for record in records]),
            ):
                values = np.frombuffer(b"".join(parts), target.dtype).reshape(shape)
                target[:, here] = values.T if turned else values
        for number, read in enumerate(self._reads):
            values, indices, tops = (
                np.frombuffer(b"".join([record.reads[number][i] for record in records]), dtype).reshape(n, -1)
                for i, dtype in enumerate((np.float32, np.int32, np.float32))
            )
            for i in range(n):
                read[start + i] = (values[i], indices[i], tops[i])

    def covers(self, start: int, stop: int) -> bool:
        """Whether every position in ``[start, stop)`` was reported by the engine."""
        self._join()
        return stop <= len(self._seen) and bool(self._seen[start:stop].all())

    @property
    def computed_from(self) -> int:
        """First position that was computed (not taken from the prefix cache) for this request."""
        self._join()
        return int(self._seen.argmax()) if self._seen.any() else 0

    def fired(self, layer: int, start: int, stop: int) -> npt.NDArray[np.uint64]:
        """Bits of the interventions that changed something at ``layer``, uint64 by position; KeyError: no such layer."""
        self._join()
        return self._fired[self._layers[layer], start:stop]

    def stats(self, intervention: int, layer: int, stop: int) -> Stats:
        """Numbers of intervention ``intervention`` (index in the request) at ``layer`` over positions below ``stop``."""
        self._join()
        if layer not in self._layers:
            return Stats(0, 0.0, 0.0, 0)
        row = self._layers[layer]
        fired = (self._fired[row, :stop] >> np.uint64(intervention)) & np.uint64(1) != 0
        doses = self._dose[row, :stop][fired]
        clamped = int((self._clamped[row, :stop][fired] != 0).sum())
        if not len(doses):
            return Stats(0, 0.0, 0.0, 0)
        return Stats(int(fired.sum()), float(doses.mean(dtype=np.float64)), float(doses.max()), clamped)

    def gate(self, layer: int, gate: int, stop: int | None = None) -> tuple[int | None, float]:
        """Sequence gate number ``gate`` of the program at ``layer``: first position at which it was open (None: never) and
        the largest statistic so far, over cached positions too.

        ``stop`` leaves out what the last step fed from that position on (drafts behind a stop string).

        Raises:
            KeyError: there is no such gate, or it is a trigger.
        """
        facts = self._heard[self._gates[layer, gate]]
        beyond = 0 if stop is None else max(0, self._end - stop)
        open_from, statistic = facts[max(0, len(facts) - 1 - beyond)]
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
    def ends_at(self) -> int | None:
        """Position at which :attr:`error` or :attr:`refusal` ends the request, whichever is first; None for neither."""
        found = [] if self.error is None else [self._error_at]
        return min(found if self.refusal is None else [*found, self.refusal[1]], default=None)

    def stopped_before(self) -> None:
        """The request had ended by itself (at a stop string) before the token that would have ended it: forget that."""
        self.error = None
        if self._rules is not None:
            self._rules.refusal = None

    @property
    def may_refuse(self) -> bool:
        """Whether the request's rules have a refusing action: its outputs come one token late."""
        return self._rules is not None and self._rules.refuses

    def readings(self, read: int, start: int, stop: int) -> list[tuple[int, list[tuple[int, float]]]]:
        """Readings of inspection ``read`` for the positions in ``[start, stop)`` that it selects, in order.

        Each is ``(position, [(feature index, activation), …])``: the listed features first, zeros included, then the
        largest non-zero others of the top-k by |activation|.
        """
        self._join()
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
        self._join()
        rows = [self._reads[read][position][0] for position in range(start, stop) if position in self._reads[read]]
        width = len(self.payload.reads[read].features)
        found = np.stack(rows) if rows else np.zeros((0, width), np.float32)
        selected: npt.NDArray[np.float32] = found[~np.isnan(found).all(axis=1)]
        return selected


MOST_NOTED = 256
"""Steps that wait to be entered, at most."""

NOT_SELECTED = -2
"""Top-k index (NaN for listed features) that marks a token outside the inspection's selector."""
