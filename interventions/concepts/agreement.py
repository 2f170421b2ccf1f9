"""How well yes-or-no decisions agree with labels: balanced accuracy, and how far it can be trusted.

Balanced accuracy is ½(TP/P + TN/N). Texts are the units that were drawn, so tokens of one text are never taken apart:

- of texts: Wilson's interval of each of the two rates, joined by MOVER (Zou and Donner 2008) for their mean. It is honest for few
  texts, and for none wrong among them, where a bootstrap would say that nothing is uncertain;
- of tokens, and of differences between two detectors: percentiles of a bootstrap over texts, positive and negative ones apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

DRAWS = 2000
"""Bootstrap samples."""
CONFIDENCE = 0.95
_Z = 1.959963984540054

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Agreement:
    """Balanced accuracy with its 95 % interval, and the two rates that it is the mean of.

    Attributes:
        balanced_accuracy, low, high: the estimate and its interval.
        recall: TP/P.
        specificity: TN/N.
        positives, negatives: P and N, tokens or texts.
    """

    balanced_accuracy: float
    low: float
    high: float
    recall: float
    specificity: float
    positives: int
    negatives: int


@dataclass(frozen=True, eq=False)
class Outcomes:
    """What was decided, text by text.

    Attributes:
        right: int64 ``[texts, 2]``: positives found, negatives left alone.
        all: int64 ``[texts, 2]``: positives and negatives that there were.
    """

    right: Ints
    all: Ints

    @classmethod
    def of_tokens(cls, decided: Sequence[npt.NDArray[np.bool_]], labels: Sequence[npt.NDArray[np.int8]]) -> Outcomes:
        """Of the tokens of each text; those labelled neither 1 nor 0 do not count."""
        pairs = list(zip(decided, labels, strict=True))
        right = [[int((yes & (kind == 1)).sum()), int((~yes & (kind == 0)).sum())] for yes, kind in pairs]
        whole = [[int((kind == 1).sum()), int((kind == 0).sum())] for _, kind in pairs]
        return cls(np.array(right, np.int64).reshape(-1, 2), np.array(whole, np.int64).reshape(-1, 2))

    @classmethod
    def of_texts(cls, decided: Sequence[bool], positive: Sequence[bool]) -> Outcomes:
        """Of whole texts."""
        kinds = np.array(positive, np.bool_)
        right = np.array(decided, np.bool_) == kinds
        whole = np.stack([kinds, ~kinds], axis=1)
        return cls((whole & right[:, None]).astype(np.int64), whole.astype(np.int64))

    def select(self, texts: Ints) -> Outcomes:
        """The same of some texts."""
        return Outcomes(self.right[texts], self.all[texts])

    @property
    def balanced_accuracy(self) -> float:
        """Over all texts together.

        Raises:
            ValueError: there are no positives, or no negatives.
        """
        whole = self.all.sum(axis=0)
        if not whole.all():
            raise ValueError(f"balanced accuracy is of two classes; got {whole[0]} positives and {whole[1]} negatives")
        return float((self.right.sum(axis=0) / whole).mean())


def agreement(outcomes: Outcomes, *, of_texts: bool, seed: int = 0) -> Agreement:
    """The balanced accuracy of ``outcomes`` with its interval.

    Raises:
        ValueError: there are no positives, or no negatives.
    """
    estimate = outcomes.balanced_accuracy
    right, whole = outcomes.right.sum(axis=0), outcomes.all.sum(axis=0)
    rates = right / whole
    if of_texts:
        ends = np.array([wilson(int(r), int(n)) for r, n in zip(right, whole, strict=True)])
        below, above = np.sqrt(((rates[:, None] - ends) ** 2).sum(axis=0)) / 2
        low, high = max(0.0, estimate - float(below)), min(1.0, estimate + float(above))
    else:
        low, high = _ends(_resampled([outcomes], seed)[0])
    recall, specificity = rates.tolist()
    return Agreement(estimate, low, high, recall, specificity, int(whole[0]), int(whole[1]))


def difference(one: Outcomes, other: Outcomes, seed: int = 0) -> tuple[float, float, float]:
    """Balanced accuracy of ``one`` less that of ``other`` on the same texts, and the ends of its interval (paired bootstrap).

    Raises:
        ValueError: other numbers of texts, or a class is missing.
    """
    if len(one.all) != len(other.all):
        raise ValueError(f"expected outcomes of the same texts, got {len(one.all)} and {len(other.all)}")
    first, second = _resampled([one, other], seed)
    return one.balanced_accuracy - other.balanced_accuracy, *_ends(first - second)


def wilson(right: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    if n < 1 or not 0 <= right <= n:
        raise ValueError(f"expected a count of at most {n}, got {right}")
    share, spread = right / n, _Z * _Z / n
    half = _Z * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    centre = share + spread / 2
    return max(0.0, (centre - half) / (1 + spread)), min(1.0, (centre + half) / (1 + spread))


def _resampled(outcomes: Sequence[Outcomes], seed: int) -> list[npt.NDArray[np.float64]]:
    """Balanced accuracies of bootstrap samples, the same texts for all ``outcomes``: float64 ``[draws]`` each."""
    rng = np.random.default_rng(seed)
    positive = outcomes[0].all[:, 0] > 0
    weights = np.zeros((DRAWS, len(positive)))
    for group in (np.flatnonzero(positive), np.flatnonzero(~positive)):
        if len(group):
            weights[:, group] = rng.multinomial(len(group), np.full(len(group), 1 / len(group)), DRAWS)
    # Every sample has both classes: negatives are in their own group, or in every text that has positives too.
    found = []
    for one in outcomes:
        whole = np.maximum(weights @ one.all, 1)
        found.append((weights @ one.right / whole).mean(axis=1))
    return found


def _ends(samples: npt.NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(samples, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
