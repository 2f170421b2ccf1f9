"""Numbers of a rule set: exact where they count, float32 where they meet activations."""

from __future__ import annotations

import math
from decimal import Decimal, InvalidOperation

from interventions.float32 import float32
from interventions.rules.errors import Place, RuleError
from interventions.rules.formula import PPM
from interventions.rules.proposition import MAX_FEATURES, Comparison, Leaf, Proposition, Split, Sum, Tree

MAX_COUNT = 2**20
"""Largest count and duration, in tokens."""
MAX_WINDOW = 4096
"""Largest window, in tokens."""
MAX_FEATURE = 2**31 - 1


def real(words: str, place: Place) -> float:
    """A number rounded to float32; refused when it is not finite there."""
    value = float32(float(words))
    if not math.isfinite(value):
        raise RuleError(f"{words} is outside the range of float32", place)
    return value + 0.0


def whole(words: str, place: Place, what: str, least: int = 1, most: int = MAX_COUNT) -> int:
    """A whole number from ``least`` to ``most``."""
    if not (words.isascii() and words.isdigit()) or len(words) > 12 or not least <= int(words) <= most:
        raise RuleError(f"{what} is a whole number from {least} to {most}, got {words}", place)
    return int(words)


def share(words: str, place: Place) -> int:
    """A percentage (more than 0, at most 100, four decimals) as ppm."""
    try:
        ppm = Decimal(words) * (PPM // 100)
        exact = ppm == ppm.to_integral_value()
    except InvalidOperation:
        exact = False
    if not exact or not 0 < ppm <= PPM:
        raise RuleError(f"a share is more than 0 and at most 100 %, with at most four decimals; got {words} %", place)
    return int(ppm)


def weighted(sae: str, terms: list[tuple[int, float]], place: Place) -> Sum:
    """The canonical sum: one weight per feature, ascending, none 0."""
    merged: dict[int, float] = {}
    for feature, weight in terms:
        merged[feature] = float32(merged.get(feature, 0.0) + weight)
    kept = tuple(sorted((feature, weight) for feature, weight in merged.items() if weight))
    if not kept:
        raise RuleError("all weights of the sum are 0", place)
    if len(kept) > MAX_FEATURES:
        raise RuleError(f"a proposition has at most {MAX_FEATURES} features, got {len(kept)}", place, "limit_exceeded")
    return Sum(kept)


def pruned(node: Leaf | Split) -> Leaf | Split:
    """The same tree without splits whose two sides are equal."""
    if isinstance(node, Leaf):
        return node
    then, other = pruned(node.then), pruned(node.other)
    return then if then == other else Split(node.feature, node.comparison, node.threshold, then, other)


def tree(node: Leaf | Split, place: Place) -> Tree:
    """The canonical tree.

    Raises:
        RuleError: every branch ends in one score.
    """
    root = pruned(node)
    if isinstance(root, Leaf):
        raise RuleError("every branch of the tree ends in the same score", place)
    return Tree(root)


def proposition(sae: str, score: Sum | Tree, operator: str, threshold: float) -> tuple[Proposition, bool]:
    """``(proposition, negated)`` of a comparison: ``score < x`` is written as not ``score >= x``."""
    comparison: Comparison = ">=" if operator in (">=", "<") else ">"
    return Proposition(sae, score, comparison, threshold), operator in ("<", "<=")
