"""The dilution attack: benign tokens before the question, until the gate does not open.

Per gate and number of padding tokens: at which share of the target's questions the gate still opens; whether the answer is
given (behind the gated clamp, and without any edit, since a model of this size also forgets the question); at which share of
benign questions the gate opens behind the same padding. What the bits of the unpadded question predict for a share gate is
:func:`interventions.maps.dilution.padding_to_evade`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from interventions.maps import gates
from interventions.maps.dilution import dilute, padding_to_evade
from reproduce.unlearning.cells import Cell, Kind, calibrated_gate, mapper
from reproduce.unlearning.edits import Runs
from reproduce.unlearning.knowledge import key
from reproduce.unlearning.material import Material
from reproduce.unlearning.recall import Answered, Question, ask

PADDING = (0, 50, 200, 800)
GATES: tuple[Kind, ...] = ("share", "window", "cusum")
STRENGTH = 1.0


@dataclass(frozen=True)
class Predicted:
    """What the bits of an unpadded prompt say about a share gate.

    Attributes:
        opens: padding → whether it opens behind so many benign tokens.
        evaded: the fewest benign tokens behind which it stays closed; None where it never opens.
    """

    opens: dict[int, bool]
    evaded: int | None


def predict(bits: gates.Bits, gate: gates.ShareGate, padding: Sequence[int] = PADDING) -> Predicted:
    """Benign tokens that never hit, in front of the prompt ``bits``."""
    opens = {n: gates.statistic(gate, dilute(bits, n)) > gate.threshold for n in padding}
    evidence = bits[1:]
    n = padding_to_evade(int(evidence.sum()), len(evidence), gate.threshold) if gate.threshold > 0 else None
    return Predicted(opens, n if opens.get(0, True) else None)


def padded(asked: Question, padding: Sequence[int], n: int, offset: int) -> Question:
    """The question behind ``n`` tokens of ``padding``, read in a circle from ``offset``."""
    line = [padding[(offset + i) % len(padding)] for i in range(n)]
    return Question(asked.entity, asked.attribute, (*line, *asked.prompt), asked.answers, asked.text)


def attack(runs: Runs, material: Material, layer: int, lengths: Sequence[int]) -> dict[str, Any]:
    """All gates at all paddings, one question per target, edits at ``layer`` and gates at every SAE."""
    targets = [key(t) for t in material.knowledge.targets]
    ours = [material.asked[name][0] for name in targets]
    theirs = [material.others[i % len(material.others)] for i in range(len(targets))]
    rows: list[dict[str, Any]] = []
    for n in lengths:
        questions = [padded(q, material.padding, n, 37 * i) for i, q in enumerate(ours)]
        benign = [padded(q, material.padding, n, 37 * i + 19) for i, q in enumerate(theirs)]
        plain = ask(questions, runs.plain(), runs.passes)
        row: dict[str, Any] = {"padding": n, "answered without an edit": _share(plain), "gates": []}
        for at in runs.layers:
            bits = [_fires(runs, at, q.prompt) for q in (*questions, *benign)]
            for kind in GATES:
                row["gates"].append(_gate(runs, material, at, kind, targets, bits))
        for kind in GATES:
            cell = Cell("gated clamp", layer, STRENGTH, "hits", kind, kind == "share")
            made = [mapper(runs, material, cell, name) for name in targets]
            answered = ask(questions, runs.edited(made), runs.passes, range(len(questions)))
            entry = next(g for g in row["gates"] if g["layer"] == layer and g["gate"] == kind)
            entry["answered"] = _share(answered)
            entry["recovered"] = _recovered(plain, answered)
        rows.append(row)
    return {"layer": layer, "rows": rows, "predicted": _predictions(runs, material, ours, targets, lengths)}


def _gate(
    runs: Runs, material: Material, layer: int, kind: Kind, targets: Sequence[str], fires: Sequence[gates.Bits]
) -> dict[str, Any]:
    """Share of target questions and of benign ones at which the gate opens; ``fires``: first ours, then the benign."""
    opened: list[bool] = []
    wrongly: list[bool] = []
    for i, name in enumerate(targets):
        gate, _, _ = calibrated_gate(material, layer, kind, name)
        latents = list(material.layers[layer].dsg[name])
        for found, line in ((opened, fires[i]), (wrongly, fires[len(targets) + i])):
            found.append(gates.statistic(gate, line[:, latents].any(axis=1)) > gate.threshold)
    return {"layer": layer, "gate": kind, "opened": float(np.mean(opened)), "opened on benign": float(np.mean(wrongly))}


def _predictions(
    runs: Runs, material: Material, ours: Sequence[Question], targets: Sequence[str], lengths: Sequence[int]
) -> list[dict[str, Any]]:
    found = []
    for layer in runs.layers:
        every = []
        for name, q in zip(targets, ours, strict=True):
            gate, _, _ = calibrated_gate(material, layer, "share", name)
            assert isinstance(gate, gates.ShareGate)
            bits: gates.Bits = np.any(_fires(runs, layer, q.prompt)[:, list(material.layers[layer].dsg[name])], axis=1)
            every.append(predict(bits, gate, lengths))
        evaded = [p.evaded for p in every if p.evaded is not None]
        opens = {str(n): float(np.mean([p.opens[n] for p in every])) for n in lengths}
        median = float(np.median(evaded)) if evaded else None
        found.append({"layer": layer, "opened": opens, "median padding to evade": median})
    return found


def _fires(runs: Runs, layer: int, ids: Sequence[int]) -> gates.Bits:
    fires: gates.Bits = (runs.activations(layer, [ids])[0] != 0).numpy()
    return fires


def _share(answered: Sequence[Answered]) -> float:
    return sum(a.right for a in answered) / len(answered)


def _recovered(plain: Sequence[Answered], gated: Sequence[Answered]) -> float | None:
    """Of the questions answered without an edit, the share that is answered behind the gate too."""
    kept = [g.right for p, g in zip(plain, gated, strict=True) if p.right]
    return sum(kept) / len(kept) if kept else None
