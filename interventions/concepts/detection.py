"""From labelled texts to a detector: which latents, how weighted, from which score on, and how well that does on unseen texts.

Candidates are the latents with the largest difference of means between positive and negative tokens; those that fire on more than
``max_rate`` of the negatives are dense and left out. Then, by kind:

- single: the candidate whose best threshold has the largest balanced accuracy;
- multi: Σ w·a over the candidates. ``difference``: w = δ/σ with the effect size δ = (μ₁ − μ₀)/σ and the pooled standard deviation
  σ, so that each activation counts in units of σ and by how far it tells the classes apart. ``log_decay``, by rank i = 0 … k − 1:
  w = 1 − ln(i + 1)/ln(k + 1), once (the public code of ActivationReasoning multiplies by it twice);
- relation: a tree over the candidates and half as many latents of the largest difference the other way, so that it can say
  "this, and not that".

Thresholds lie above the score of a token on which none of the latents fires, so that silence is not the concept, unless silence is
all that tells.

Everything that is fitted, the choice of candidates included, is fitted anew without the texts that it is judged by.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from interventions.concepts.agreement import Outcomes
from interventions.concepts.detector import KINDS, Detector, Kind, Peak, Share
from interventions.concepts.labelled import NEGATIVE, POSITIVE, Floats, Ints, LabelledText, contrast, folds
from interventions.concepts.salient import MAX_RATE
from interventions.concepts.threshold import best_cut, best_share
from interventions.concepts.tree import MAX_DEPTH, grow_tree
from interventions.rules.proposition import MAX_FEATURES, Sum, Tree

TOP = 20
"""Candidates, unless told otherwise."""
Weights = Literal["difference", "log_decay"]
Level = Literal["token", "text"]
LEVELS: tuple[Level, ...] = get_args(Level)
Decision = Literal["peak", "share"]
DECISIONS: tuple[Decision, ...] = get_args(Decision)


@dataclass(frozen=True)
class Recipe:
    """How a detector is made.

    Attributes:
        kind: "auto" takes the one that does best on held-out folds; of equals the simplest.
        level: what "best" is about: tokens where words or positions were labelled, texts where texts were.
        top: candidates at most.
        weights: of "multi".
        depth: of a tree at most.
        max_rate: firing rate on negatives above which a latent is dense; ``None`` keeps dense latents.
    """

    kind: Kind | Literal["auto"] = "auto"
    level: Level = "text"
    top: int = TOP
    weights: Weights = "difference"
    depth: int = MAX_DEPTH
    max_rate: float | None = MAX_RATE

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Those to try."""
        return KINDS if self.kind == "auto" else (self.kind,)


@dataclass(frozen=True, eq=False)
class Trial:
    """One kind on folds that it was not fitted to, in the order of the texts.

    Attributes:
        token: decisions on tokens.
        text: decisions on texts, by how they were made; empty where all texts are of one class.
    """

    token: Outcomes
    text: Mapping[Decision, Outcomes]

    @property
    def decision(self) -> Decision | None:
        """The better way to decide on texts; of equals the peak."""
        return max(self.text, key=lambda way: self.text[way].balanced_accuracy, default=None)

    def accuracy(self, level: Level) -> float:
        """Balanced accuracy at a level; 0 where there is none."""
        if level == "token":
            return self.token.balanced_accuracy
        return max((one.balanced_accuracy for one in self.text.values()), default=0.0)


@dataclass(frozen=True, eq=False)
class Detection:
    """A fitted detector and what led to it.

    Attributes:
        detector: fitted to all texts.
        trials: of every kind that was tried, on held-out folds; empty where there were too few texts for folds.
        folds: which texts each fold held out.
    """

    detector: Detector
    trials: Mapping[Kind, Trial]
    folds: Sequence[Ints]


