"""A fitted detector as tables: what it reads, and how it does on unseen texts beside a dense probe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

console = Console()

_SHOWN = 8
_WORDS = {
    "single": "one latent",
    "multi": "a weighted sum of latents",
    "relation": "a decision tree over latents",
}


def show_detector(report: Mapping[str, Any] | None, name: str) -> None:
    """The ``detector`` of a fit's report; nothing where none was asked for."""
    if report is None:
        return
    if report["kind"] is None:
        console.print(f"No detector for rules: {report['reason']}", style="yellow", markup=False, highlight=False)
        return
    table = Table(
        "on",
        "of",
        "detector",
        "dense probe",
        title=f"{name} in rules: {_WORDS[report['kind']]} ({report['kind']}); balanced accuracy with 95 % interval",
        caption=_caption(report),
    )
    for key, words in (("cross_validated", f"{report['folds']} held-out folds"), ("held_out", "held-out texts")):
        for level, measured in (report[key] or {}).items():
            one = measured["detector"]
            counts = f"{one['positives']} + {one['negatives']} {level}s"
            table.add_row(words, counts, _figure(one), _figure(measured["dense"]))
    console.print(table)
    if report["doubt"]:
        console.print(report["doubt"], style="yellow", markup=False, highlight=False)
    for told in (report["against_dense"] or {}).values():
        style = "yellow" if told["better"] == "dense" else None
        console.print(told["says"], style=style, markup=False, highlight=False)


def _figure(measured: Mapping[str, Any] | None) -> str:
    if measured is None:
        return "—"
    return f"{measured['balanced_accuracy']:.3f} ({measured['low']:.3f} to {measured['high']:.3f})"


def _caption(report: Mapping[str, Any]) -> str:
    latents = report["latents"]
    shown = [f"{one['index']}" + (f" {one['label']}" if one["label"] else "") for one in latents[:_SHOWN]]
    more = f", {len(latents) - _SHOWN} more" if len(latents) > _SHOWN else ""
    by_text = report["labels"] == "sentence"
    tried = ", ".join(f"{kind} {_best(one, by_text):.3f}" for kind, one in report["trials"].items())
    words = f"latents {'; '.join(shown)}{more}".replace("[", r"\[")
    level = "texts" if by_text else "tokens"
    return words + (f"\n{level} on held-out folds: {tried}" if len(report["trials"]) > 1 else "")


def _best(trial: Mapping[str, Any], by_text: bool) -> float:
    """Of what was labelled: texts, or tokens."""
    return float(max(trial["text"].values()) if by_text else trial["token"])
