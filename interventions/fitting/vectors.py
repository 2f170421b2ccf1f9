"""Contrastive steering vectors: one direction per layer from texts that have a property and texts that lack it.

With p_i, n_i the pooled activations ``[d_model]`` of positive and negative text i, μ₊, μ₋ their means over the
*training* texts and Δ = μ₊ − μ₋:

``mean``
    û = Δ / ‖Δ‖, the difference of means (contrastive activation addition, Rimsky et al. 2023, arXiv 2312.06681).
``pca``
    û = the first principal component of the pairs after each is centred at its own midpoint, (p_i + n_i) / 2 (Zou et al.
    2023, arXiv 2310.01405). Centred so, a pair is ±(p_i − n_i)/2, the whole set has mean zero, and û is the first right
    singular vector of the differences p_i − n_i, *not* centred at their mean: that would remove what all pairs share.
    Signed so that û·Δ ≥ 0. Explained variance = σ₁² / Σσ².

The vector is v = (û·Δ) û: adding it once moves a text from the negatives' mean to the positives' mean along û. Strength 1
is thus the distance between the classes, in units of the residual stream; ``mean`` gives v = Δ itself.

What is fitted sees training texts only. Layers are compared by cross-validation inside the training texts; the held-out
texts are looked at once, for the figures of the report.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from interventions.fitting.separation import AUROC, auroc

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]
Method = Literal["mean", "pca"]

METHODS: tuple[str, ...] = get_args(Method)
HELD_OUT = 0.25
"""Share of the pairs that is held out."""
FEWEST = 8
"""Least pairs (or texts per class): below, nothing that is held out says anything."""
FOLDS = 5


class FitError(ValueError):
    """Examples that no vector can be fitted to; the message says what is missing."""


@dataclass(frozen=True)
class Part:
    """Indices of the texts on one side of a split: into the positives and into the negatives."""

    positive: Indices
    negative: Indices


@dataclass(frozen=True)
class Split:
    """Which texts are fitted on and which are held out."""

    train: Part
    held_out: Part


def split(positive_groups: Sequence[int], negative_groups: Sequence[int], seed: int = 0) -> Split:
    """Hold out a quarter of the texts, whole groups only; the same for the same input on every machine.

    Args:
        positive_groups, negative_groups: the group of each text (:meth:`interventions.fitting.pairs.Examples.groups`).

    Raises:
        FitError: fewer than ``FEWEST`` texts of a class, or groups so large that a side would have less than two of one.
    """
    for name, groups in (("positive", positive_groups), ("negative", negative_groups)):
        if len(groups) < FEWEST:
            raise FitError(f"{len(groups)} {name} texts; at least {FEWEST} are needed to fit and to hold out a quarter")
    held_out, train = _parts(positive_groups, negative_groups, HELD_OUT, seed)
    if min(len(train.positive), len(train.negative), len(held_out.positive), len(held_out.negative)) < 2:
        raise FitError("too many of the texts are the same: a quarter cannot be held out without repeating them")
    return Split(train, held_out)


def _parts(positive: Sequence[int], negative: Sequence[int], share: float, seed: int) -> tuple[Part, Part]:
    """``(drawn, rest)``: groups drawn in random order for each class until ``share`` of its texts is drawn.

    A group with texts of both classes (a pair) counts for both.
    """
    sizes = (Counter(positive), Counter(negative))
    wanted = [round(share * len(positive)), round(share * len(negative))]
    order = np.random.default_rng(seed).permutation(sorted({*positive, *negative}))
    drawn: set[int] = set()
    for group in order.tolist():
        members = [size[group] for size in sizes]
        if any(count and missing > 0 for count, missing in zip(members, wanted, strict=True)):
            drawn.add(group)
            wanted = [missing - count for count, missing in zip(members, wanted, strict=True)]
    chosen = [np.array([g in drawn for g in groups], bool) for groups in (positive, negative)]
    return (
        Part(np.flatnonzero(chosen[0]), np.flatnonzero(chosen[1])),
        Part(np.flatnonzero(~chosen[0]), np.flatnonzero(~chosen[1])),
    )


def mean_difference(positive: npt.ArrayLike, negative: npt.ArrayLike) -> Array:
    """Δ = mean of ``positive [n, d]`` − mean of ``negative [m, d]``, float64 ``[d]``."""
    delta: Array = np.asarray(positive, np.float64).mean(axis=0) - np.asarray(negative, np.float64).mean(axis=0)
    return delta


def principal_direction(positive: npt.ArrayLike, negative: npt.ArrayLike) -> tuple[Array, float]:
    """``(û, explained variance)`` of pairs ``positive [n, d]``, ``negative [n, d]``; ‖û‖ = 1 and û·Δ ≥ 0."""
    differences = np.asarray(positive, np.float64) - np.asarray(negative, np.float64)
    _, singular, right = np.linalg.svd(differences, full_matrices=False)
    total = float((singular**2).sum())
    sign = -1.0 if float(right[0] @ differences.mean(axis=0)) < 0 else 1.0
    return sign * right[0], float(singular[0] ** 2) / total if total > 0 else 0.0


def fit_vector(method: Method, positive: npt.ArrayLike, negative: npt.ArrayLike) -> Array:
    """v = (û·Δ) û, float64 ``[d]``; for ``pca`` row i of both belongs to one pair.

    Raises:
        FitError: the two classes have the same mean along û.
    """
    delta = mean_difference(positive, negative)
    vector = delta
    if method == "pca":
        unit, _ = principal_direction(positive, negative)
        vector = float(unit @ delta) * unit
    if not np.linalg.norm(vector) > 0:
        raise FitError(f"the classes have the same mean along the direction of method {method}: there is no vector")
    return vector


@dataclass(frozen=True)
class LayerFit:
    """The vector of one layer, and how well it separates.

    Attributes:
        layer: decoder layer (0-based) whose ``resid_post`` was read.
        vector: v, float64 ``[d_model]``, from the training texts.
        median_norm: median ‖h‖ of the layer over the training texts' tokens, without position 0.
        cross_validated: mean AUROC over the folds of the training texts, each fold against a vector from the others.
        separation: (mean₊ − mean₋) / pooled standard deviation of the projections, over the same folds.
        held_out: AUROC of the held-out texts' projections, with its interval.
        accuracy: share of held-out texts on the right side of the midpoint of the training means.
        negative_mean, positive_mean: means of the held-out projections h·û.
        cosine_methods: cosine of the ``mean`` and the ``pca`` direction; ``None`` for unpaired texts.
        cosine_halves: cosine of the directions from two halves of the training texts.
        explained_variance: of the first principal component; ``None`` for unpaired texts.
    """

    layer: int
    vector: Array
    median_norm: float
    cross_validated: float
    separation: float
    held_out: AUROC
    accuracy: float
    negative_mean: float
    positive_mean: float
    cosine_methods: float | None
    cosine_halves: float
    explained_variance: float | None

    @property
    def dose(self) -> float:
        """Dose of strength 1: ‖v‖ / median ‖h‖."""
        return float(np.linalg.norm(self.vector)) / self.median_norm

    def figures(self) -> dict[str, Any]:
        """All but the vector, as JSON."""
        return {
            "layer": self.layer,
            "norm": float(np.linalg.norm(self.vector)),
            "median_norm": self.median_norm,
            "dose_of_strength_1": self.dose,
            "cross_validated_auroc": self.cross_validated,
            "separation": self.separation,
            "held_out_auroc": {"value": self.held_out.value, "low": self.held_out.low, "high": self.held_out.high},
            "held_out_accuracy": self.accuracy,
            "held_out_means": {"negative": self.negative_mean, "positive": self.positive_mean},
            "cosine_mean_pca": self.cosine_methods,
            "cosine_halves": self.cosine_halves,
            "explained_variance": self.explained_variance,
        }


def fit_layer(
    layer: int,
    positive: npt.ArrayLike,
    negative: npt.ArrayLike,
    parts: Split,
    groups: tuple[Sequence[int], Sequence[int]],
    *,
    method: Method = "mean",
    paired: bool = True,
    median_norm: float = 1.0,
    seed: int = 0,
) -> LayerFit:
    """Fit one layer on the training texts and judge it on the held-out ones.

    Args:
        positive, negative: pooled activations ``[n, d_model]``, ``[m, d_model]`` of all texts.
        parts: from :func:`split`.
        groups: of the texts, as given to :func:`split`; folds and halves keep them together too.
        paired: row i of both is one pair.

    Raises:
        FitError: method ``pca`` on unpaired texts, or classes that do not differ.
    """
    if method == "pca" and not paired:
        raise FitError("method pca works on the differences of pairs, and two separate lists have none; use mean")
    p, n = np.asarray(positive, np.float64), np.asarray(negative, np.float64)
    train, held_out = parts.train, parts.held_out
    p_train, n_train = p[train.positive], n[train.negative]
    vector = fit_vector(method, p_train, n_train)
    unit = vector / np.linalg.norm(vector)

    middle = float(unit @ (p_train.mean(axis=0) + n_train.mean(axis=0))) / 2
    p_out, n_out = p[held_out.positive] @ unit, n[held_out.negative] @ unit
    right = int((p_out > middle).sum()) + int((n_out < middle).sum())

    inside = ([groups[0][i] for i in train.positive], [groups[1][i] for i in train.negative])
    curve, separation = _cross_validate(p_train, n_train, inside, lambda a, b: fit_vector(method, a, b), seed)
    one, other = _parts(*inside, 0.5, seed + 1)
    halves = [fit_vector(method, p_train[half.positive], n_train[half.negative]) for half in (one, other)]
    principal = principal_direction(p_train, n_train) if paired else None
    return LayerFit(
        layer=layer,
        vector=vector,
        median_norm=median_norm,
        cross_validated=curve,
        separation=separation,
        held_out=auroc(p_out, n_out),
        accuracy=right / (len(p_out) + len(n_out)),
        negative_mean=float(n_out.mean()),
        positive_mean=float(p_out.mean()),
        cosine_methods=cosine(mean_difference(p_train, n_train), principal[0]) if principal else None,
        cosine_halves=cosine(*halves),
        explained_variance=principal[1] if principal else None,
    )


def _cross_validate(
    positive: Array,
    negative: Array,
    groups: tuple[Sequence[int], Sequence[int]],
    fit: Callable[[Array, Array], Array],
    seed: int,
) -> tuple[float, float]:
    """Mean AUROC of the folds, and the separation of all projections, each in units of its own fold's vector."""
    names = sorted({*groups[0], *groups[1]})
    order = np.random.default_rng(seed + 2).permutation(names).tolist()
    fold_of = {group: i % min(FOLDS, len(names)) for i, group in enumerate(order)}
    folds = [np.array([fold_of[g] for g in side], np.int64) for side in groups]
    curves: list[float] = []
    projected: list[tuple[Array, Array]] = []
    for fold in range(max(fold_of.values()) + 1):
        (p_in, p_out), (n_in, n_out) = (
            (rows[where != fold], rows[where == fold]) for rows, where in zip((positive, negative), folds, strict=True)
        )
        if not all(map(len, (p_in, p_out, n_in, n_out))):
            continue
        vector = fit(p_in, n_in)
        middle = (p_in.mean(axis=0) + n_in.mean(axis=0)) / 2
        along = vector / float(vector @ vector)
        sides = ((p_out - middle) @ along, (n_out - middle) @ along)
        curves.append(auroc(*sides).value)
        projected.append(sides)
    if not curves:
        raise FitError("the training texts repeat each other so much that they cannot be cross-validated")
    p, n = (np.concatenate([sides[i] for sides in projected]) for i in (0, 1))
    spread = float(np.sqrt((p.var() + n.var()) / 2))
    return float(np.mean(curves)), float(p.mean() - n.mean()) / max(spread, 1e-12)


def best(fits: Sequence[LayerFit]) -> LayerFit:
    """The layer with the largest cross-validated AUROC, then the largest separation; held-out figures play no part."""
    return max(fits, key=lambda fit: (round(fit.cross_validated, 3), fit.separation))


def cosine(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """a·b / (‖a‖ ‖b‖); 0 where one of them is zero."""
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    norms = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y) / norms if norms > 0 else 0.0
