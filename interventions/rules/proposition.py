"""A proposition: a score over features of one SAE, and the threshold from which it counts as true at a token.

The score is a weighted sum of activations, or a decision tree over them. Everything is float32, in one fixed order:
``score = ((w_0·a_0) + w_1·a_1) + …`` with the features ascending and every product and sum rounded, so two evaluators that
follow it agree to the bit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Readings = Mapping[tuple[str, int], npt.NDArray[np.float32]]
"""``(SAE id, feature)`` → activations at positions 0, 1, 2, … (float32 ``[n]``)."""

Comparison = Literal[">=", ">"]

MAX_FEATURES = 256
"""Most features of one proposition."""
MAX_TREE_DEPTH = 8


def shown(value: float) -> str:
    """The shortest decimal that reads back as the same float32."""
    return np.format_float_positional(np.float32(value), trim="-") if value else "0"


@dataclass(frozen=True)
class Sum:
    """``Σ weight·activation``; ``terms`` are ``(feature, weight)``, ascending, without weights of 0."""

    terms: tuple[tuple[int, float], ...]

    def features(self) -> tuple[int, ...]:
        """Features that are read, ascending."""
        return tuple(feature for feature, _ in self.terms)

    def __call__(self, activation: Mapping[int, npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
        total: npt.NDArray[np.float32] | None = None
        for feature, weight in self.terms:
            product = np.float32(weight) * activation[feature]
            total = product if total is None else total + product
        assert total is not None
        return total

    def text(self, sae: str) -> str:
        """As it is written in a rule set."""
        words = ""
        for feature, weight in self.terms:
            factor = "" if abs(weight) == 1 else f"{shown(abs(weight))} * "
            sign = ("-" if weight < 0 else "") if not words else (" - " if weight < 0 else " + ")
            words += f"{sign}{factor}feature({quoted(sae)}, {feature})"
        return words

    def as_json(self) -> dict[str, Any]:
        """``{"features": [{"index", "weight"}, …]}``."""
        return {"features": [{"index": feature, "weight": float(shown(weight))} for feature, weight in self.terms]}


@dataclass(frozen=True)
class Leaf:
    """A score at the end of a branch."""

    value: float


@dataclass(frozen=True)
class Split:
    """``then`` where the activation of ``feature`` is at (or, with ``>``, above) ``threshold``, else ``other``."""

    feature: int
    comparison: Comparison
    threshold: float
    then: Leaf | Split
    other: Leaf | Split


def _splits(node: Leaf | Split) -> Iterator[Split]:
    if isinstance(node, Split):
        yield node
        yield from _splits(node.then)
        yield from _splits(node.other)


@dataclass(frozen=True)
class Tree:
    """A decision tree over activations of one SAE."""

    root: Split

    def features(self) -> tuple[int, ...]:
        """Features that are read, ascending."""
        return tuple(sorted({split.feature for split in _splits(self.root)}))

    def __call__(self, activation: Mapping[int, npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
        def branch(node: Leaf | Split) -> npt.NDArray[np.float32]:
            if isinstance(node, Leaf):
                return np.float32(node.value)  # type: ignore[return-value]
            taken = compare(activation[node.feature], node.comparison, node.threshold)
            return np.where(taken, branch(node.then), branch(node.other))

        return branch(self.root)

    def text(self, sae: str) -> str:
        """As it is written in a rule set."""

        def branch(node: Leaf | Split) -> str:
            if isinstance(node, Leaf):
                return shown(node.value)
            head = f"if {node.feature} {node.comparison} {shown(node.threshold)}"
            return f"{head} then {branch(node.then)} else {branch(node.other)}"

        return f"tree({quoted(sae)}, {branch(self.root)})"

    def as_json(self) -> dict[str, Any]:
        """``{"tree": {"feature", "op", "threshold", "then", "else"}}``; leaves are numbers."""

        def branch(node: Leaf | Split) -> Any:
            if isinstance(node, Leaf):
                return float(shown(node.value))
            return {
                "feature": node.feature,
                "op": node.comparison,
                "threshold": float(shown(node.threshold)),
                "then": branch(node.then),
                "else": branch(node.other),
            }

        return {"tree": branch(self.root)}


def compare(score: npt.NDArray[np.float32], comparison: Comparison, threshold: float) -> npt.NDArray[np.bool_]:
    """``score >= threshold`` or ``score > threshold`` in float32; NaN is never true."""
    limit = np.float32(threshold)
    return score >= limit if comparison == ">=" else score > limit


def quoted(sae: str) -> str:
    """An SAE id as the text form takes it: bare where it can be, else a JSON string."""
    return sae if re.fullmatch(r"[A-Za-z0-9][\w.:@+\-/]*", sae, re.ASCII) else json.dumps(sae, ensure_ascii=False)


@dataclass(frozen=True)
class Proposition:
    """``score >= threshold`` (or ``>``) at one token, for a score over features of one SAE."""

    sae: str
    score: Sum | Tree
    comparison: Comparison
    threshold: float

    def reads(self) -> tuple[tuple[str, int], ...]:
        """``(SAE id, feature)`` of every activation that decides it."""
        return tuple((self.sae, feature) for feature in self.score.features())

    def scores(self, readings: Readings) -> npt.NDArray[np.float32]:
        """The score at every position: float32 ``[n]``."""
        return self.score({feature: readings[self.sae, feature] for feature in self.score.features()})

    def holds(self, readings: Readings) -> npt.NDArray[np.bool_]:
        """Where it is true: bool ``[n]``. Position 0 is not special here; evaluators leave it out."""
        return compare(self.scores(readings), self.comparison, self.threshold)

    @property
    def text(self) -> str:
        """As it is written in a rule set; equal propositions have equal texts."""
        return f"{self.score.text(self.sae)} {self.comparison} {shown(self.threshold)}"

    def as_json(self) -> dict[str, Any]:
        """The JSON form of :attr:`text`."""
        limit = {"op": self.comparison, "threshold": float(shown(self.threshold))}
        return {"sae": self.sae, **self.score.as_json(), **limit}
