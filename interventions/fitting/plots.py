"""Pictures of fits. matplotlib is imported when one is drawn, never before."""

from __future__ import annotations

from pathlib import Path

from interventions.fitting.dose import DoseCurve, DosePoint

_EFFECT, _COST, _MARK = "#1f5fa8", "#b4541a", "#2a7d3f"


def draw_dose_curve(curve: DoseCurve, path: Path, title: str) -> None:
    """Write a PNG: effect above, perplexity and repetition below, against the dose; incoherent doses are shaded."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(7.2, 5.6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    points = curve.points
    doses = [point.dose for point in points]

    told = [point for point in points if point.effect is not None]
    above.errorbar(
        [point.dose for point in told],
        [point.effect for point in told],
        yerr=[point.effect_error or 0.0 for point in told],
        color=_EFFECT,
        marker="o",
        markersize=4,
        linewidth=1.5,
        capsize=2,
    )
    for level, name in ((0, "held-out negatives"), (1, "held-out positives")):
        above.axhline(level, color="0.6", linewidth=0.8, linestyle="--")
        above.annotate(
            name,
            (0.995, level),
            (0, 2),
            ("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color="0.4",
        )
    above.set_ylabel("effect")
    above.set_title(title, fontsize=11)

    scored = [point for point in points if point.perplexity is not None]
    below.semilogy(
        [point.dose for point in scored],
        [point.perplexity for point in scored],
        color=_COST,
        marker="o",
        markersize=4,
        label="perplexity",
    )
    if curve.max_perplexity != float("inf"):
        below.axhline(curve.max_perplexity, color=_COST, linewidth=0.8, linestyle=":")
    below.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    below.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    below.yaxis.set_minor_formatter(NullFormatter())
    below.set_ylabel("perplexity", color=_COST)
    below.set_xlabel("dose  ‖s·v‖ / median ‖h‖")
    share = below.twinx()
    share.plot(doses, [point.repetition for point in points], color="0.55", linewidth=1, label="repetition")
    share.set_ylim(0, 1)
    share.set_ylabel("repetition", color="0.45")

    for axis in (above, below):
        for left, right in _incoherent(points):
            axis.axvspan(left, right, color="0.92", zorder=0)
        for strength in (curve.recommended, curve.recommended_negative):
            if strength is not None:
                axis.axvline(curve.at(strength).dose, color=_MARK, linewidth=1.2)
    for strength in (curve.recommended, curve.recommended_negative):
        if strength is not None:
            point = curve.at(strength)
            above.annotate(
                f"strength {strength:.3g}",
                (point.dose, 0.03),
                (4 if strength > 0 else -4, 0),
                ("data", "axes fraction"),
                textcoords="offset points",
                ha="left" if strength > 0 else "right",
                fontsize=9,
                color=_MARK,
            )
    figure.savefig(path, format="png", metadata={"Software": None})


def _incoherent(points: tuple[DosePoint, ...]) -> list[tuple[float, float]]:
    """Dose intervals around the incoherent points, each reaching half way to its neighbours."""
    spans = []
    for i, point in enumerate(points):
        if not point.coherent:
            left = points[i - 1].dose if i else point.dose
            right = points[i + 1].dose if i + 1 < len(points) else point.dose
            spans.append(((left + point.dose) / 2, (point.dose + right) / 2))
    return spans
