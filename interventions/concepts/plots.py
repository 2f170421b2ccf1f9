"""Pictures of fitted concepts. matplotlib is imported when one is drawn, never before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_COLOURS = {"app": "#1f5fa8", "mask": "#b4541a", "range": "#2a7d3f", "attenuate": "#7a4fa0"}
_BARS = 20


def draw_report(report: Mapping[str, Any], path: Path, title: str) -> None:
    """Write a PNG: what each method removes against what it costs, how far the strongest latents tell the classes apart, and how
    well the detector does beside a dense probe.

    Args:
        report: as a fit's job returns it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    held_out = report.get("held_out")
    measured = [p for p in (held_out or {}).get("points", ()) if p.get("perplexity_increase")]
    detector = report.get("detector") or {}
    detected = detector.get("cross_validated") or detector.get("held_out")
    n = 1 + bool(measured) + bool(detected)
    figure = Figure(figsize=(5.2 * n, 4.8), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(1, n, squeeze=False)[0])
    figure.suptitle(title, fontsize=11)
    if measured:
        _trade_off(axes.pop(0), measured)
    _separability(axes.pop(0), report["features"], float(report["layer_score"]))
    if detected:
        _detection(axes.pop(0), detector)
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


def _detection(axis: Any, detector: Mapping[str, Any]) -> None:
    rows = [
        (f"{level}s\n{words}", measured)
        for key, words in (("cross_validated", "held-out folds"), ("held_out", "held-out texts"))
        for level, measured in (detector.get(key) or {}).items()
    ]
    shown = (("detector", detector["kind"], "app", 0.1), ("dense", "dense probe", "mask", -0.1))
    for name, label, colour, shift in shown:
        drawn = [(len(rows) - 1 - i + shift, row[name]) for i, (_, row) in enumerate(rows) if row[name]]
        if not drawn:
            continue
        middle = [one["balanced_accuracy"] for _, one in drawn]
        low = [max(0.0, one["balanced_accuracy"] - one["low"]) for _, one in drawn]
        high = [max(0.0, one["high"] - one["balanced_accuracy"]) for _, one in drawn]
        places = [place for place, _ in drawn]
        axis.errorbar(middle, places, xerr=[low, high], fmt="o", color=_COLOURS[colour], capsize=3, label=label)
    axis.axvline(0.5, color="0.6", linewidth=0.8, linestyle="--")
    axis.set_yticks(range(len(rows)), [words for words, _ in reversed(rows)], fontsize=8)
    axis.set_ylim(-0.6, len(rows) - 0.4)
    axis.set_xlim(0.4, 1.02)
    axis.set_xlabel("balanced accuracy, 95 % interval")
    axis.legend(fontsize=8, frameon=False, loc="lower left")


def _separability(axis: Any, features: Sequence[Mapping[str, Any]], layer_score: float) -> None:
    shown = list(features[:_BARS])[::-1]
    names = [f"{one['index']}  {(one.get('label') or '')[:26]}".replace("$", r"\$") for one in shown]
    axis.barh(range(len(shown)), [one["separability"] for one in shown], color=_COLOURS["app"], height=0.7)
    axis.set_yticks(range(len(shown)), names, fontsize=7)
    axis.axvline(layer_score, color=_COLOURS["mask"], linewidth=1.2, label=f"layer score {layer_score:.3f}")
    axis.set_xlim(0, 1)
    axis.set_xlabel("separability (Jensen-Shannon distance), best score first")
    axis.legend(fontsize=8, frameon=False, loc="lower right")
