"""How many bank rows the requests in flight need: refuses what could only queue for ever or for too long.

The engine core owns the bank and lets a request wait until its rows fit. This is the API's conservative count in front
of it, so that the queue stays bounded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from editserver import metrics
from interventions.errors import InterventionError

QUEUE_FACTOR = 4
"""Distinct rows in flight may reach this many banks; beyond it requests are answered with 429."""


class Capacity:
    """Distinct rows of the requests in flight, by reference count."""

    def __init__(self, bank_rows: int) -> None:
        self.bank_rows = bank_rows
        self._holders: Counter[str] = Counter()
        metrics.BANK_CAPACITY.set(bank_rows)
        metrics.BANK_ROWS.set(0)

    @property
    def in_use(self) -> int:
        """Distinct rows that the requests in flight need."""
        return len(self._holders)

    def reserve(self, rows: Sequence[str]) -> Callable[[], None]:
        """Count ``rows`` (distinct keys) as in flight; call the result once when the request has ended.

        Raises:
            InterventionError: ``limit_exceeded`` if they can never fit, ``capacity`` if too many are waiting.
        """
        if len(rows) > self.bank_rows:
            message = f"the request needs {len(rows)} rows; the bank has {self.bank_rows}"
            raise InterventionError("limit_exceeded", message, "interventions")
        new = sum(1 for row in rows if row not in self._holders)
        if self.in_use + new > QUEUE_FACTOR * self.bank_rows:
            message = f"the rows of the requests in flight fill the bank ({self.bank_rows} rows) {QUEUE_FACTOR} times"
            raise InterventionError("capacity", f"{message}; try again shortly")
        self._holders.update(rows)
        metrics.BANK_ROWS.set(self.in_use)
        released = False

        def release() -> None:
            nonlocal released
            if released:
                return
            released = True
            self._holders.subtract(rows)
            for row in rows:
                if self._holders[row] <= 0:
                    del self._holders[row]
            metrics.BANK_ROWS.set(self.in_use)

        return release
