"""Detectors of words and phrases, fitted to labelled passages in four ways."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from interventions.concepts.detection import Recipe, fit_detector
from interventions.concepts.detector import Detector, detector_from_dict
from interventions.concepts.labelled import NEGATIVE, POSITIVE, LabelledText, contrast
from interventions.concepts.salient import MAX_RATE
from interventions.concepts.threshold import best_cut
from interventions.rules.proposition import Proposition, Sum
from reproduce.rules.settings import DETECTORS, How
from reproduce.rules.texts import Prompt, Read

WEIGHTED_TOP = 64
RIDGE = 0.01
"""Penalty of a weight, in units of its latent's variance and of the number of tokens."""

Detectors = Mapping[How, Mapping[str, Detector]]
"""How they were fitted → concept → detector."""

RECIPES = {
    "single": Recipe("single", "token"),
    "multi": Recipe("multi", "token", weights="log_decay"),
    "relation": Recipe("relation", "token"),
}


def fit_words(
    prompts: Sequence[Prompt],
    reads: Sequence[Read],
    concepts: Sequence[str],
    n_features: int,
    say: Callable[[str], None] = lambda _: None,
) -> dict[How, dict[str, Detector]]:
    """A detector of each concept in each way; a token is positive where the concept is labelled, else negative.

    Every passage is an example for every concept: what names one category is what another one must not answer to.
    """
    found: dict[How, dict[str, Detector]] = {how: {} for how in DETECTORS}
    for concept in concepts:
        say(concept)
        texts = [
            read.labelled(prompt.at.get(concept, ()), concept in prompt.at)
            for prompt, read in zip(prompts, reads, strict=True)
        ]
        for how in DETECTORS:
            if how == "weighted":
                found[how][concept] = fit_weighted(texts, n_features)
            else:
                found[how][concept] = fit_detector([_joined(texts)], n_features, RECIPES[how]).detector
    return found


def _joined(texts: Sequence[LabelledText]) -> LabelledText:
    """All texts as one: tokens are the examples here, and no folds of texts are held out."""
    starts = np.cumsum([0, *(len(text.labels) for text in texts)])
    return LabelledText(
        np.concatenate([text.tokens + start for text, start in zip(texts, starts, strict=False)]),
        np.concatenate([text.features for text in texts]),
        np.concatenate([text.values for text in texts]),
        np.concatenate([text.labels for text in texts]),
        True,
    )


def fit_weighted(texts: Sequence[LabelledText], n_features: int, top: int = WEIGHTED_TOP) -> Detector:
    """Σ w·a over the latents with the largest |difference of means|, w by regularised least squares, both classes even.

    Unlike differences of means, fitted weights may be negative: what speaks for another concept speaks against this one.
    """
    differs = contrast(texts, n_features)
    usable = np.flatnonzero((differs.rate <= MAX_RATE) & (differs.difference != 0))
    order = usable[np.argsort(-np.abs(differs.difference[usable]), kind="stable")]
    chosen = np.sort(order[:top])
    labels = np.concatenate([text.labels for text in texts])
    kept = (labels == POSITIVE) | (labels == NEGATIVE)
    x = np.concatenate([text.columns(chosen) for text in texts])[kept].astype(np.float64)
    wanted = labels[kept] == POSITIVE
    omega = np.where(wanted, 0.5 / wanted.sum(), 0.5 / (~wanted).sum())
    y = np.where(wanted, 1.0, -1.0)
    centred = x - omega @ x
    gram = (centred * omega[:, None]).T @ centred
    penalty = RIDGE * (np.diag(gram) + 1e-3 * np.trace(gram) / len(gram))
    weight = np.linalg.solve(gram + np.diag(penalty), (centred * omega[:, None]).T @ (y - omega @ y))
    rounded = [float(np.float32(f"{one:.4g}")) for one in weight / np.abs(weight).max()]
    score = Sum(tuple((int(f), w) for f, w in zip(chosen, rounded, strict=True) if w))
    draft = Detector("multi", score, 0.0)
    activation = dict(zip(chosen.tolist(), x.T.astype(np.float32), strict=True))
    return Detector("multi", score, best_cut(draft.scores(activation), wanted).threshold)


def as_json(found: Detectors) -> dict[str, dict[str, Any]]:
    """Plain JSON, from which :func:`from_json` restores them."""
    return {how: {name: one.as_dict() for name, one in kind.items()} for how, kind in found.items()}


def from_json(raw: Mapping[How, Mapping[str, Any]]) -> Detectors:
    """What :func:`as_json` wrote."""
    return {how: {name: detector_from_dict(one) for name, one in kind.items()} for how, kind in raw.items()}


def proposition(detector: Detector, sae_id: str) -> Proposition:
    """Where a token counts, as rules read it."""
    return detector.propositions(sae_id, "it")["it"]


def features(found: Detectors) -> list[int]:
    """Every latent that any of them reads."""
    return sorted({f for kind in found.values() for detector in kind.values() for f in detector.features()})


@dataclass
class Counts:
    """How often a detector was right on the tokens of test prompts.

    Attributes:
        right, positives: labelled tokens that were found, and all of them.
        false, negatives: other tokens that were taken for it, and all of those.
    """

    right: int = 0
    positives: int = 0
    false: int = 0
    negatives: int = 0

    def add(self, holds: np.ndarray, where: Sequence[int]) -> None:
        """Take in one prompt: ``holds`` bool ``[n]``, and where it should."""
        at = np.zeros(len(holds), bool)
        at[list(where)] = True
        evidence = np.arange(len(holds)) > 0
        self.right += int((holds & at & evidence).sum())
        self.positives += int((at & evidence).sum())
        self.false += int((holds & ~at & evidence).sum())
        self.negatives += int((~at & evidence).sum())

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return dict(vars(self))
