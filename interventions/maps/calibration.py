"""The threshold of a gate at a stated false-positive rate, and how far the rate may be off.

Split conformal: with the statistics of n benign sequences that are exchangeable with the traffic, sorted, the threshold is
the r-th, r = ⌈(n + 1)(1 − α)⌉. A further benign sequence is above it with probability (n + 1 − r)/(n + 1) ≤ α, on average
over calibration sets. For the one set at hand the rate is a draw from Beta(n + 1 − r, r) (continuous statistics; ties only
lower it), which gives the interval: at n = 500 and α = 0.05 about 0.033 to 0.071.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_BISECTIONS = 80


class CalibrationError(ValueError):
    """Sequences from which no threshold can be had; the message says what is missing."""


@dataclass(frozen=True)
class Rate:
    """A share of sequences, with the Clopper–Pearson interval."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Calibration:
    """A threshold and what is known about it.

    Attributes:
        threshold: the gate opens above it.
        alpha: the false-positive rate that was asked for.
        n: benign sequences.
        expected: (n + 1 − r)/(n + 1), the rate on average over calibration sets; at most ``alpha``.
        low, high: interval of the rate for this set at ``confidence``; low is 0 where the threshold is a tie.
        confidence: of the interval.
    """

    threshold: float
    alpha: float
    n: int
    expected: float
    low: float
    high: float
    confidence: float = 0.95


def calibrate(statistics: npt.ArrayLike, alpha: float = 0.05, confidence: float = 0.95) -> Calibration:
    """The threshold above which at most a share ``alpha`` of benign sequences comes.

    Args:
        statistics: :func:`interventions.maps.gates.statistic` of each benign sequence, ``[n]``.
        alpha: false-positive rate, between 0 and 1.
        confidence: of the interval, between 0 and 1.

    Raises:
        CalibrationError: fewer than 1/alpha − 1 sequences, a value that is not a number, or a rate outside (0, 1).
    """
    values = np.sort(np.asarray(statistics, np.float64).ravel())
    n = len(values)
    for name, share in (("false-positive rate", alpha), ("confidence", confidence)):
        if not 0.0 < share < 1.0:
            raise CalibrationError(f"{name} {share} is not between 0 and 1")
    if not np.isfinite(values).all():
        raise CalibrationError("a statistic is not a finite number")
    rank = math.ceil((n + 1) * (1.0 - alpha) - 1e-9)  # the product of two decimals may land just above an integer
    if rank > n:
        needed = math.ceil(1.0 / alpha - 1.0 - 1e-9)
        raise CalibrationError(f"{n} benign sequences; a rate of {alpha} needs at least {needed}")
    threshold = float(values[rank - 1])
    ties = int((values == threshold).sum())
    tail = (1.0 - confidence) / 2.0
    low = beta_quantile(tail, n + 1 - rank, rank) if ties == 1 else 0.0
    high = beta_quantile(1.0 - tail, n + 1 - rank, rank)
    return Calibration(threshold, alpha, n, (n + 1 - rank) / (n + 1), low, high, confidence)


def rate_above(statistics: npt.ArrayLike, threshold: float, confidence: float = 0.95) -> Rate:
    """Share of held-out sequences above the threshold."""
    values = np.asarray(statistics, np.float64).ravel()
    n, k = len(values), int((values > threshold).sum())
    if n == 0:
        raise CalibrationError("no held-out sequences")
    tail = (1.0 - confidence) / 2.0
    low = beta_quantile(tail, k, n - k + 1) if k else 0.0
    high = beta_quantile(1.0 - tail, k + 1, n - k) if k < n else 1.0
    return Rate(k / n, low, high, n)


@functools.lru_cache(maxsize=64)
def beta_quantile(p: float, a: int, b: int) -> float:
    """The p-quantile of Beta(a, b) for integers a, b ≥ 1, by bisection.

    P(Beta(a, b) ≤ x) = P(Binomial(a + b − 1, x) ≥ a).
    """
    n = a + b - 1
    factorial = np.concatenate([np.zeros(1), np.cumsum(np.log(np.arange(1, n + 1)))])
    counts = np.arange(a, n + 1)
    choose = factorial[n] - factorial[counts] - factorial[n - counts]
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        x = (low + high) / 2.0
        terms = choose + counts * math.log(x) + (n - counts) * math.log1p(-x) if 0.0 < x < 1.0 else np.zeros(1)
        below = float(np.exp(terms).sum()) < p if x < 1.0 else False
        low, high = (x, high) if below else (low, x)
    return (low + high) / 2.0
