"""The card beside the weights: what the dictionary is, what it was trained on, how good it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sae_weights.training.corpus import BROWN, CHAT, PYTHON, WORDNET


def write_card(folder: Path, figures: dict[str, Any]) -> None:
    """``card.json`` with all figures and ``README.md`` for people."""
    (folder / "card.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(text(folder.name, figures), encoding="utf-8")


def text(name: str, figures: dict[str, Any]) -> str:
    """The card as Markdown."""
    recipe = figures["recipe"]
    rows = "\n".join(
        f"| {kind} | {f['tokens']:,} | {f['fvu']:.3f} | {f['l0']:.1f} | {f['ce']['clean']:.3f} | {f['ce']['sae']:.3f} "
        f"| {f['ce']['zero']:.3f} | {100 * f['ce_recovered']:.1f} % |"
        for kind, f in (("prose", figures["prose"]), ("chat", figures["chat"]))
    )
    curve = figures["curve"][:: max(1, len(figures["curve"]) // 10)]
    if curve and curve[-1] != figures["curve"][-1]:
        curve.append(figures["curve"][-1])
    sources = "\n".join(f"* {s.name}: {s.package}. {s.licence}. {s.note}." for s in (BROWN, WORDNET, PYTHON, CHAT))
    return f"""# {name}

A sparse autoencoder on `resid_post` of decoder layer {figures["layer"]} (0-based) of SmolLM2-135M-Instruct:
{recipe["n_features"]} latents, BatchTopK with k = {recipe["k"]}, saved as JumpReLU in SAELens' folder layout
(bf16, unit decoder rows: an activation is a length in the residual stream). Licence of the weights: Apache-2.0.

Made by `editserver sae train --model demo {figures["options"]}`.

## Quality, on held-out ordinary tokens

Position 0 and tokens with ‖h‖ > 10 × the median ({figures["median_norm"]}) are neither trained on nor counted.
The weights judged are the saved ones. Held-out windows are other parts of the documents that were trained on.

| text | tokens | FVU | L0 | CE clean | CE with reconstruction | CE zero-ablated | CE recovered |
| --- | --- | --- | --- | --- | --- | --- | --- |
{rows}

Dead latents: {100 * figures["dead"]:.2f} % (fire on none of {figures["dead_judged_on_tokens"]:,} held-out tokens).

## Training

{figures["training_tokens"]:,} tokens in passes over {sum(figures["distinct_tokens"].values()):,} distinct ones
({", ".join(f"{k} {v:,}" for k, v in figures["distinct_tokens"].items())}); {figures["outliers_dropped"]:,} outliers dropped.
Batch {recipe["batch"]}, Adam, peak rate {recipe["lr"]:g}.

| tokens | FVU of the training batches | dead latents |
| --- | --- | --- |
{chr(10).join(f"| {c['tokens']:,} | {c['fvu']:.3f} | {c['dead']} |" for c in curve)}

## Text

{sources}
"""
