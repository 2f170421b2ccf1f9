"""The honest baseline of a detector: linear probes on the whole residual stream, of tokens and of texts.

A dictionary's latents are a choice of what to look at; a probe may look at everything. Both levels are
:func:`interventions.concepts.report.fit_probe`, a regularised least-squares classifier with evenly weighted classes: of tokens on
their residual stream h, of texts on its mean over the tokens that count. The penalty is the one that does best on held-out folds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from interventions.concepts.agreement import Outcomes
from interventions.concepts.labelled import NEGATIVE, POSITIVE, Floats, Ints
from interventions.concepts.report import Probe, fit_probe

RIDGES = (0.1, 1.0, 10.0)
_CLASSES = ("other", "concept")
Level = Literal["token", "text"]


@dataclass(frozen=True, eq=False)
class DenseText:
    """One text as its residual stream.

    Attributes:
        mean: float32 ``[d]``, over the tokens that count.
        rows: float32 ``[r, d]``, of some of its tokens.
        labels: int8 ``[r]``, of those.
        positive: whether the text is of the concept.
    """

    mean: Floats
    rows: Floats
    labels: npt.NDArray[np.int8]
    positive: bool


@dataclass(frozen=True)
class DenseTrial:
    """The probe on folds that it was not fitted to, with the penalty that did best."""

    ridge: float
    outcomes: Outcomes


def dense_trial(texts: Sequence[DenseText], held_out: Sequence[Ints], level: Level) -> DenseTrial | None:
    """Judge probes fitted without each fold by it; ``None`` without folds, or where a level has one class only."""
    if not held_out or not _two_classes(texts, level):
        return None
    trials = []
    for ridge in RIDGES:
        decided: list[npt.NDArray[np.bool_]] = [np.zeros(_size(text, level), np.bool_) for text in texts]
        for fold in held_out:
            train = [texts[i] for i in sorted(set(range(len(texts))) - set(fold.tolist()))]
            if not _two_classes(train, level):
                continue
            probe = dense_probe(train, level, ridge)
            for i in fold.tolist():
                decided[i] = _predict(probe, texts[i], level)
        trials.append(DenseTrial(ridge, _outcomes(decided, texts, level)))
    return max(trials, key=lambda trial: trial.outcomes.balanced_accuracy)


def dense_probe(texts: Sequence[DenseText], level: Level, ridge: float = 1.0) -> Probe:
    """Fit one.

    Raises:
        ValueError: one class only, or values that are not finite.
    """
    if level == "text":
        x, labels = np.stack([text.mean for text in texts]), np.array([text.positive for text in texts])
    else:
        kept = [(text.labels == POSITIVE) | (text.labels == NEGATIVE) for text in texts]
        x = np.concatenate([text.rows[here] for text, here in zip(texts, kept, strict=True)])
        labels = np.concatenate([text.labels[here] for text, here in zip(texts, kept, strict=True)])
    return fit_probe(torch.from_numpy(x), torch.from_numpy(labels.astype(np.int64)), _CLASSES, ridge)


def dense_judge(probe: Probe, texts: Sequence[DenseText], level: Level) -> Outcomes:
    """What a probe decides."""
    return _outcomes([_predict(probe, text, level) for text in texts], texts, level)


def _predict(probe: Probe, text: DenseText, level: Level) -> npt.NDArray[np.bool_]:
    rows = text.mean[None] if level == "text" else text.rows
    found: npt.NDArray[np.bool_] = probe.predict(torch.from_numpy(rows)).numpy() == 1
    return found


def _outcomes(decided: Sequence[npt.NDArray[np.bool_]], texts: Sequence[DenseText], level: Level) -> Outcomes:
    if level == "text":
        return Outcomes.of_texts([bool(one[0]) for one in decided], [text.positive for text in texts])
    return Outcomes.of_tokens(decided, [text.labels for text in texts])


def _size(text: DenseText, level: Level) -> int:
    return 1 if level == "text" else len(text.rows)


def _two_classes(texts: Sequence[DenseText], level: Level) -> bool:
    if level == "text":
        return len({text.positive for text in texts}) == 2
    labels = np.concatenate([text.labels for text in texts]) if texts else np.zeros(0)
    return bool((labels == POSITIVE).any() and (labels == NEGATIVE).any())
