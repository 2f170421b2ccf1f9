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
    """An entry against the baseline: baseline / entry; above 1 the entry is faster.

    Attributes:
        ratio: mean over the starts of the medians over their rounds.
        low, high: of any round.
        own, baseline: medians of the quantity itself.
        by_start: the median of each start.
    """

    ratio: float
    low: float
    high: float
    own: float
    baseline: float
    by_start: tuple[float, ...] = ()


def compare(
    rounds: Sequence[Sequence[Turn]], entry: str, quantity: str, starts: Sequence[int] | None = None
) -> Compared:
    """``entry`` against the mean of the two baseline runs between which it stands in its round.

    Args:
        rounds: of the record, in the order of time.
        entry: which one.
        quantity: "seconds" or "ttft": the less the better.
        starts: how many rounds each start of the systems had; None: they were started once. One in which the entry did not
            run (a peer's) does not count.
    """
    ratios, own, beside = [], [], []
    start_of = [start for start, n in enumerate(starts or [len(rounds)]) for _ in range(n)]
    by_start: dict[int, list[float]] = {}
    for order, start in zip(rounds, start_of, strict=True):
        for i, turn in enumerate(order):
            if turn["entry"] != entry:
                continue
            near = [o[quantity] for o in order[max(0, i - 1) : i + 2] if o["entry"] == BASELINE]
            own.append(turn[quantity])
            beside.append(statistics.fmean(near))
            ratios.append(beside[-1] / own[-1])
            by_start.setdefault(start, []).append(ratios[-1])
    if not ratios:
        raise ValueError(f"no round has {entry}")
    median = statistics.median
    medians = tuple(median(found) for found in by_start.values())
    return Compared(statistics.fmean(medians), min(ratios), max(ratios), median(own), median(beside), medians)


def noise(rounds: Sequence[Sequence[Turn]], quantity: str) -> list[float]:
    """Ratios of each baseline run to the next one of the same round: what is no difference at all on this machine."""
    ratios = []
    for order in rounds:
        runs = [turn[quantity] for turn in order if turn["entry"] == BASELINE]
        ratios += [a / b for a, b in itertools.pairwise(runs)]
    return ratios
