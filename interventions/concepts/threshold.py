"""Thresholds for ``score >= threshold`` that maximise balanced accuracy, halfway between the scores that they part.

A threshold that is itself a score of the data, as a ROC curve offers it, loses the positives on the boundary as soon as it is
compared with ``>``, and its first one is infinite. Here every candidate lies between two neighbouring scores, rounded so that
the lower one stays below it and the upper one does not. Of equally good candidates the one in the widest gap is taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from interventions.rules.formula import PPM

Floats = npt.NDArray[np.floating[Any]]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Cut:
    """A threshold and the balanced accuracy of ``score >= threshold`` on what it was calibrated on."""

    threshold: float
    balanced_accuracy: float


def midpoint(low: float, high: float) -> float:
    """The float32 t nearest to (low + high)/2 with low < t <= high; both are float32 and low < high."""
    middle = float(np.float32((low + high) / 2))
    return middle if low < middle <= high else high


def best_cut(scores: Floats, positive: Bools, floor: float = -np.inf) -> Cut:
    """The threshold (float32) with the largest balanced accuracy.

    Args:
        scores: float32 ``[n]``, finite.
        positive: bool ``[n]``.
        floor: a score that must stay below the threshold.

    Raises:
        ValueError: only positives, only negatives, or all scores (from ``floor`` on) equal.
    """
    low, high, right = _gaps(np.maximum(scores.astype(np.float32), np.float32(floor)).astype(np.float64), positive)
    best = np.lexsort((high - low, right))[-1]
    return Cut(midpoint(float(low[best]), float(high[best])), _accuracy(right[best], positive))


def best_share(shares: Floats, positive: Bools) -> Cut:
    """The same for shares of tokens (0 to 1): the threshold is in whole parts per million, as rules count them.

    Of the numbers in the middle half of its gap the roundest is taken.

    Raises:
        ValueError: as :func:`best_cut`, or no two shares are a millionth apart.
    """
    low, high, right = _gaps(shares.astype(np.float64), positive)
    low, high = low * PPM, high * PPM
    apart = np.floor(high) > low
    if not apart.any():
        raise ValueError("the shares of all texts are equal, to a millionth")
    low, high, right = low[apart], high[apart], right[apart]
    best = np.lexsort((high - low, right))[-1]
    return Cut(_round_share(float(low[best]), float(high[best])), _accuracy(right[best], positive))


def _gaps(scores: npt.NDArray[np.float64], positive: Bools) -> tuple[Any, Any, Any]:
    """Ends of each gap between neighbouring scores, and TP·N + TN·P of a threshold in it, exact."""
    if scores.shape != positive.shape or scores.ndim != 1:
        raise ValueError(f"positive: expected one per score {list(scores.shape)}, got shape {list(positive.shape)}")
    if not np.isfinite(scores).all():
        raise ValueError("scores: a value is not finite")
    n_positive = int(positive.sum())
    n_negative = len(positive) - n_positive
    if not n_positive or not n_negative:
        raise ValueError(f"a threshold parts two classes; got {n_positive} positives and {n_negative} negatives")
    values, place = np.unique(scores, return_inverse=True)
    if len(values) < 2:
        raise ValueError("all scores are equal")
    # Below a threshold in gap i lie the scores 0 … i.
    missed = np.bincount(place, positive, len(values)).astype(np.int64).cumsum()[:-1]
    rejected = np.bincount(place, ~positive, len(values)).astype(np.int64).cumsum()[:-1]
    right = (n_positive - missed) * n_negative + rejected * n_positive
    return values[:-1], values[1:], right


def _accuracy(right: int, positive: Bools) -> float:
    n_positive = int(positive.sum())
    return float(right) / (2 * n_positive * (len(positive) - n_positive))


def _round_share(low: float, high: float) -> int:
    """The whole number above ``low`` and at most ``high`` that is nearest to their middle, rounded where the gap allows."""
    middle, room = (low + high) / 2, (high - low) / 4
    for unit in (100_000, 50_000, 10_000, 5_000, 1_000, 100, 10):
        near = round(middle / unit) * unit
        if abs(near - middle) <= room and low < near <= high:
            return int(near)
    near = round(middle)
    return near if low < near <= high else int(np.floor(high))
