"""Fields of a trainer's config: objects within objects, null for absent, lists that were written as text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_weights.errors import SAEFormatError

from .fields import Fields, shown


class NestedFields(Fields):
    """``Fields`` in which null counts as absent, and objects may hold objects; errors name the whole way to a field."""

    def __init__(self, path: Path, content: Mapping[str, Any], within: str = "") -> None:
        super().__init__(path, {name: value for name, value in content.items() if value is not None})
        self._within = within

    def inside(self, field: str) -> NestedFields:
        """The object of that name; an empty one where there is none."""
        value = self.content.get(field, {})
        if not isinstance(value, dict):
            raise self.wrong(field, "an object")
        return NestedFields(self.path, value, f"{self._within}{field}.")

    def text(self, field: str, default: str | None = None) -> str:
        """A string."""
        value = self.content.get(field, default)
        if not isinstance(value, str):
            raise self.wrong(field, "a string")
        return value

    def layer(self, field: str) -> int:
        """A whole number of at least 0."""
        value = self.content.get(field)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 10_000:
            raise self.wrong(field, "the number of a layer")
        return value

    def counts(self, field: str) -> list[int]:
        """Whole numbers of at least 1; as a list, or as the text of one."""
        value = self.content.get(field)
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                value = None
        whole = isinstance(value, list) and all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in value)
        if not whole or not value:
            raise self.wrong(field, "a list of whole numbers of at least 1")
        return [int(v) for v in value]

    def wrong(self, field: str, expected: str) -> SAEFormatError:
        given = shown(self.content[field]) if field in self.content else "missing"
        return SAEFormatError(f"{self.path}: field '{self._within}{field}' is {given}; expected {expected}")
