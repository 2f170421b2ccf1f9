"""From cells to statements: perplexity increase at equal removal, paired over seeds, and whether the published order holds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from interventions.concepts.concept import Method
from interventions.concepts.report import Interval, mean_interval
from reproduce.app.settings import MAIN_LAYER, Trial

LEVELS = (0.25, 0.5, 0.75)
"""Shares of the removable accuracy at which methods are compared."""
METHODS: tuple[Method, ...] = ("mask", "range", "attenuate", "app")
READINGS = ("probe", "readout")
"""How a text's class is read: the frozen probe, and the next token."""
TEXTS = ("others", "neutral")
"""Where perplexity is read."""
SMALLEST = 0.1
"""A cell whose target is recognised less than this above chance says nothing about removal."""

Cell = Mapping[str, Any]
Verdict = Literal["holds", "reversed", "open"]


@dataclass(frozen=True)
class Point:
    """One setting in one cell.

    Attributes:
        removed: share of the removable accuracy that is gone; 1 is chance, more is below it.
        cost: perplexity increase, edited / unedited − 1.
    """

    removed: float
    cost: float


def removable(cell: Cell, reading: str) -> float:
    """Unedited accuracy on the target's texts, less chance 1/k."""
    return float(cell["before"][reading]["target"]) - 1 / len(cell["classes"])


def point(cell: Cell, trial: Trial, reading: str, texts: str, layer: int = MAIN_LAYER) -> Point:
    """What ``trial`` did in ``cell``.

    Raises:
        KeyError: the cell has no such setting.
    """
    for found in cell["points"]:
        if (found["layer"], found["label"], found["by"]) == (layer, trial.label, trial.by):
            removed = cell["before"][reading]["target"] - found[reading]["target"]
            cost = found["perplexity"][texts] / cell["before"]["perplexity"][texts] - 1
            return Point(removed / removable(cell, reading), cost)
    raise KeyError(f"{cell['set']}, seed {cell['seed']}: no {trial.label} by {trial.by} at layer {layer}")


def settings(method: Method) -> tuple[Trial, ...]:
    """The settings of a method's trade-off curve at the main layer, the weakest first.

    Those of range end with τ = ∞ and those of attenuate pass through λ = 1; both are the mask.
    """
    mask = Trial("mask")
    if method == "mask":
        return (Trial("mask", top=10), Trial("mask", top=25), mask)
    if method == "range":
        return (*(Trial("range", tau=τ) for τ in (1.0, 2.0, 3.0)), mask)
    if method == "attenuate":
        below, above = (0.25, 0.5), (1.5, 2.0, 4.0)
        return (*(Trial(method, λ) for λ in below), mask, *(Trial(method, λ) for λ in above))
    return tuple(Trial("app", λ) for λ in (0.5, 1.0, 2.0, 3.0, 4.0))


def curve(cell: Cell, method: Method, reading: str, texts: str) -> list[Point]:
    """The method's points from no edit to its strongest."""
    return [Point(0.0, 0.0), *(point(cell, trial, reading, texts) for trial in settings(method))]


def at_level(points: Sequence[Point], level: float) -> float | None:
    """Cost where the curve first reaches ``level``; None if it never does.

    Between two settings log(1 + cost), the added surprise in nats a token, is taken as linear in what is removed.
    """
    for before, after in pairwise(points):
        if before.removed < level <= after.removed:
            share = (level - before.removed) / (after.removed - before.removed)
            nats = (1 - share) * math.log1p(before.cost) + share * math.log1p(after.cost)
            return math.expm1(nats)
    return None


def costs(cells: Iterable[Cell], method: Method, reading: str, texts: str, level: float) -> list[float | None]:
    """:func:`at_level` in every cell that has something to remove."""
    usable = [cell for cell in cells if removable(cell, reading) >= SMALLEST]
    return [at_level(curve(cell, method, reading, texts), level) for cell in usable]


@dataclass(frozen=True)
class Compared:
    """APP against another method at one level of removal.

    Attributes:
        difference: the other's cost less APP's, over the cells in which both reach the level; None without any.
        pairs: how many those are.
        app_only, other_only: cells in which only one of them reaches it.
    """

    difference: Interval | None
    pairs: int
    app_only: int
    other_only: int

    @property
    def verdict(self) -> Verdict:
        """Whether APP is cheaper ("holds"), dearer ("reversed"), or the interval does not say ("open")."""
        if self.difference is None:
            return "open"
        return "holds" if self.difference.low > 0 else "reversed" if self.difference.high < 0 else "open"


def compare(cells: Sequence[Cell], other: Method, reading: str, texts: str, level: float) -> Compared:
    """The published claim at one level: APP costs less than ``other``."""
    pairs = list(
        zip(costs(cells, other, reading, texts, level), costs(cells, "app", reading, texts, level), strict=True)
    )
    both = [a - b for a, b in pairs if a is not None and b is not None]
    return Compared(
        mean_interval(both) if both else None,
        len(both),
        sum(a is None and b is not None for a, b in pairs),
        sum(a is not None and b is None for a, b in pairs),
    )


def removal(cells: Sequence[Cell], trial: Trial, reading: str, layer: int = MAIN_LAYER) -> Interval | None:
    """Share of the removable accuracy that a setting takes away."""
    usable = [cell for cell in cells if removable(cell, reading) >= SMALLEST]
    shares = [point(cell, trial, reading, TEXTS[0], layer).removed for cell in usable]
    return mean_interval(shares) if shares else None


def cost(cells: Sequence[Cell], trial: Trial, texts: str, layer: int = MAIN_LAYER) -> Interval:
    """Perplexity increase of a setting."""
    return mean_interval([point(cell, trial, READINGS[0], texts, layer).cost for cell in cells])


def lost(cells: Sequence[Cell], trial: Trial, reading: str, layer: int = MAIN_LAYER) -> Interval:
    """Drop of the other classes' accuracy under a setting."""
    drops = []
    for cell in cells:
        for found in cell["points"]:
            if (found["layer"], found["label"], found["by"]) == (layer, trial.label, trial.by):
                drops.append(cell["before"][reading]["others"] - found[reading]["others"])
    return mean_interval(drops)
