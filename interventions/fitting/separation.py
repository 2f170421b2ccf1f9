"""How well a number separates positive from negative examples: the area under the ROC curve and its interval.

AUROC = P(x > y) + ½ P(x = y) for x drawn from the positives and y from the negatives: 1 separates them, ½ says nothing,
0 separates them the wrong way round. With ψ(x, y) = 1, ½ or 0 for x >, =, < y it is the mean of ψ over all pairs, which
ranks give without forming the pairs.

The interval is DeLong's (DeLong, DeLong and Clarke-Pearson, Biometrics 44, 1988, equations 1 to 4): with
V₁₀(xᵢ) = meanⱼ ψ(xᵢ, yⱼ) and V₀₁(yⱼ) = meanᵢ ψ(xᵢ, yⱼ), var = S²(V₁₀)/n + S²(V₀₁)/m, and value ± z·√var clipped to [0, 1].
That variance is zero for complete separation and unknown for a single example, where the interval would claim certainty;
there the interval is Newcombe's method 5 (Statistics in Medicine 25, 2006): all θ with
(value − θ)² ≤ z²·θ(1 − θ)·[1 + (k − 1)·((1 − θ)/(2 − θ) + θ/(1 + θ))] / (nm), k = (n + m)/2.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_BISECTIONS = 60
_SMALLEST_VARIANCE = 1e-12


@dataclass(frozen=True)
class AUROC:
    """An area under the ROC curve, and the interval that holds it with the confidence asked for."""

    value: float
    low: float
    high: float


def auroc(positive: npt.ArrayLike, negative: npt.ArrayLike, confidence: float = 0.95) -> AUROC:
    """AUROC of one score.

    Args:
        positive: scores of the positive examples, shape ``[n]``, n ≥ 1.
        negative: scores of the negative examples, shape ``[m]``, m ≥ 1.
        confidence: of the interval, between 0 and 1.

    Raises:
        ValueError: no examples of one kind, a NaN, or a confidence outside (0, 1).
    """
    x = np.asarray(positive, np.float64).reshape(-1, 1)
    y = np.asarray(negative, np.float64).reshape(-1, 1)
    value, low, high = auroc_columns(x, y, confidence)
    return AUROC(float(value[0]), float(low[0]), float(high[0]))


def auroc_columns(
    positive: npt.ArrayLike, negative: npt.ArrayLike, confidence: float = 0.95
) -> tuple[Floats, Floats, Floats]:
    """AUROC of many scores at once: ``(value, low, high)``, each ``[features]``.

    Args:
        positive: ``[n, features]``, n ≥ 1.
        negative: ``[m, features]``, m ≥ 1.
        confidence: of the intervals, between 0 and 1.

    Raises:
        ValueError: as :func:`auroc`, or columns that do not match.
    """
    x, y = np.asarray(positive, np.float64), np.asarray(negative, np.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"expected [n, features] and [m, features], got shapes {list(x.shape)} and {list(y.shape)}")
    n, m = len(x), len(y)
    if n == 0 or m == 0:
        raise ValueError(f"needs examples of both kinds, got {n} positive and {m} negative")
    if np.isnan(x).any() or np.isnan(y).any():
        raise ValueError("a score is not a number")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence {confidence} is not between 0 and 1")
    ranks = _midranks(np.concatenate([x, y]))
    wins = (ranks[:n] - _midranks(x)) / m  # V10: share of the negatives below each positive, ties half
    losses = 1.0 - (ranks[n:] - _midranks(y)) / n  # V01: share of the positives above each negative
    value = wins.mean(axis=0)
    z = NormalDist().inv_cdf((1.0 + confidence) / 2.0)
    if n > 1 and m > 1:
        variance = wins.var(axis=0, ddof=1) / n + losses.var(axis=0, ddof=1) / m
    else:
        variance = np.zeros_like(value)
    half = z * np.sqrt(variance)
    low, high = np.clip(value - half, 0.0, 1.0), np.clip(value + half, 0.0, 1.0)
    degenerate = variance < _SMALLEST_VARIANCE
    if degenerate.any():
        low[degenerate], high[degenerate] = _newcombe(value[degenerate], n, m, z)
    return value, low, high


def _midranks(values: Floats) -> Floats:
    """Ranks 1 … N within each column of ``[N, features]``; equal values share the mean of their ranks."""
    order = np.argsort(values, axis=0, kind="stable")
    ordered = np.take_along_axis(values, order, axis=0)
    places = np.broadcast_to(np.arange(len(values))[:, None], values.shape)
    edge = np.ones((1, values.shape[1]), np.bool_)
    changes = ordered[1:] != ordered[:-1]
    first = np.maximum.accumulate(np.where(np.concatenate([edge, changes]), places, 0), axis=0)
    ends = np.where(np.concatenate([changes, edge]), places, len(values))
    last = np.minimum.accumulate(ends[::-1], axis=0)[::-1]
    ranks = np.empty(values.shape, np.float64)
    np.put_along_axis(ranks, order, (first + last) / 2.0 + 1.0, axis=0)
    return ranks


def _newcombe(value: Floats, n: int, m: int, z: float) -> tuple[Floats, Floats]:
    """Both ends of Newcombe's interval by bisection: from the estimate, which is inside, to 0 and to 1."""
    k = (n + m) / 2.0

    def inside(theta: Floats) -> npt.NDArray[np.bool_]:
        spread = 1.0 + (k - 1.0) * ((1.0 - theta) / (2.0 - theta) + theta / (1.0 + theta))
        result: npt.NDArray[np.bool_] = (value - theta) ** 2 <= z * z * theta * (1.0 - theta) * spread / (n * m)
        return result

    ends = []
    for edge in (0.0, 1.0):
        near, far = value.copy(), np.full_like(value, edge)
        for _ in range(_BISECTIONS):
            middle = (near + far) / 2.0
            within = inside(middle)
            near, far = np.where(within, middle, near), np.where(within, far, middle)
        ends.append(near)
    return ends[0], ends[1]
