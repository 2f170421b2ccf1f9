"""The trade-off curves as one picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")
import matplotlib.pyplot as plt

from interventions.concepts.concept import Method
from interventions.concepts.report import mean_interval
from reproduce.app.analysis import METHODS, READINGS, SMALLEST, Point, curve, removable
from reproduce.app.tables import NAMES, grouped

_COLOURS = dict(zip(METHODS, ("C7", "C0", "C1", "C3"), strict=True))
_TOP = 200.0
"""Perplexity increase in % where the axis ends."""


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Perplexity increase on the other classes' texts over what is removed: a column for each set, a row for each reading.

    Every marker is one setting, mean over seeds, with 95 % intervals both ways.
    """
    sets = [name for name in grouped(results["cells"]) if name != "all"]
    figure, axes = plt.subplots(
        len(READINGS), len(sets), figsize=(1.2 + 3.0 * len(sets), 5.6), dpi=100, squeeze=False, sharex=True, sharey=True
    )
    for column, name in enumerate(sets):
        for row, reading in enumerate(READINGS):
            axis = axes[row][column]
            cells = [c for c in results["cells"] if c["set"] == name and removable(c, reading) >= SMALLEST]
            for method in METHODS if cells else ():
                _line(axis, [curve(cell, method, reading, "others") for cell in cells], method)
            axis.axvline(100, color="0.8", linewidth=0.8, zorder=0)
            axis.set(ylim=(-8, _TOP), xlim=(-10, 160))
            if row == 0:
                axis.set_title(name, fontsize=10)
            if column == 0:
                axis.set_ylabel(f"{NAMES[reading]}\nperplexity increase, others (%)", fontsize=8)
            if row == len(READINGS) - 1:
                axis.set_xlabel("removed (% of accuracy above chance)", fontsize=8)
            axis.tick_params(labelsize=8)
    axes[0][0].legend(frameon=False, fontsize=8, loc="upper left")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def _line(axis: Any, curves: list[list[Point]], method: Method) -> None:
    x, y, bars = [], [], []
    for settings in zip(*curves, strict=True):
        across = mean_interval([100 * p.removed for p in settings])
        up = mean_interval([100 * p.cost for p in settings])
        x.append(across.mean)
        y.append(up.mean)
        if len(settings) > 1:
            bars.append((across, up))
    axis.plot(x, y, "o-", markersize=3, linewidth=1.3, color=_COLOURS[method], label=method)
    for across, up in bars:
        axis.plot((across.low, across.high), (up.mean, up.mean), color=_COLOURS[method], alpha=0.3, linewidth=0.8)
        axis.plot((across.mean, across.mean), (up.low, up.high), color=_COLOURS[method], alpha=0.3, linewidth=0.8)
