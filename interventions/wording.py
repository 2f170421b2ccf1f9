"""How error messages show what was given and what would have been right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

_SHOWN = 60


def printable(text: str) -> str:
    """``text`` with everything that UTF-8 cannot carry (lone surrogates) escaped."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def show(value: Any) -> str:
    """A short, safe rendering of any JSON value: never recursive, never longer than a line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value) if value.bit_length() < 100 else f"an integer of {value.bit_length()} bits"
    if isinstance(value, float):
        return repr(float(value))
    if isinstance(value, str):
        return repr(printable(value[:_SHOWN])) + ("…" if len(value) > _SHOWN else "")
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "an object"
    return f"a {type(value).__name__}"


def choices(options: Iterable[object]) -> str:
    """``'a, b, c'``, or ``'none'``."""
    return ", ".join(str(option) for option in options) or "none"


def nearest(word: str, options: Iterable[str]) -> str:
    """``" Did you mean 'x'?"`` for the option closest to ``word``, or an empty string when none is close."""
    close = difflib.get_close_matches(word[:_SHOWN].lower(), list(options), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""
