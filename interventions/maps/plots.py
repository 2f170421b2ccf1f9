"""Pictures of fitted maps. matplotlib is imported when one is drawn, never before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_LOG = 5.0
"""Curves that span more than this factor get a logarithmic axis."""
_COLOURS = ("#1f5fa8", "#b4541a", "#2a7d3f", "#7a4ca0", "#8a6d1d", "#555555")


@dataclass(frozen=True)
class Curve:
    """A figure over strengths with its interval: ``points[i] = (strength, value, low, high)``."""

    label: str
    points: tuple[tuple[float, float, float, float], ...]


def draw_map(
    path: Path,
    title: str,
    scores: Mapping[str, Sequence[float]],
    score_name: str,
    threshold: float | None,
    panels: Mapping[str, Sequence[Curve]],
) -> None:
    """Write a PNG: the distributions of a score on the left, one panel of curves over strengths per entry of ``panels``.

    Args:
        scores: label → scores; drawn as cumulative shares, so that ties and few values show.
        threshold: marked in the left panel.
        panels: name of the y axis → its curves; panels without curves are left out.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = {name: curves for name, curves in panels.items() if curves}
    figure = Figure(figsize=(4.2 * (1 + len(shown)), 3.8), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 1 + len(shown), squeeze=False)[0]
    figure.suptitle(title, fontsize=11)
    for i, (label, values) in enumerate(scores.items()):
        line = np.sort(np.asarray(values, np.float64))
        share = np.arange(len(line) + 1) / max(len(line), 1)
        axes[0].step(np.concatenate([line[:1], line]), share, where="post", color=_COLOURS[i % 6], label=label)
    if threshold is not None:
        axes[0].axvline(threshold, color="0.3", linewidth=1, linestyle="--", label="threshold")
    axes[0].set_xlabel(score_name)
    axes[0].set_ylabel("share of examples up to here")
    axes[0].legend(fontsize=8)
    for axis, (name, curves) in zip(axes[1:], shown.items(), strict=True):
        for i, curve in enumerate(curves):
            x, y, low, high = (np.array(column) for column in zip(*curve.points, strict=True))
            bars = np.clip(np.stack([y - low, high - y]), 0, None)
            axis.errorbar(x, y, bars, color=_COLOURS[i % 6], marker="o", markersize=4, capsize=2, label=curve.label)
        values = [point[1] for curve in curves for point in curve.points]
        if min(values) > 0 and max(values) > _LOG * min(values):
            axis.set_yscale("log")
        axis.set_xlabel("strength")
        axis.set_ylabel(name)
        axis.legend(fontsize=8)
    figure.savefig(path, format="png", metadata={"Software": None})
