"""The pictures of docs/features.md, drawn from the bundled dictionaries: ``python tools/pictures.py``.

``docs/images/density.png``, ``contexts.png`` and ``curve.png``; the dose curve is `editserver fit vector`'s own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")
import matplotlib.pyplot as plt

from sae_weights.catalogue import BUNDLED_FOLDER
from sae_weights.knowledge.store import FILE, KnowledgeStore

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "images"
LAYERS = (10, 15, 20)
SHOWN = ("food", "colours", "death")
"""Topics of tests/features/named.json whose features are shown with their contexts."""


def main() -> None:
    """Draw all of them."""
    OUT.mkdir(parents=True, exist_ok=True)
    stores = {layer: KnowledgeStore.open(BUNDLED_FOLDER / f"smollm2-135m/l{layer}" / FILE) for layer in LAYERS}
    cards = {
        layer: json.loads((BUNDLED_FOLDER / f"smollm2-135m/l{layer}" / "card.json").read_text()) for layer in LAYERS
    }
    density(stores)
    curve(cards)
    contexts(stores)


def density(stores: dict[int, KnowledgeStore]) -> None:
    """How often features fire, per dictionary."""
    figure, axes = plt.subplots(figsize=(6.4, 3.0), dpi=110)
    edges = [10 ** (-6 + 0.2 * i) for i in range(31)]
    for layer, store in stores.items():
        values = [f.density or 0.0 for f in store.listing(0, store.n_features)]
        axes.hist([max(v, 1e-6) for v in values], bins=edges, histtype="step", linewidth=1.5, label=f"layer {layer}")
    axes.set(xscale="log", xlabel="share of tokens on which a feature fires", ylabel="features")
    axes.legend(frameon=False)
    _save(figure, "density.png")


def curve(cards: dict[int, dict[str, Any]]) -> None:
    """Training curves, with the held-out figures as levels."""
    figure, axes = plt.subplots(figsize=(6.4, 3.0), dpi=110)
    for number, (layer, card) in enumerate(cards.items()):
        points = card["curve"]
        axes.plot(
            [p["tokens"] / 1e6 for p in points], [p["fvu"] for p in points], color=f"C{number}", label=f"layer {layer}"
        )
        for kind, style in (("prose", "--"), ("chat", ":")):
            axes.axhline(card["held_out"][kind]["fvu"], color=f"C{number}", linestyle=style, linewidth=0.9)
    axes.set(ylim=(0.05, 0.4), xlabel="training tokens (millions)", ylabel="FVU")
    axes.set_title("training batches; held-out prose dashed, chat dotted", fontsize=9)
    axes.legend(frameon=False)
    _save(figure, "curve.png")


def contexts(stores: dict[int, KnowledgeStore]) -> None:
    """Three features: label, promoted tokens and their contexts, the darker the larger the activation."""
    named = json.loads((ROOT / "tests" / "features" / "named.json").read_text())
    chosen = [next(n for n in named if n["topic"] == topic) for topic in SHOWN]
    figure = plt.figure(figsize=(9.0, 5.6), dpi=110)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    y = 0.97
    for entry in chosen:
        store = stores[int(entry["sae"].rpartition("l")[2])]
        feature = store.feature(entry["index"])
        promoted = " ".join(repr(token) for token, _ in feature.promoted[:6])
        axes.text(0.01, y, f"{entry['sae']} · {feature.index} · {feature.label}", fontsize=10, weight="bold", va="top")
        axes.text(0.01, y - 0.035, f"promotes {promoted}   density {feature.density:.4f}", fontsize=8, va="top")
        y -= 0.085
        for context in feature.contexts[:4]:
            x = 0.015
            for token, activation in zip(context.tokens, context.activations, strict=True):
                shade = activation / (feature.max_activation or 1.0)
                shown = token.replace("\n", "⏎").replace("$", r"\$")
                box = {"facecolor": (1.0, 0.55, 0.1, min(1.0, shade)), "edgecolor": "none", "pad": 0.6}
                text = axes.text(x, y, shown, fontsize=8, va="top", family="DejaVu Sans Mono", bbox=box)
                x = text.get_window_extent(renderer).x1 / figure.bbox.width + 0.0015
                if x > 0.97:
                    break
            y -= 0.042
        y -= 0.03
    _save(figure, "contexts.png")


def _save(figure: Any, name: str) -> None:
    if name != "contexts.png":
        figure.tight_layout()
    figure.savefig(OUT / name)
    plt.close(figure)


if __name__ == "__main__":
    main()
