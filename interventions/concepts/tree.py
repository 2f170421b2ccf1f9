"""A shallow decision tree over a few latents, grown exactly.

Greedy and binary (CART): at every node all latents and all gaps between neighbouring activations are tried, and the split with
the smallest Gini impurity is taken. Both classes weigh the same in the whole (a token counts 1/n of its class). With P and Q the
weights of the classes at a node::

    impurity = 2·P·Q / (P + Q)          summed over the two sides of a split
    score of a leaf = P / (P + Q)

Of equally pure splits the first latent wins, and of its gaps the lowest. Splits compare ``activation >= threshold`` in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from interventions.concepts.threshold import midpoint
from interventions.rules.numbers import pruned
from interventions.rules.proposition import MAX_TREE_DEPTH, Leaf, Split, Tree

MAX_DEPTH = 5
"""Of a fitted tree."""
MIN_LEAF = 5
"""Tokens of a leaf at least."""

_LEAST_GAIN = 1e-9
"""Impurity that a split must take away, of the 1 that both classes together weigh at most."""


def grow_tree(
    x: npt.NDArray[np.float32],
    positive: npt.NDArray[np.bool_],
    features: Sequence[int],
    depth: int = MAX_DEPTH,
    min_leaf: int = MIN_LEAF,
) -> Tree:
    """The tree of tokens ``x`` ``[n, k]``, activations of the k latents ``features``.

    Raises:
        ValueError: shapes, one class only, a depth outside 1 … ``MAX_TREE_DEPTH``, or no split tells the classes apart.
    """
    if x.shape != (len(positive), len(features)) or not 1 <= depth <= MAX_TREE_DEPTH or min_leaf < 1:
        raise ValueError(f"expected activations [tokens, {len(features)}] and a depth of 1 to {MAX_TREE_DEPTH}")
    weight = np.array([1 / max(1, int((~positive).sum())), 1 / max(1, int(positive.sum()))])
    root = pruned(_grow(x, positive, weight, features, depth, min_leaf))
    if isinstance(root, Leaf):
        raise ValueError("no split of the latents tells the classes apart")
    return Tree(root)


def _grow(
    x: npt.NDArray[np.float32],
    positive: npt.NDArray[np.bool_],
    weight: npt.NDArray[np.float64],
    features: Sequence[int],
    depth: int,
    min_leaf: int,
) -> Leaf | Split:
    n_positive = int(positive.sum())
    p, q = n_positive * weight[1], (len(positive) - n_positive) * weight[0]
    leaf = Leaf(float(np.float32(p / (p + q))))
    if not depth or not p or not q or len(x) < 2 * min_leaf:
        return leaf
    found = _best_split(x, positive, weight, min_leaf)
    if found is None or 2 * p * q / (p + q) - found[0] <= _LEAST_GAIN:
        return leaf
    _, column, threshold = found
    above = x[:, column] >= np.float32(threshold)
    then = _grow(x[above], positive[above], weight, features, depth - 1, min_leaf)
    other = _grow(x[~above], positive[~above], weight, features, depth - 1, min_leaf)
    return Split(int(features[column]), ">=", threshold, then, other)


def _best_split(
    x: npt.NDArray[np.float32], positive: npt.NDArray[np.bool_], weight: npt.NDArray[np.float64], min_leaf: int
) -> tuple[float, int, float] | None:
    """(impurity, column, threshold) of the best split; ``None`` where no column has two values on both sides of one."""
    best: tuple[float, int, float] | None = None
    n, n_positive = len(x), int(positive.sum())
    below = np.arange(1, n)
    for column in range(x.shape[1]):
        order = x[:, column].argsort(kind="stable")
        values = x[order, column]
        places = (values[:-1] < values[1:]) & (below >= min_leaf) & (n - below >= min_leaf)
        at = np.flatnonzero(places)
        if not len(at):
            continue
        missed = positive[order].cumsum()[at]
        rejected = at + 1 - missed
        low = _impurity(missed * weight[1], rejected * weight[0])
        high = _impurity((n_positive - missed) * weight[1], (n - n_positive - rejected) * weight[0])
        total = low + high
        first = int(total.argmin())
        if best is None or total[first] < best[0] - _LEAST_GAIN:
            gap = at[first]
            best = float(total[first]), column, midpoint(float(values[gap]), float(values[gap + 1]))
    return best


def _impurity(p: npt.NDArray[Any], q: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    found: npt.NDArray[np.float64] = 2 * p * q / (p + q)
    return found
