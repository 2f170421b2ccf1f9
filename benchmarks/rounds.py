"""In which order systems take turns, and what their turns say about each other: pure functions of the record."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BASELINE = "vanilla/idle"
"""The entry that every other one is compared with."""

Turn = Mapping[str, Any]
"""One run: its "entry" (system/load) and what was measured."""


def turns(entries: Sequence[str], round_: int) -> list[str]:
    """The order of one round: entries rotated by the round, each between two runs of the baseline, which neighbours share."""
    shift = round_ % len(entries)
    order = [BASELINE]
    for entry in (*entries[shift:], *entries[:shift]):
        order += [entry, BASELINE]
    return order


@dataclass(frozen=True)
class Compared:
    """An entry against the baseline, over the rounds.

    Attributes:
        ratio, low, high: median, least and largest of baseline / entry; above 1 the entry is faster.
        own, baseline: medians of the quantity itself.
    """

    ratio: float
    low: float
    high: float
    own: float
    baseline: float


def compare(rounds: Sequence[Sequence[Turn]], entry: str, quantity: str) -> Compared:
    """``entry`` against the mean of the two baseline runs between which it stands in its round.

    Args:
        rounds: of the record, in the order of time.
        entry: which one.
        quantity: "seconds" or "ttft": the less the better.
    """
    ratios, own, beside = [], [], []
    for order in rounds:
        for i, turn in enumerate(order):
            if turn["entry"] != entry:
                continue
            near = [o[quantity] for o in order[max(0, i - 1) : i + 2] if o["entry"] == BASELINE]
            own.append(turn[quantity])
            beside.append(statistics.fmean(near))
            ratios.append(beside[-1] / own[-1])
    if not ratios:
        raise ValueError(f"no round has {entry}")
    median = statistics.median
    return Compared(median(ratios), min(ratios), max(ratios), median(own), median(beside))


def noise(rounds: Sequence[Sequence[Turn]], quantity: str) -> list[float]:
    """Ratios of each baseline run to the next one of the same round: what is no difference at all on this machine."""
    ratios = []
    for order in rounds:
        runs = [turn[quantity] for turn in order if turn["entry"] == BASELINE]
        ratios += [a / b for a, b in itertools.pairwise(runs)]
    return ratios
