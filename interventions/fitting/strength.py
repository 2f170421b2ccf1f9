"""The strength at which an edit has a wanted effect: a search over log strength, for effects that grow with it.

What is searched for is s > 0 with effect(s) = target, the effect being for example the mean KL divergence between the
plain and the edited next-token distribution (delphi bisects log₁₀ s for KL = 0.5: EleutherAI/delphi,
``counterfactuals``). An effect is measured at a start, followed up or down until the target lies between two measured
strengths, and the interval is narrowed. Small edits have KL ∝ s², so steps outside the interval go where that law puts
the target; inside, log effect is interpolated linearly in log s, and every third step halves the interval, so that it
shrinks whatever the effect does.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Awaitable, Callable, Generator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

REFUSED = math.inf
"""The effect to report for a strength that cannot be run (a dose above its bound): it counts as above any target."""

_FURTHEST_STEP = 16.0
_NEAREST_STEP = 1.25
_RANGE = 1e6
"""The search gives up this far from its start, in either direction."""
_PLATEAU = 0.01
"""Effects that differ by less than this, relatively, over a long stride have stopped to change."""
_RESOLUTION = 1e-3
"""Relative width of an interval that is not narrowed any more: the effect jumps across the target."""


@dataclass(frozen=True)
class Point:
    """One measurement."""

    strength: float
    effect: float


@dataclass(frozen=True)
class Calibration:
    """Where a search ended.

    Attributes:
        strength: the strength found, above 0.
        effect: what was measured there.
        converged: whether that is the target within the tolerance; False where the effect jumps across it.
        curve: everything that was measured, by strength.
    """

    strength: float
    effect: float
    converged: bool
    curve: tuple[Point, ...]


class TargetNotReached(ValueError):
    """No strength has the wanted effect.

    Attributes:
        nearest: the measurement nearest to the target, refused strengths aside; None if there is none.
        above: whether the effect stays above the target, however small the strength.
        refused: whether larger strengths could not be run.
        curve: everything that was measured, by strength.
    """

    def __init__(self, target: float, curve: tuple[Point, ...]) -> None:
        run = [point for point in curve if math.isfinite(point.effect)]
        self.above = bool(run) and min(point.effect for point in run) > target
        self.refused = len(run) < len(curve)
        self.nearest = (min if self.above else max)(run, key=lambda point: point.effect, default=None)
        self.curve = curve
        super().__init__(f"no strength has the effect {target:g}; nearest was {self.nearest}")


def kl_divergence(p: npt.NDArray[np.float64], q: npt.NDArray[np.float64]) -> float:
    """KL(p ‖ q) = Σ p·(log p − log q) in nats, of two distributions over the same tokens.

    Args:
        p, q: log-probabilities ``[vocab]``; where p is −∞ there is nothing to add.

    Returns:
        at least 0 (rounding below it is cut off), and infinite where q excludes what p allows.
    """
    held = np.isfinite(p)
    return max(0.0, float((np.exp(p[held]) * (p[held] - q[held])).sum()))


async def calibrate(
    measure: Callable[[float], float | Awaitable[float]],
    target: float,
    *,
    start: float = 1.0,
    tolerance: float = 0.05,
    evaluations: int = 20,
) -> Calibration:
    """The strength at which ``measure`` gives ``target``.

    Args:
        measure: strength (above 0) → effect (≥ 0, :data:`REFUSED` if it cannot be run), or an awaitable of it.
        target: the wanted effect, above 0.
        start: first strength measured, above 0.
        tolerance: relative to ``target``.
        evaluations: at most so many calls of ``measure``.

    Raises:
        TargetNotReached: the effect stays on one side of the target, or jumps to where it is refused.
        ValueError: an argument that is not above 0.
    """
    search = steps(target, start=start, tolerance=tolerance, evaluations=evaluations)
    strength = next(search)
    while True:
        effect = measure(strength)
        measured = await effect if inspect.isawaitable(effect) else effect
        try:
            strength = search.send(float(measured))
        except StopIteration as end:
            result: Calibration = end.value
            return result


def steps(
    target: float, *, start: float = 1.0, tolerance: float = 0.05, evaluations: int = 20
) -> Generator[float, float, Calibration]:
    """The search of :func:`calibrate` as a generator: it yields strengths, is sent effects, and returns the result."""
    for name, value in (("target", target), ("start", start), ("tolerance", tolerance), ("evaluations", evaluations)):
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} is {value}; it must be above 0")
    tried: list[Point] = []
    low: Point | None = None
    high: Point | None = None
    strength = start
    while True:
        strength = float(f"{strength:.6g}")  # what is reported is what was run, in digits that one can type
        effect = yield strength
        point = Point(strength, REFUSED if math.isnan(effect) else effect)
        tried.append(point)
        if abs(point.effect - target) <= tolerance * target:
            return Calibration(point.strength, point.effect, True, _curve(tried))
        if point.effect < target:
            low = point
        else:
            high = point
        if low is not None and high is not None:
            if abs(math.log(high.strength / low.strength)) < _RESOLUTION or len(tried) >= evaluations:
                return _closest(low, high, target, tried)
            strength = _between(low, high, target, halve=len(tried) % 3 == 0)
        else:
            beyond = point.strength / start >= _RANGE if high is None else start / point.strength >= _RANGE
            if beyond or len(tried) >= evaluations or _plateau(tried[-3:], target):
                raise TargetNotReached(target, _curve(tried))
            # Two equal effects may be the beginning of a plateau: a long stride tells.
            strength *= _outward(point.effect, target, stride=_equal(tried[-2:], target))


def _outward(effect: float, target: float, stride: bool) -> float:
    """Factor to the strength where effect ∝ s² puts the target, kept between a small and a large step."""
    ratio = target / effect if effect > 0 else math.inf
    factor = _FURTHEST_STEP if stride else math.sqrt(ratio if ratio > 1 else 1 / ratio if ratio > 0 else math.inf)
    factor = min(max(factor, _NEAREST_STEP), _FURTHEST_STEP)
    return factor if effect < target else 1 / factor


def _between(low: Point, high: Point, target: float, halve: bool) -> float:
    """The next strength inside the interval: where the line through both ends, in logs, meets the target; or the middle."""
    share = 0.5
    if not halve and low.effect > 0 and math.isfinite(high.effect):
        rise = math.log(high.effect / low.effect)
        share = min(max(math.log(target / low.effect) / rise, 0.1), 0.9)
    return low.strength * math.exp(share * math.log(high.strength / low.strength))


def _equal(points: list[Point], target: float) -> bool:
    """Whether two or more effects are one; next to nothing they are only noise."""
    effects = [point.effect for point in points]
    if len(points) < 2 or not math.isfinite(max(effects)) or max(effects) < _PLATEAU * target:
        return False
    return max(effects) - min(effects) <= _PLATEAU * max(effects)


def _plateau(last: list[Point], target: float) -> bool:
    """Whether the last three effects are one over a long stride."""
    if len(last) < 3 or not _equal(last, target):
        return False
    return abs(math.log(last[-1].strength / last[0].strength)) >= math.log(_FURTHEST_STEP)


def _closest(low: Point, high: Point, target: float, tried: list[Point]) -> Calibration:
    """The end of the interval whose effect is nearer, by ratio."""
    if not math.isfinite(high.effect):
        raise TargetNotReached(target, _curve(tried))
    nearer_low = low.effect > 0 and target / low.effect < high.effect / target
    best = low if nearer_low else high
    return Calibration(best.strength, best.effect, False, _curve(tried))


def _curve(tried: list[Point]) -> tuple[Point, ...]:
    return tuple(sorted(tried, key=lambda point: point.strength))
