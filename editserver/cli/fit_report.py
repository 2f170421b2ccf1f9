"""The report of a fitted vector: tables for people, JSON and a picture for files, and how to use it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from editserver.cli.vector_store import Store
from editserver.library import Listing, Vector
from interventions.fitting.dose import DoseCurve
from interventions.fitting.vectors import LayerFit

METHOD_WORDS = {"mean": "difference of means", "pca": "first principal component"}


def rounded(value: Any) -> Any:
    """Floats to 6 significant digits, those that JSON lacks to null."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return value


@dataclass(frozen=True)
class Outcome:
    """What came of a fit.

    Attributes:
        fits: one per layer that was compared.
        chosen: the one that is stored.
        curve: of the chosen one, if it was measured.
        vector, listing: as stored in ``store``.
        report: folder with ``report.json`` and ``dose.png``.
    """

    fits: tuple[LayerFit, ...]
    chosen: LayerFit
    curve: DoseCurve | None
    vector: Vector
    listing: Listing
    model_name: str
    store: Store
    report: Path | None = None

    @property
    def strength(self) -> float:
        """To begin with: the recommended strength, else the one of dose 0.3."""
        if self.curve is not None and self.curve.recommended is not None:
            return self.curve.recommended
        return 0.3 / self.chosen.dose

    def as_dict(self) -> dict[str, Any]:
        """The report, as JSON."""
        return {
            "vector": self.listing.as_dict(),
            "description": self.vector.description,
            **self.vector.meta,
            "layers_compared": [rounded(fit.figures()) for fit in self.fits],
            "answers": None
            if self.curve is None
            else [{"strength": rounded(p.strength), "answer": p.answer} for p in self.curve.points],
        }


def write_report(folder: Path, outcome: Outcome) -> None:
    """``report.json``, and ``dose.png`` if there is a curve."""
    (folder / "report.json").write_text(
        json.dumps(outcome.as_dict(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    if outcome.curve is None:
        return
    from interventions.fitting.plots import draw_dose_curve

    title = f"{outcome.listing.name}, layer {outcome.chosen.layer} of {outcome.model_name}"
    draw_dose_curve(outcome.curve, folder / "dose.png", title)


def show(outcome: Outcome, console: Console, *, as_json: bool) -> None:
    """Print the report: as tables, or as JSON."""
    if as_json:
        print(json.dumps(outcome.as_dict(), ensure_ascii=False))
        return
    console.print(_layer_table(outcome))
    if outcome.chosen.held_out.low <= 0.5:
        console.print("The held-out texts do not separate clearly (their interval holds ½): do not trust this vector.")
    if outcome.curve is not None:
        console.print(_dose_table(outcome.curve))
        if outcome.curve.recommended is None:
            console.print("No coherent dose raised the effect: the strength below is merely that of dose 0.3.")
    listing = outcome.listing
    console.print(f"Stored in {outcome.store}: {listing.name}, version {listing.version}, digest {listing.digest[:12]}")
    if outcome.report is not None:
        files = ["report.json"] if outcome.curve is None else ["report.json", "dose.png"]
        console.print("Report: " + ", ".join(str(outcome.report / file) for file in files))
    if warning := outcome.store.warning(outcome.chosen.layer):
        console.print(warning)
    print("\n" + hint(outcome))


def _layer_table(outcome: Outcome) -> Table:
    meta = outcome.vector.meta
    examples = meta["examples"]
    n = f"{examples['positive']} pairs"
    if examples["kind"] != "pairs":
        n = f"{examples['positive']} + {examples['negative']} texts"
    words = METHOD_WORDS[meta["method"]]
    title = f"{outcome.listing.name}: {words} of {n} ({examples['source']}), pooling {meta['pooling']}"
    table = Table(
        "layer",
        "AUROC cross-val.",
        "separation",
        "AUROC held out",
        "accuracy",
        "cos mean, pca",
        "cos halves",
        "expl. var.",
        "dose of s = 1",
        title=title,
        caption="chosen by cross-validation inside the training texts (AUROC, then separation); held-out texts played no part",
    )
    for fit in outcome.fits:
        held_out = f"{fit.held_out.value:.3f} [{fit.held_out.low:.3f}, {fit.held_out.high:.3f}]"
        cells = [
            f"{fit.cross_validated:.3f}",
            f"{fit.separation:.2f}",
            held_out.replace("[", r"\["),
            f"{fit.accuracy:.3f}",
        ]
        cells += [_figure(fit.cosine_methods), _figure(fit.cosine_halves), _figure(fit.explained_variance)]
        mark = " ←" if fit is outcome.chosen and len(outcome.fits) > 1 else ""
        table.add_row(f"{fit.layer}{mark}", *cells, f"{fit.dose:.3f}")
    return table


def _dose_table(curve: DoseCurve) -> Table:
    table = Table("dose", "strength", "effect", "perplexity", "repetition", "tokens", "", title="dose curve")
    for column in table.columns[:-1]:
        column.justify = "right"
    for point in curve.points:
        marks = ["" if point.coherent else "incoherent"]
        if point.strength in (curve.recommended, curve.recommended_negative):
            marks.append("recommended")
        error = "" if point.effect_error is None else f" ± {point.effect_error:.2f}"
        table.add_row(
            f"{point.dose:+.2f}",
            f"{point.strength:+.2f}",
            _figure(point.effect, 2) + error,
            _figure(point.perplexity, 2),
            f"{point.repetition:.2f}",
            str(point.tokens),
            " ".join(filter(None, marks)),
        )
    return table


def _figure(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def hint(outcome: Outcome) -> str:
    """How to use the vector in a request."""
    base = outcome.store.url or "http://localhost:8000"
    steer = {
        "type": "steer",
        "vector": outcome.listing.name,
        "strength": float(f"{outcome.strength:.3g}"),
        "tokens": ["last_prompt_token", "generated"],
    }
    body = {
        "model": outcome.model_name,
        "messages": [{"role": "user", "content": "Tell me about your day."}],
        "interventions": [steer],
    }
    data = json.dumps(body, ensure_ascii=False)
    return (
        f"curl {base}/v1/chat/completions -H 'Content-Type: application/json' -d '{data}'\n\n"
        f'client.chat("Tell me about your day.", interventions=[Steer(vector="{steer["vector"]}", '
        f"strength={steer['strength']}, tokens={json.dumps(steer['tokens'])})])"
    )
