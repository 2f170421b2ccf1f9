"""A config (JSON or YAML object) whose fields are read with their expected type; errors name file and field."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sae_weights.errors import SAEFormatError
from sae_weights.hook import Hook, parse_hook_name


class Fields:
    """The fields of one config file."""

    def __init__(self, path: Path, content: Mapping[str, Any]) -> None:
        self.path = path
        self.content = content

    def choice(self, field: str, allowed: Sequence[str], default: str | None = None) -> str:
        """One of these words."""
        value = self.content.get(field, default)
        if not isinstance(value, str) or value not in allowed:
            near = difflib.get_close_matches(value, allowed, n=1) if isinstance(value, str) else []
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise self.wrong(field, f"one of {', '.join(allowed)}{hint}")
        return value

    def flag(self, field: str, default: bool) -> bool:
        """true or false."""
        value = self.content.get(field, default)
        if not isinstance(value, bool):
            raise self.wrong(field, "true or false")
        return value

    def count(self, field: str, default: int | None = None) -> int:
        """A whole number of at least 1."""
        value = self.content.get(field, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.wrong(field, "a whole number of at least 1")
        return value

    def number(self, field: str) -> float:
        """A positive finite number."""
        value = self.content.get(field)
        # The bound keeps a number of a thousand digits from overflowing where it becomes a float.
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e300:
            raise self.wrong(field, "a positive number")
        return float(value)

    def hook(self, field: str) -> Hook:
        """The name of a place in a layer."""
        value = self.content.get(field)
        hook = parse_hook_name(value) if isinstance(value, str) and len(value) < 200 else None
        if hook is None:
            raise self.wrong(field, "a hook of a layer, as in 'blocks.15.hook_resid_post'")
        return hook

    def hooks(self, field: str) -> list[Hook]:
        """Names of places, at least one."""
        value = self.content.get(field)
        if not isinstance(value, list) or not value:
            raise self.wrong(field, "a list of hooks")
        found = [parse_hook_name(name) if isinstance(name, str) and len(name) < 200 else None for name in value]
        hooks = [hook for hook in found if hook is not None]
        if len(hooks) != len(value):
            raise self.wrong(field, "hooks of layers, as in 'blocks.15.hook_resid_post'")
        return hooks

    def wrong(self, field: str, expected: str) -> SAEFormatError:
        """The error for a field that is not what was expected."""
        given = shown(self.content[field]) if field in self.content else "missing"
        return SAEFormatError(f"{self.path}: field {shown(field)} is {given}; expected {expected}")


def shown(value: Any) -> str:
    """A value of a config for an error message: never longer than a line, however it is nested."""
    if isinstance(value, dict):
        return f"an object of {len(value)} fields"
    if isinstance(value, list):
        inner = ", ".join("…" if isinstance(entry, list | dict) else shown(entry) for entry in value[:8])
        return f"[{inner}{', …' if len(value) > 8 else ''}]"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**40:
        return "a number of more than 40 digits"
    text = "inf" if isinstance(value, float) and math.isinf(value) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
