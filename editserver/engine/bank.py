"""Who owns which slot of the row bank. One owner (the core process), so that all workers agree by construction."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class BankLedger:
    """Reference-counted slots, keyed by row content, least recently used first when a free slot is needed.

    A slot whose count falls to zero keeps its row until the slot is wanted for another one, so a row that comes back
    costs no upload.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"the row bank needs at least one row, got {capacity}")
        self.capacity = capacity
        self._rows: dict[str, _Row] = {}
        self._idle: OrderedDict[str, None] = OrderedDict()
        self._unused = list(range(capacity - 1, -1, -1))
        self._held: dict[str, list[_Row]] = {}

    @property
    def in_use(self) -> int:
        """Rows that some request holds."""
        return len(self._rows) - len(self._idle)

    @property
    def holders(self) -> int:
        """Requests that hold rows."""
        return len(self._held)

    def acquire(self, holder: str, keys: Sequence[str]) -> list[int] | None:
        """Slots for ``keys`` (distinct), all or none: None when too many rows are held by others."""
        if holder in self._held:
            raise ValueError(f"request {holder} already holds rows")
        known, idle = self._rows, self._idle
        found = [known.get(key) for key in keys]
        n_new = found.count(None)
        if n_new > len(self._unused):
            reusable = sum(row is not None and not row.count for row in found)
            if n_new > len(self._unused) + len(idle) - reusable:
                return None
        rows = []
        for row in found:  # before any idle slot is taken
            if row is not None:
                if not row.count:
                    del idle[row.key]
                row.count += 1
        for key, row in zip(keys, found, strict=True):
            if row is None:
                row = known[key] = _Row(key, self._take())
            rows.append(row)
        self._held[holder] = rows
        return [row.slot for row in rows]

    def release(self, holder: str) -> bool:
        """Give the rows of ``holder`` back; False when it held none. Idempotent."""
        rows = self._held.pop(holder, None)
        if rows is None:
            return False
        idle = self._idle
        for row in rows:
            row.count -= 1
            if not row.count:
                idle[row.key] = None
        return True

    def _take(self) -> int:
        if self._unused:
            return self._unused.pop()
        key, _ = self._idle.popitem(last=False)
        return self._rows.pop(key).slot


class _Row:
    """Where a row lies, and how many requests hold it."""

    __slots__ = ("count", "key", "slot")

    def __init__(self, key: str, slot: int) -> None:
        self.key, self.slot, self.count = key, slot, 1
