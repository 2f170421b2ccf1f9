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
        self._slot: dict[str, int] = {}
        self._count: dict[str, int] = {}
        self._idle: OrderedDict[str, None] = OrderedDict()
        self._unused = list(range(capacity - 1, -1, -1))
        self._held: dict[str, tuple[str, ...]] = {}

    @property
    def in_use(self) -> int:
        """Rows that some request holds."""
        return len(self._count)

    @property
    def holders(self) -> int:
        """Requests that hold rows."""
        return len(self._held)

    def acquire(self, holder: str, keys: Sequence[str]) -> list[int] | None:
        """Slots for ``keys`` (distinct), all or none: None when too many rows are held by others."""
        if holder in self._held:
            raise ValueError(f"request {holder} already holds rows")
        new = [k for k in keys if k not in self._count]
        reusable = sum(k in self._idle for k in new)
        if len(new) - reusable > len(self._unused) + len(self._idle) - reusable:
            return None
        for key in new:
            self._idle.pop(key, None)
        for key in keys:
            if key not in self._slot:
                self._slot[key] = self._take()
            self._count[key] = self._count.get(key, 0) + 1
        self._held[holder] = tuple(keys)
        return [self._slot[k] for k in keys]

    def release(self, holder: str) -> bool:
        """Give the rows of ``holder`` back; False when it held none. Idempotent."""
        keys = self._held.pop(holder, None)
        if keys is None:
            return False
        for key in keys:
            self._count[key] -= 1
            if not self._count[key]:
                del self._count[key]
                self._idle[key] = None
        return True

    def _take(self) -> int:
        if self._unused:
            return self._unused.pop()
        key, _ = self._idle.popitem(last=False)
        return self._slot.pop(key)
