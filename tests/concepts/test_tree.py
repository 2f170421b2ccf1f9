from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from interventions.concepts.tree import grow_tree
from interventions.rules.proposition import MAX_TREE_DEPTH, Leaf, Split, Tree

Node = Leaf | Split


def scores(tree: Tree, x: npt.NDArray[np.float32], features: list[int]) -> npt.NDArray[np.float32]:
    return tree({feature: x[:, i] for i, feature in enumerate(features)})


def impurity(positive: npt.NDArray[np.bool_], whole: npt.NDArray[np.bool_]) -> float:
    p, q = positive.sum() / whole.sum(), (~positive).sum() / (~whole).sum()
    return float(2 * p * q / (p + q)) if p + q else 0.0


def brute(x: npt.NDArray[np.float32], positive: npt.NDArray[np.bool_], whole: npt.NDArray[np.bool_]) -> float:
    """The smallest impurity of any split, by trying them all."""
    found = [
        impurity(positive[above], whole) + impurity(positive[~above], whole)
        for column in range(x.shape[1])
        for low, high in itertools.pairwise(np.unique(x[:, column]))
        for above in [x[:, column] >= (low + high) / 2]
    ]
    return min(found, default=np.inf)


def check(
    node: Node, x: npt.NDArray[np.float32], positive: npt.NDArray[np.bool_], whole: npt.NDArray[np.bool_], depth: int
) -> None:
    """Every node has its class shares for a score, or the best split there is."""
    if isinstance(node, Leaf):
        p, q = positive.sum() / whole.sum(), (~positive).sum() / (~whole).sum()
        assert node.value == pytest.approx(p / (p + q))
        assert depth == 0 or not p or not q or brute(x, positive, whole) >= impurity(positive, whole) - 1e-8
        return
    assert depth > 0
    above = x[:, node.feature] >= np.float32(node.threshold)
    assert above.any()
    assert not above.all()
    made = impurity(positive[above], whole) + impurity(positive[~above], whole)
    assert made == pytest.approx(brute(x, positive, whole))
    check(node.then, x[above], positive[above], whole, depth - 1)
    check(node.other, x[~above], positive[~above], whole, depth - 1)


@pytest.mark.parametrize("seed", range(12))
def test_every_split_is_the_best_of_all(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(8, 40))
    # Few distinct values: ties everywhere, as with latents that are 0 on most tokens.
    x = np.where(rng.random((n, 3)) < 0.4, 0, rng.integers(0, 5, (n, 3))).astype(np.float32)
    positive = rng.random(n) < 0.2 + 0.6 * (x[:, 0] > 2) * (x[:, 1] < 3)
    positive[:2] = True, False
    try:
        tree = grow_tree(x, positive, [0, 1, 2], depth=3, min_leaf=1)
    except ValueError:
        assert brute(x, positive, positive) >= 0.5 * 2 - 1e-8 or len(np.unique(x, axis=0)) == 1
        return
    # Pruning joins splits whose sides score the same, which changes no score: compare by walking the tree.
    check(tree.root, x, positive, positive, 3)


def test_what_no_single_latent_tells_a_tree_tells() -> None:
    """Weapon without police: xor-like, so that sums of both do worse."""
    rng = np.random.default_rng(0)
    x = np.where(rng.random((400, 2)) < 0.5, 0, 1 + rng.random((400, 2))).astype(np.float32)
    positive = (x[:, 0] > 0) & (x[:, 1] == 0)
    tree = grow_tree(x, positive, [7, 3])
    assert ((scores(tree, x, [7, 3]) >= 0.5) == positive).all()
    assert tree.features() == (3, 7)


def test_the_limits_of_a_tree_hold() -> None:
    rng = np.random.default_rng(1)
    x, positive = rng.random((500, 4)).astype(np.float32), rng.random(500) < 0.5

    def deepest(node: Node) -> int:
        return 0 if isinstance(node, Leaf) else 1 + max(deepest(node.then), deepest(node.other))

    tree = grow_tree(x, positive, [0, 1, 2, 3], depth=2, min_leaf=50)
    assert deepest(tree.root) <= 2
    values, counts = np.unique(scores(tree, x, [0, 1, 2, 3]), return_counts=True)
    assert counts.min() >= 50, values
    with pytest.raises(ValueError, match="no split"):
        grow_tree(x[:, :1] * 0, positive, [0])
    with pytest.raises(ValueError, match="no split"):
        grow_tree(x, np.ones(500, np.bool_), [0, 1, 2, 3])
    for bad in ({"depth": 0}, {"depth": MAX_TREE_DEPTH + 1}, {"min_leaf": 0}):
        options: dict[str, Any] = bad
        with pytest.raises(ValueError, match="expected"):
            grow_tree(x, positive, [0, 1, 2, 3], **options)
