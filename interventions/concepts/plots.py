"""Pictures of fitted concepts. matplotlib is imported when one is drawn, never before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_COLOURS = {"app": "#1f5fa8", "mask": "#b4541a", "range": "#2a7d3f", "attenuate": "#7a4fa0"}
_BARS = 20


def draw_report(report: Mapping[str, Any], path: Path, title: str) -> None:
    """Write a PNG: what each method removes against what it costs, and how far the strongest latents tell the classes apart.

    Args:
        report: as a fit's job returns it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    held_out = report.get("held_out")
    measured = [p for p in (held_out or {}).get("points", ()) if p.get("perplexity_increase")]
    figure = Figure(figsize=(10.4 if measured else 5.2, 4.8), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, squeeze=False)[0] if measured else figure.subplots(1, 1, squeeze=False)[0]
    figure.suptitle(title, fontsize=11)
    if measured:
        _trade_off(axes[0], measured)
    _separability(axes[-1], report["features"], float(report["layer_score"]))
    figure.savefig(path, format="png", metadata={"Software": None})


def cost_of(point: Mapping[str, Any]) -> float:
    """Perplexity increase on text that is not the target's: the mean over the other sets."""
    increase = point["perplexity_increase"]
    rest = [value for name, value in increase.items() if name != "target"]
    return float(sum(rest) / len(rest))


def _trade_off(axis: Any, points: Sequence[Mapping[str, Any]]) -> None:
    for method in dict.fromkeys(point["method"] for point in points):
        chosen = [point for point in points if point["method"] == method]
        axis.plot(
            [point["removal"] for point in chosen],
            [100 * cost_of(point) for point in chosen],
            color=_COLOURS.get(method, "0.3"),
            marker="o",
            markersize=5,
            linewidth=1.2,
            label=method,
        )
        for point in chosen:
            axis.annotate(
                f"{point['strength']:g}",
                (point["removal"], 100 * cost_of(point)),
                (5, 3),
                textcoords="offset points",
                fontsize=8,
                color=_COLOURS.get(method, "0.3"),
            )
    axis.axhline(0, color="0.6", linewidth=0.8, linestyle="--")
    axis.set_xlim(-0.1, 1.1)
    axis.set_xlabel("removal: drop of the target's accuracy (held out)")
    axis.set_ylabel("perplexity increase on other text, %")
    axis.legend(fontsize=8, frameon=False)


def _separability(axis: Any, features: Sequence[Mapping[str, Any]], layer_score: float) -> None:
    shown = list(features[:_BARS])[::-1]
    names = [f"{one['index']}  {(one.get('label') or '')[:26]}".replace("$", r"\$") for one in shown]
    axis.barh(range(len(shown)), [one["separability"] for one in shown], color=_COLOURS["app"], height=0.7)
    axis.set_yticks(range(len(shown)), names, fontsize=7)
    axis.axvline(layer_score, color=_COLOURS["mask"], linewidth=1.2, label=f"layer score {layer_score:.3f}")
    axis.set_xlim(0, 1)
    axis.set_xlabel("separability (Jensen-Shannon distance), best score first")
    axis.legend(fontsize=8, frameon=False, loc="lower right")
