"""Numbers as float32 has them."""

from __future__ import annotations

from ctypes import c_float


def float32(value: float) -> float:
    """The float32 nearest to ``value`` (ties to even); infinite beyond its range.

    A request has dozens of numbers, each of which numpy would take ten times as long for.

    Raises:
        OverflowError: an integer beyond float64.
    """
    return c_float(value).value
