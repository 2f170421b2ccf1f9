"""Why something was concluded: which rule, resting on which evidence at which tokens, and on which other conclusions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from interventions.rules.formula import And, Atom, Formula, Not, Or, Xor, truth

SHOWN = 32
"""Most tokens of one piece of evidence that a proof lists; ``count`` tells how many there are."""

MAX_NESTING = 16
"""Deepest nesting of premises in JSON."""


@dataclass(frozen=True)
class Reason:
    """One part of why a body held.

    Attributes:
        text: the evidence or conclusion as it is written, with ``not`` before it where that is what counted.
        positions: the tokens at which the evidence was found (none for a negation).
        scores: name of each proposition in it → its score at each of ``positions``; NaN where it is not known.
        premise: the proof of a conclusion on which this one rests.
        count: at how many tokens the evidence was found; ``positions`` may list the first of them only.
        concluded: whether ``text`` is a conclusion that held, be its proof known or not.
    """

    text: str
    positions: tuple[int, ...] = ()
    scores: tuple[tuple[str, tuple[float, ...]], ...] = ()
    premise: Proof | None = None
    count: int = 0
    concluded: bool = False


@dataclass(frozen=True)
class Proof:
    """``rule`` concluded ``conclusion`` at ``position`` (of a latching conclusion: the first), for these reasons."""

    conclusion: str
    rule: str
    position: int
    because: tuple[Reason, ...]


def reasons(
    formula: Formula,
    wanted: bool,
    value: Callable[[Atom], tuple[bool, bool]],
    reason: Callable[[Atom, bool], Reason],
) -> list[Reason]:
    """Why ``formula`` is true (``wanted``) or false.

    Of an ``and`` that is true every part is a reason, of an ``or`` the first part that is true; the other way round where
    they are false.

    Args:
        formula: a formula that is decided, as wanted.
        wanted: true, or false.
        value: ``(true, false)`` of each atom.
        reason: what to say of an atom that is true, or false.
    """
    if isinstance(formula, Not):
        return reasons(formula.part, not wanted, value, reason)
    if isinstance(formula, Xor):
        sides = [(part, bool(truth(part, value)[0])) for part in formula.parts]
        return [found for part, side in sides for found in reasons(part, side, value, reason)]
    if not isinstance(formula, (And, Or)):
        return [reason(formula, wanted)]
    if isinstance(formula, And) == wanted:
        return [found for part in formula.parts for found in reasons(part, wanted, value, reason)]
    first = next(part for part in formula.parts if truth(part, value)[not wanted])
    return reasons(first, wanted, value, reason)


def proof_json(proof: Proof) -> dict[str, Any]:
    """A proof as JSON: ``{"rule", "conclusion", "position", "because": […]}``.

    A member of ``because`` is ``{"evidence", "count", "positions", "scores"}`` (the last three are left out where nothing was
    counted: under a negation, and for ``prompt_ended``), or a premise: a proof like this one. A premise that has been shown
    before, or lies deeper than :data:`MAX_NESTING`, comes without ``because``; one that another rule set concluded may
    be ``{"conclusion"}`` alone. Scores that are not known are null.
    """
    return _json(proof, set(), 1)


def _json(proof: Proof, shown: set[int], depth: int) -> dict[str, Any]:
    found: dict[str, Any] = {"rule": proof.rule, "conclusion": proof.conclusion, "position": proof.position}
    if id(proof) in shown or depth > MAX_NESTING:
        return found
    shown.add(id(proof))
    found["because"] = [_reason_json(reason, shown, depth) for reason in proof.because]
    return found


def _reason_json(reason: Reason, shown: set[int], depth: int) -> dict[str, Any]:
    if reason.premise is not None:
        return _json(reason.premise, shown, depth + 1)
    if reason.concluded:
        return {"conclusion": reason.text}
    if not reason.count:
        return {"evidence": reason.text}
    scores = {
        name: [float(value) if math.isfinite(value) else None for value in values[:SHOWN]]
        for name, values in reason.scores
    }
    positions = list(reason.positions[:SHOWN])
    return {"evidence": reason.text, "count": reason.count, "positions": positions, "scores": scores}
