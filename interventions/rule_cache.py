"""Rule sets that were read already: a server reads the same ones with every request."""

from __future__ import annotations

import json
from collections import OrderedDict
from threading import Lock
from typing import Any

from interventions.rules.build import Context
from interventions.rules.reading import parse_ruleset
from interventions.rules.ruleset import Ruleset

KEPT = 64
"""Rule sets that are kept, the latest used ones."""
LONGEST = 2**16
"""Rule sets of more characters are read anew each time."""


class RulesetCache:
    """The last rule sets that were read, by what was written and by what names meant then."""

    def __init__(self, kept: int = KEPT) -> None:
        self.kept = kept
        self._found: OrderedDict[tuple[str, str, bool], tuple[Context, Ruleset]] = OrderedDict()
        self._lock = Lock()

    def read(self, raw: Any, context: Context, param: str) -> Ruleset:
        """As :func:`~interventions.rules.reading.parse_ruleset`, errors included: they are never kept."""
        key = _key(raw, param)
        if key is None:
            return parse_ruleset(raw, context, param)
        with self._lock:
            known = self._found.get(key)
            if known is not None and known[0] == context:
                self._found.move_to_end(key)
                return known[1]
        ruleset = parse_ruleset(raw, context, param)
        with self._lock:
            self._found[key] = context, ruleset
            self._found.move_to_end(key)
            while len(self._found) > self.kept:
                self._found.popitem(last=False)
        return ruleset


def _key(raw: Any, param: str) -> tuple[str, str, bool] | None:
    if isinstance(raw, str):
        return (raw, param, True) if len(raw) <= LONGEST else None
    try:
        written = json.dumps(raw)
    except (TypeError, ValueError, RecursionError):
        return None  # reading it says what is wrong
    return (written, param, False) if len(written) <= LONGEST else None
