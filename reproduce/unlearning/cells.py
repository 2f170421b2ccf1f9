"""The cells of the study: one method at one setting, each with one map per target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from interventions.maps import gates
from interventions.maps.calibration import Calibration, Rate, calibrate, rate_above
from interventions.maps.entities import known_to_unknown
from interventions.maps.gates import CusumGate, Gate, ShareGate, WindowGate
from interventions.maps.map import AllTokens, LatentMap, MentionTokens, Scope, SequenceGate, TriggerTokens
from interventions.maps.transfer import Transfer, Unit, canonical, clamp_active, clamp_hit
from reproduce.unlearning.edits import Mapper, Runs
from reproduce.unlearning.material import Material

Method = Literal["none", "prompt", "map", "map of every latent", "clamp", "gated clamp"]
Kind = Literal["", "share", "window", "cusum"]

ALPHA = 0.05
"""False-positive rate that gates are calibrated to."""
WINDOW, WINDOW_LEAST = 16, 4
CUSUM_ALLOWANCE = 3.0
"""CUSUM's k in units of the benign share of hits."""


@dataclass(frozen=True)
class Cell:
    """What one row of the tables is about.

    Attributes:
        method: "map" is known → unknown.
        layer: of the SAE; −1 without one.
        strength: λ of a map, c in units of ‖h‖ of a clamp.
        tokens: of a map: the mention's "last" token or "all" of them; of a gated clamp: "hits", or "all" once it is open.
        gate: which.
        whole: the gate decides for the whole prompt, earlier tokens included (two passes, as published).
    """

    method: Method
    layer: int = -1
    strength: float = 0.0
    tokens: str = ""
    gate: Kind = ""
    whole: bool = False

    @property
    def name(self) -> str:
        """A file name."""
        parts = [self.method.replace(" ", "-"), f"l{self.layer}", f"{self.strength:g}", self.tokens, self.gate]
        return "_".join(p for p in [*parts, "whole" if self.whole else ""] if p)

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


def all_cells(layers: Sequence[int], quick: bool = False) -> list[Cell]:
    """The rows, those that matter most first."""
    found = [Cell("none"), Cell("prompt")]
    strengths = (1.0, 4.0) if quick else (1.0, 4.0, 0.5, 2.0)
    clamps = (1.0,) if quick else (1.0, 4.0, 0.25, 0.0)
    order = sorted(layers, key=lambda layer: (layer != 15, layer))
    for layer in order[:1] if quick else order:
        found += [Cell("map", layer, s, t) for s in strengths[:2] for t in ("last", "all")]
        found.append(Cell("map of every latent", layer, 1.0, "all"))
        found += [Cell("gated clamp", layer, c, "hits", "share", True) for c in clamps[:3]]
        found += [Cell("gated clamp", layer, 1.0, "hits", kind) for kind in ("share", "window", "cusum")]
        found.append(Cell("gated clamp", layer, 1.0, "all", "share"))
        found += [Cell("clamp", layer, c) for c in clamps[:2]]
    for layer in order if not quick else []:
        found += [Cell("map", layer, s, t) for s in strengths[2:] for t in ("last", "all")]
        found += [Cell("clamp", layer, c) for c in clamps[2:]]
        found += [Cell("map of every latent", layer, s, t) for s, t in ((0.5, "all"), (1.0, "last"))]
    return found


def mapper(runs: Runs, material: Material, cell: Cell, target: str) -> Mapper:
    """The cell's map for one target."""
    at, sae = material.layers[cell.layer], runs.saes[cell.layer]
    scope: Scope = AllTokens()
    gate: SequenceGate | None = None
    transfers: tuple[Transfer, ...]
    if cell.method in ("map", "map of every latent"):
        every = cell.method != "map"
        latents, means = (at.every, at.every_mean) if every else (at.latents.all, at.mean_unknown)
        transfers = tuple(t.at(cell.strength) for t in known_to_unknown(latents, means))
        tokens: Literal["last", "all"] = "last" if cell.tokens == "last" else "all"
        scope = MentionTokens(material.surfaces[target], tokens)
    elif cell.method == "clamp":
        transfers = tuple(clamp_active(f, cell.strength, Unit.RESIDUAL_NORM) for f in at.farrell[target])
    else:
        assert cell.method == "gated clamp"
        assert cell.gate
        latents = tuple(sorted(at.dsg[target]))
        transfers = clamp_hit(latents, cell.strength, Unit.RESIDUAL_NORM)
        scope = TriggerTokens(latents) if cell.tokens == "hits" else AllTokens()
        chosen, facts, _ = calibrated_gate(material, cell.layer, cell.gate, target)
        gate = SequenceGate(chosen, latents, facts)
    fitted = LatentMap("smollm2-135m-instruct", sae.digest, cell.layer, canonical(transfers), scope, gate)
    return Mapper(sae, fitted, cell.whole)


def hits(material: Material, layer: int, latents: Sequence[int]) -> list[gates.Bits]:
    """Hit bits of each benign sequence."""
    fires = material.layers[layer].fires[:, list(latents)].any(axis=1)
    ends = np.cumsum([len(s) for s in material.benign])
    return list(np.split(fires, ends[:-1]))


def calibrated_gate(material: Material, layer: int, kind: Kind, target: str) -> tuple[Gate, Calibration, Rate]:
    """The gate at a false-positive rate of :data:`ALPHA`, how it was calibrated, and its rate on held-out sequences."""
    bits = hits(material, layer, sorted(material.layers[layer].dsg[target]))
    use = [b for b, yes in zip(bits, material.calibrated, strict=True) if yes]
    rest = [b for b, yes in zip(bits, material.calibrated, strict=True) if not yes]

    def gate(threshold: float) -> Gate:
        if kind == "share":
            return ShareGate(threshold)
        if kind == "window":
            return WindowGate(threshold, WINDOW, WINDOW_LEAST, latch=True)
        ordinary = sum(int(b[1:].sum()) for b in use) / max(sum(len(b) - 1 for b in use), 1)
        return CusumGate(threshold, min(0.5, max(0.02, CUSUM_ALLOWANCE * ordinary)), latch=True)

    facts = calibrate([gates.statistic(gate(0.0), b) for b in use], ALPHA)
    found = gate(facts.threshold)
    return found, facts, rate_above([gates.statistic(found, b) for b in rest], facts.threshold)
