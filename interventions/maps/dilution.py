"""The dilution attack: benign tokens around the ones that hit, until their share is ordinary again.

A share of hits falls with every token that does not hit; an attacker who pads a question before it is asked pays nothing
for it. 1600 benign tokens recovered 0.909 of the answers behind a share gate, 0.029 behind CUSUM (independent
reproduction of DSG, methods.md 2d).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from interventions.maps.gates import Bits

Place = Literal["before", "after", "between"]


def dilute(hits: npt.ArrayLike, padding: int, place: Place = "before") -> Bits:
    """The sequence's hit bits with ``padding`` benign tokens: before it (behind position 0), after it, or spread evenly.

    Args:
        hits: bool ``[n]``, n ≥ 1.

    Returns:
        bool ``[n + padding]``; the order of the original tokens is kept and position 0 stays first.
    """
    bits = np.asarray(hits, np.bool_)
    if place == "before":
        at = np.ones(padding, np.int64)
    elif place == "after":
        at = np.full(padding, len(bits), np.int64)
    else:
        at = 1 + np.arange(padding, dtype=np.int64) * max(len(bits) - 1, 0) // max(padding, 1)
    return np.insert(bits, at, False)


def padding_to_evade(hits: int, seen: int, threshold: float) -> int:
    """The fewest benign tokens after which ``hits`` in ``seen`` evidence tokens is no longer above ``threshold``."""
    if threshold <= 0:
        raise ValueError("no padding brings a share of hits to zero")
    padding = max(0, int(np.ceil(hits / threshold)) - seen - 1)  # the quotient may be rounded either way
    while hits / max(seen + padding, 1) > threshold:
        padding += 1
    return padding
