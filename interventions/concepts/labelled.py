"""Texts as a dictionary saw them, with labels of their tokens: what detectors are fitted to and judged by.

Position 0 is never among the tokens. A token is a positive, a negative, or neither (:data:`IGNORED`: of extraordinary norm, or a
part of a labelled word whose last token alone stands for it): such tokens are no evidence for a fit, but as tokens of a text
they are there, as they are when rules look at it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IGNORED, NEGATIVE, POSITIVE = -1, 0, 1

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class LabelledText:
    """One text of n tokens: reading i is latent ``features[i]`` at token ``tokens[i]``, with the activation ``values[i]``.

    Attributes:
        tokens, features: int64 ``[m]``; token 0 is position 1.
        values: float32 ``[m]``; latents that are not listed are 0.
        labels: int8 ``[n]``, of each token.
        positive: whether the text as a whole is of the concept.
    """

    tokens: Ints
    features: Ints
    values: Floats
    labels: npt.NDArray[np.int8]
    positive: bool

    def columns(self, wanted: Ints) -> Floats:
        """Activations of the latents ``wanted`` (ascending): float32 ``[n, k]``."""
        found = np.zeros((len(self.labels), len(wanted)), np.float32)
        at = np.minimum(np.searchsorted(wanted, self.features), max(0, len(wanted) - 1))
        known = wanted[at] == self.features if len(wanted) else np.zeros(len(at), np.bool_)
        found[self.tokens[known], at[known]] = self.values[known]
        return found


@dataclass(frozen=True, eq=False)
class Contrast:
    """How each latent of the dictionary differs between the positive and the negative tokens of some texts.

    Attributes:
        difference: mean activation of the positives less that of the negatives, float64 ``[n_features]``.
        deviation: pooled standard deviation within the two, zeros included.
        rate: share of the negatives on which it fires.
        fires: whether it fires on any positive.
    """

    difference: Doubles
    deviation: Doubles
    rate: Doubles
    fires: npt.NDArray[np.bool_]


def contrast(texts: Sequence[LabelledText], n_features: int) -> Contrast:
    """Compare the labelled tokens of ``texts``, every token with the same weight.

    Raises:
        ValueError: no positive token, or no negative one.
    """
    sizes = np.array([sum(int((text.labels == kind).sum()) for text in texts) for kind in (NEGATIVE, POSITIVE)])
    if not sizes.all():
        raise ValueError(f"{sizes[1]} tokens are labelled and {sizes[0]} are not; a detector tells the two apart")
    total, squares, fires = (np.zeros((2, n_features)) for _ in range(3))
    for text in texts:
        label = text.labels[text.tokens]
        for kind in (NEGATIVE, POSITIVE):
            here = label == kind
            features, values = text.features[here], text.values[here].astype(np.float64)
            np.add.at(total[kind], features, values)
            np.add.at(squares[kind], features, values * values)
            np.add.at(fires[kind], features, values != 0)
    mean = total / sizes[:, None]
    within = (squares - sizes[:, None] * mean**2).sum(axis=0) / max(1, int(sizes.sum()) - 2)
    return Contrast(mean[1] - mean[0], np.sqrt(np.maximum(within, 0)), fires[0] / sizes[0], fires[1] > 0)


def folds(positive: Sequence[bool], most: int = 5) -> list[Ints]:
    """Texts dealt into folds, the classes evenly: which texts each fold holds out; empty where a class has one text only.

    Texts are dealt out in their order, so that equal texts give equal folds.
    """
    kinds = np.array(positive, np.bool_)
    n = min(most, int(kinds.sum()), int((~kinds).sum()))
    if n < 2:
        return []
    place = np.empty(len(kinds), np.int64)
    place[kinds] = np.arange(int(kinds.sum())) % n
    place[~kinds] = n - 1 - np.arange(int((~kinds).sum())) % n
    return [np.flatnonzero(place == fold) for fold in range(n)]
