"""The tables of the study, in Markdown, from its results alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from interventions.concepts.report import Interval, mean_interval
from reproduce.app.analysis import LEVELS, METHODS, READINGS, TEXTS, Cell, compare, cost, costs, lost, removal
from reproduce.app.settings import BY_MEAN, DEFAULTS, MAIN_LAYER, SIDE, Trial

NAMES = {"probe": "frozen probe", "readout": "next token", "others": "other classes", "neutral": "neutral text"}


def tables(results: Mapping[str, Any]) -> str:
    """Everything that the command prints."""
    groups = grouped(results["cells"])
    parts = [_in_short(groups), _unedited(groups)]
    parts += [_at_equal_removal(groups, reading) for reading in READINGS]
    parts += [_claim(groups, reading) for reading in READINGS]
    parts += [_as_published(groups), _layers(results["cells"]), _separability(results["cells"])]
    return "\n\n".join(part for part in parts if part) + "\n"


def grouped(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """Set → its cells, and all of them together last."""
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        found.setdefault(cell["set"], []).append(cell)
    return found | ({"all": list(cells)} if len(found) > 1 else {})


def _in_short(groups: Mapping[str, Sequence[Cell]]) -> str:
    """Verdicts counted: every reading, level and text set, in each set and in all together."""
    rows = []
    for other in METHODS[:-1]:
        row: list[str] = [other]
        for names in ([name for name in groups if name != "all"], ["all"] if "all" in groups else []):
            found = [
                compare(groups[name], other, reading, texts, level)
                for name in names
                for reading in READINGS
                for texts in TEXTS
                for level in LEVELS
            ]
            verdicts = [one.verdict for one in found if one.pairs]
            row += [str(verdicts.count(verdict)) for verdict in ("holds", "open", "reversed")]
            row.append(str(sum(one.app_only for one in found) - sum(one.other_only for one in found)))
        rows.append(row)
    head = ["APP against"]
    for where in ("set by set", "all sets"):
        head += [f"{where}: holds", "open", "reversed", "reached by APP only, less by the other only"]
    return _table("In short: is APP cheaper at equal removal? Verdicts counted", head, rows)


def _unedited(groups: Mapping[str, Sequence[Cell]]) -> str:
    rows = []
    for name, cells in groups.items():
        if name != "all":
            before = [cell["before"] for cell in cells]
            read = [
                _share(mean_interval([b[r][who] for b in before])) for r in READINGS for who in ("target", "others")
            ]
            perplexity = [_plain(mean_interval([b["perplexity"][t] for b in before]), ".0f") for t in TEXTS]
            rows.append([name, str(len(cells)), *read, *perplexity])
    head = ["set", "seeds", "probe, target", "probe, others", "next token, target", "next token, others"]
    head += [f"perplexity, {NAMES[t]}" for t in TEXTS]
    return _table("Unedited: accuracy in % (chance 25) and perplexity", head, rows)


def _at_equal_removal(groups: Mapping[str, Sequence[Cell]], reading: str) -> str:
    rows = []
    for name, cells in groups.items():
        for method in METHODS:
            row = [name, method]
            for texts in TEXTS:
                for level in LEVELS:
                    found = costs(cells, method, reading, texts, level)
                    reached = [value for value in found if value is not None]
                    several = f" ({len(reached)}/{len(found)})" if len(reached) < len(found) else ""
                    row.append((_share(mean_interval(reached)) if reached else "–") + several)
            rows.append(row)
    head = ["set", "method", *(f"{NAMES[t]}, {100 * level:.0f} %" for t in TEXTS for level in LEVELS)]
    title = f"Perplexity increase in % at equal removal, read by the {NAMES[reading]} (cells that reach it, if not all)"
    return _table(title, head, rows)


def _claim(groups: Mapping[str, Sequence[Cell]], reading: str) -> str:
    marks = {"holds": "holds", "reversed": "reversed", "open": "open"}
    rows = []
    for name, cells in groups.items():
        for other in METHODS[:-1]:
            row = [name, other]
            for texts in TEXTS:
                for level in LEVELS:
                    found = compare(cells, other, reading, texts, level)
                    only = f", app only {found.app_only}" if found.app_only else ""
                    only += f", other only {found.other_only}" if found.other_only else ""
                    shown = "–" if found.difference is None else _share(found.difference)
                    row.append(f"{marks[found.verdict]}: {shown} (n = {found.pairs}{only})")
            rows.append(row)
    head = ["set", "against", *(f"{NAMES[t]}, {100 * level:.0f} %" for t in TEXTS for level in LEVELS)]
    title = (
        f"Does APP cost less at equal removal? Cost of the other method less APP's, in points, by the {NAMES[reading]}"
    )
    return _table(title, head, rows)


def _as_published(groups: Mapping[str, Sequence[Cell]]) -> str:
    rows = [
        [name, trial.by, *_setting(cells, trial)] for name, cells in groups.items() for trial in (*DEFAULTS, *BY_MEAN)
    ]
    head = ["set", "latents by", "setting", *_SETTING]
    return _table("At the published defaults: removal in % of what is removable, cost in %", head, rows)


def _layers(cells: Sequence[Cell]) -> str:
    layers = sorted({found["layer"] for cell in cells for found in cell["points"]})
    if len(layers) < 2:
        return ""
    with_all = [cell for cell in cells if {found["layer"] for found in cell["points"]} == set(layers)]
    rows = [[str(layer), *_setting(with_all, trial, layer)] for layer in layers for trial in SIDE]
    return _table(f"Other layers, set {with_all[0]['set']}", ["layer", "setting", *_SETTING], rows)


_SETTING = [
    *(f"removed, {NAMES[r]}" for r in READINGS),
    *(f"perplexity, {NAMES[t]}" for t in TEXTS),
    *(f"others' accuracy lost, {NAMES[r]}" for r in READINGS),
]


def _setting(cells: Sequence[Cell], trial: Trial, layer: int = MAIN_LAYER) -> list[str]:
    gone = [removal(cells, trial, reading, layer) for reading in READINGS]
    return [
        trial.label,
        *("–" if found is None else _share(found, ".0f") for found in gone),
        *(_share(cost(cells, trial, texts, layer)) for texts in TEXTS),
        *(_share(lost(cells, trial, reading, layer)) for reading in READINGS),
    ]


def _separability(cells: Sequence[Cell]) -> str:
    rows = []
    for name in dict.fromkeys(cell["set"] for cell in cells):
        own = [cell["separability"] for cell in cells if cell["set"] == name]
        for layer in sorted(own[0], key=int):
            scores = [found[layer] for found in own]
            keys = ("all", "active", "difference, top 50", "mean, top 50")
            row = [_plain(mean_interval([s[key] for s in scores]), ".3f") if key in scores[0] else "–" for key in keys]
            rows.append([name, layer, *row])
    head = ["set", "layer", "S, all latents", "S, latents that fire", "top 50 by difference", "top 50 by mean"]
    return _table("Separability: mean Jensen-Shannon distance between the classes", head, rows)


def _share(found: Interval, form: str = ".1f") -> str:
    return _plain(Interval(*(100 * end for end in (found.mean, found.low, found.high))), form)


def _plain(found: Interval, form: str) -> str:
    def shown(value: float) -> str:
        return f"{value:{form}}"

    if not math.isfinite(found.low):
        return shown(found.mean)
    return f"{shown(found.mean)} [{shown(found.low)}, {shown(found.high)}]"


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"### {title}", "", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])