def fit_detector(texts: Sequence[LabelledText], n_features: int, recipe: Recipe) -> Detection:
    """Fit a detector; equal texts give an equal one.

    Raises:
        ValueError: tokens of one class only, no candidate, or scores that do not differ.
    """
    if not 1 <= recipe.top <= MAX_FEATURES:
        raise ValueError(f"top: expected 1 to {MAX_FEATURES}, got {recipe.top}")
    whole = _Material(texts, n_features, recipe)
    held_out = folds([text.positive for text in texts]) or _any_folds(texts)
    trials = _tried(texts, n_features, recipe, held_out) if held_out else {}
    kind: Kind = recipe.kinds[-1] if recipe.kind != "auto" else "multi"
    if trials:
        kind = max(trials, key=lambda one: trials[one].accuracy(recipe.level))
    decision = trials[kind].decision if trials else "peak"
    try:
        detector = whole.detector(kind)
    except ValueError:
        if recipe.kind != "auto" or kind == "single":
            raise
        detector = whole.detector("single")
    return Detection(whole.deciding(detector, decision), trials, held_out)


def judge(detector: Detector, texts: Sequence[LabelledText]) -> tuple[Outcomes, Outcomes | None]:
    """What a detector decides on tokens and, if it was calibrated for them, on texts."""
    scores = [_scores(detector, text) for text in texts]
    token = Outcomes.of_tokens([detector.tokens(one) for one in scores], [text.labels for text in texts])
    if detector.text is None:
        return token, None
    return token, Outcomes.of_texts([detector.holds(one) for one in scores], [text.positive for text in texts])


