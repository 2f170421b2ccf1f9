"""The card beside the weights: what the dictionary is, what it was trained on, how good it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sae_weights.training.corpus import CHAT, SOURCES

OBJECTIVES = {
    "batchtopk": "BatchTopK with k = {k}, saved as JumpReLU",
    "topk": "TopK with k = {k}",
    "jumprelu": "JumpReLU trained towards an L0 of {k}",
}


def write_card(folder: Path, figures: dict[str, Any]) -> None:
    """``card.json`` with all figures and ``README.md`` for people."""
    (folder / "card.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(text(folder.name, figures), encoding="utf-8")


def text(name: str, figures: dict[str, Any]) -> str:
    """The card as Markdown."""
    recipe, held_out = figures["recipe"], figures["held_out"]
    rows = "\n".join(_row(kind, held_out[kind]) for kind in sorted(held_out, key=_prose_and_chat_first))
    distinct = sum(figures["distinct_tokens"].values())
    used = [s for s in SOURCES if s.name != CHAT.name or CHAT.name in figures["distinct_tokens"]]
    sources = "\n".join(f"* {s.name}: {s.package}. {s.licence}. {s.note}." for s in used)
    # Whose the weights are depends on the model and the text; only of the bundled ones is it ours to say.
    bundled = figures["built_in_text"] and figures["model"] == "smollm2-135m-instruct"
    licence = " Licence of the weights: Apache-2.0." if bundled else ""
    return f"""# {name}

A sparse autoencoder on `resid_post` of decoder layer {figures["layer"]} (0-based) of {figures["model"]}:
{recipe["n_features"]} latents, {OBJECTIVES[recipe["objective"]].format(k=recipe["k"])}, in SAELens' folder layout
(bf16, unit decoder rows: an activation is a length in the residual stream).{licence}

Made by `{figures["options"]}`.

## Quality, on held-out ordinary tokens

Held-out *documents*: no window of them was trained on, and a conversation that quotes one is held out with it. The
weights judged are the saved ones. Position 0 and tokens with ‖h‖ > 10 × the median ({figures["median_norm"]}) are
neither trained on nor counted, and stay as they are where the reconstruction is spliced into the model.

| text | tokens | FVU | L0 | CE clean | CE with reconstruction | CE zero-ablated | CE recovered |
| --- | --- | --- | --- | --- | --- | --- | --- |
{rows}

Dead latents: {100 * figures["dead"]:.2f} % (fire on none of {figures["dead_judged_on_tokens"]:,} held-out tokens).

## Training

{figures["training_tokens"]:,} tokens: {figures["training_tokens"] / distinct:.1f} passes over {distinct:,} distinct ones
({", ".join(f"{k} {v:,}" for k, v in figures["distinct_tokens"].items())}); {figures["outliers_dropped"]:,} outliers dropped.
Batch {recipe["batch"]}, Adam, peak rate {recipe["lr"]:g}.

| tokens | FVU of the training batches | L0 | dead latents |
| --- | --- | --- | --- |
{curve_rows(figures["curve"])}
{_outlook(figures, distinct) if figures["built_in_text"] else ""}
## Text

{sources if figures["built_in_text"] else "The user's own files."}
"""


def curve_rows(curve: list[dict[str, Any]], rows: int = 12) -> str:
    """About ``rows`` lines of the training curve, the last one included."""
    shown = curve[:: max(1, len(curve) // rows)]
    if shown and shown[-1] != curve[-1]:
        shown.append(curve[-1])
    return "\n".join(f"| {c['tokens']:,} | {c['fvu']:.3f} | {c['l0']:.1f} | {c['dead']} |" for c in shown)


def _outlook(figures: dict[str, Any], distinct: int) -> str:
    """What more time or more text would give, as far as this run's own figures tell."""
    held_out = figures["held_out"].get("prose")
    if held_out is None or not figures["curve"]:
        return ""
    last, gap = figures["curve"][-1]["fvu"], held_out["fvu"] - figures["curve"][-1]["fvu"]
    return f"""
The batches of the last steps have an FVU of {last:.3f}, held-out prose {held_out["fvu"]:.3f}. The gap of {gap:.3f} is what
{distinct:,} distinct tokens leave to learn by heart; more text narrows it, more passes over the same text do not.
"""


def _row(kind: str, f: dict[str, Any]) -> str:
    plain = f"| {kind} | {f['tokens']:,} | {f['fvu']:.3f} | {f['l0']:.1f} |"
    if "ce" not in f:
        return f"{plain} – | – | – | – |"
    ce = f["ce"]
    return f"{plain} {ce['clean']:.3f} | {ce['sae']:.3f} | {ce['zero']:.3f} | {100 * f['ce_recovered']:.1f} % |"


def _prose_and_chat_first(kind: str) -> tuple[int, str]:
    return ({"prose": 0, "text": 0, "chat": 1}.get(kind, 2), kind)
