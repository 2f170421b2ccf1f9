"""What all request objects share: validated on construction, no unknown fields, JSON without absent fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ConfigDict, TypeAdapter

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


_ADAPTERS: dict[type[Any], TypeAdapter[Any]] = {}
"""Building one costs far more than using it."""


class Wire:
    """Mixin of the pydantic dataclasses that are sent to the server."""

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of the HTTP contract. Fields left at None are absent, so that the server's default rules."""
        cls = type(self)
        adapter = _ADAPTERS.get(cls) or _ADAPTERS.setdefault(cls, TypeAdapter(cls))
        dumped: dict[str, Any] = adapter.dump_python(self, mode="json", by_alias=True, exclude_none=True)
        return dumped


def to_json(thing: Wire | Mapping[str, Any]) -> dict[str, Any]:
    """A request object as JSON; a mapping passes as it is (the server validates it)."""
    return thing.to_dict() if isinstance(thing, Wire) else dict(thing)