class _Material:
    """Candidates of some texts, and their activations there."""

    def __init__(self, texts: Sequence[LabelledText], n_features: int, recipe: Recipe) -> None:
        self._recipe = recipe
        found = contrast(texts, n_features)
        speaks = (found.difference > 0) & found.fires
        dense = speaks & (found.rate > recipe.max_rate) if recipe.max_rate is not None else np.zeros_like(speaks)
        candidates = np.flatnonzero(speaks & ~dense)
        if not len(candidates):
            left_out = f"; the {int(dense.sum())} dense ones that are were left out (max_rate {recipe.max_rate})"
            raise ValueError(
                f"no latent is more active on the labelled tokens than on others{left_out if dense.any() else ''}"
            )
        order = np.lexsort((candidates, -found.difference[candidates]))
        self.ranked = candidates[order][: recipe.top]
        against = found.difference < 0
        if recipe.max_rate is not None:
            against &= found.rate <= recipe.max_rate
        opposed = np.flatnonzero(against) if "relation" in recipe.kinds else candidates[:0]
        self.opposed = opposed[np.lexsort((opposed, found.difference[opposed]))][: recipe.top // 2]
        deviation = found.deviation[self.ranked]
        self._effect = found.difference[self.ranked] / np.maximum(deviation, 1e-12) ** 2
        self._sorted = np.sort(np.concatenate([self.ranked, self.opposed]))
        self._columns = [text.columns(self._sorted) for text in texts]
        self._labels = [text.labels for text in texts]
        self._positive = np.array([text.positive for text in texts], np.bool_)
        labels = np.concatenate(self._labels)
        self._labelled = (labels == POSITIVE) | (labels == NEGATIVE)
        self._wanted = labels[self._labelled] == POSITIVE

    def detector(self, kind: Kind) -> Detector:
        """The detector of a kind, without a rule for texts."""
        score = self._single() if kind == "single" else self._tree() if kind == "relation" else self._sum()
        draft = Detector(kind, score, 0.0)
        scores = np.concatenate(self._scores(draft))[self._labelled]
        return replace(draft, threshold=_cut(draft, scores, self._wanted))

    def deciding(self, detector: Detector, decision: Decision | None) -> Detector:
        """The same with its rule for texts; without one where all texts are of one class."""
        if decision is None or self._positive.all() or not self._positive.any():
            return detector
        scores = self._scores(detector)
        try:
            if decision == "peak":
                largest = np.array([one.max(initial=-np.inf) for one in scores], np.float32)
                return replace(detector, text=Peak(_cut(detector, largest, self._positive)))
            shares = np.array([detector.tokens(one).mean() if len(one) else 0.0 for one in scores])
            return replace(detector, text=Share(int(best_share(shares, self._positive).threshold)))
        except ValueError:  # all texts alike
            return detector

    def _scores(self, detector: Detector) -> list[Floats]:
        return [detector.scores(dict(zip(self._sorted.tolist(), one.T, strict=True))) for one in self._columns]

    def _single(self) -> Sum:
        best, chosen = -1.0, int(self.ranked[0])
        for feature in self.ranked.tolist():
            at = int(np.searchsorted(self._sorted, feature))
            columns = [one[:, at] for one in self._columns]
            try:
                if self._recipe.level == "token":
                    found = best_cut(np.concatenate(columns)[self._labelled], self._wanted)
                else:
                    found = best_cut(np.array([one.max(initial=0) for one in columns]), self._positive)
            except ValueError:
                continue
            if found.balanced_accuracy > best:
                best, chosen = found.balanced_accuracy, feature
        return Sum(((chosen, 1.0),))

    def _sum(self) -> Sum:
        k = len(self.ranked)
        if self._recipe.weights == "log_decay":
            weights = 1 - np.log(np.arange(1, k + 1)) / np.log(k + 1)
        else:
            weights = self._effect
        # Four digits say it all, and can be read.
        rounded = [float(np.float32(f"{weight:.4g}")) for weight in weights / weights.max()]
        terms = [(int(f), w) for f, w in sorted(zip(self.ranked.tolist(), rounded, strict=True)) if w]
        return Sum(tuple(terms))

    def _tree(self) -> Tree:
        features = np.concatenate([self.ranked, self.opposed])
        x = np.concatenate(self._columns)[self._labelled][:, np.searchsorted(self._sorted, features)]
        return grow_tree(x, self._wanted, features.tolist(), self._recipe.depth)


def _tried(
    texts: Sequence[LabelledText], n_features: int, recipe: Recipe, held_out: Sequence[Ints]
) -> dict[Kind, Trial]:
    """Each kind, fitted without each fold and judged by it; a fit that fails finds nothing."""
    labels, positive = [text.labels for text in texts], [text.positive for text in texts]
    both = any(positive) and not all(positive)
    tokens = {kind: [np.zeros(len(one), np.bool_) for one in labels] for kind in recipe.kinds}
    decided = {(kind, way): [False] * len(texts) for kind in recipe.kinds for way in DECISIONS}
    for fold in held_out:
        train = [texts[i] for i in sorted(set(range(len(texts))) - set(fold.tolist()))]
        for kind, plain, material in _each(train, n_features, recipe):
            for way in DECISIONS:
                detector = material.deciding(plain, way)
                for i in fold.tolist():
                    scores = _scores(detector, texts[i])
                    tokens[kind][i] = detector.tokens(scores)
                    if detector.text is not None:
                        decided[kind, way][i] = detector.holds(scores)
    return {
        kind: Trial(
            Outcomes.of_tokens(tokens[kind], labels),
            {way: Outcomes.of_texts(decided[kind, way], positive) for way in DECISIONS} if both else {},
        )
        for kind in recipe.kinds
    }


def _each(texts: Sequence[LabelledText], n_features: int, recipe: Recipe) -> Iterator[tuple[Kind, Detector, _Material]]:
    """The kinds that can be fitted to ``texts``."""
    try:
        material = _Material(texts, n_features, recipe)
    except ValueError:
        return
    for kind in recipe.kinds:
        with suppress(ValueError):
            yield kind, material.detector(kind), material


def _any_folds(texts: Sequence[LabelledText]) -> list[Ints]:
    """Folds of texts that are all of one class, where their tokens are of two."""
    if len({text.positive for text in texts}) != 1 or len(texts) < 2:
        return []
    n = min(5, len(texts))
    return [np.arange(fold, len(texts), n) for fold in range(n)]


def _cut(detector: Detector, scores: Floats, positive: npt.NDArray[np.bool_]) -> float:
    """The best threshold above the score of a token on which no latent fires, if there is one above."""
    silent = float(detector.scores({feature: np.zeros(1, np.float32) for feature in detector.features()})[0])
    return best_cut(scores, positive, silent if bool((scores > silent).any()) else -np.inf).threshold


def _scores(detector: Detector, text: LabelledText) -> Floats:
    wanted = np.array(detector.features(), np.int64)
    return detector.scores(dict(zip(wanted.tolist(), text.columns(wanted).T, strict=True)))
