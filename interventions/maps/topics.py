"""Which latents stand for a topic: statistics of a forget and a retain set of tokens, and three published selections.

``farrell``  (Farrell et al., 2410.19278, SAEBench's code): drop latents whose retain score is at least a threshold, rank by
             forget score; the score is the share of tokens on which a latent fires (or its mean activation).
``dsg``      (2504.08192): importance = (mean activation)²; keep latents in the upper part of the forget importance and of
             the ratio forget / (retain + 1e-21), rank by forget importance.
``crisp``    (2508.13650): rank by the difference of firing counts, keep those whose summed activation on the forget set is
             at least three times that on the retain set.

Latents that never fire on the forget set are never selected. Sums are kept as integers (:data:`STEP`), so statistics do
not depend on the order of the tokens or on how they were split over workers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Bits = npt.NDArray[np.bool_]

STEP = 2.0**-24
"""Resolution of summed activations."""
LARGEST = 2.0**22
"""Largest activation that is taken: larger ones belong to tokens that statistics leave out."""
_FULL = 2.0**62
_EPSILON = 1e-21
_CANDIDATES = 10
"""CRISP looks at so many times the number of latents wanted."""


class TopicError(ValueError):
    """Statistics that cannot be made or compared; the message says why."""


@dataclass(frozen=True)
class TopicStatistics:
    """What is kept of the activations of a set of tokens.

    Attributes:
        tokens: how many.
        total: summed activation of each latent in units of :data:`STEP`, int64 ``[S]``.
        fired: tokens on which each latent is active (≠ 0), int64 ``[S]``.
    """

    tokens: int
    total: Integers
    fired: Integers

    @staticmethod
    def empty(n_features: int) -> TopicStatistics:
        """No tokens."""
        return TopicStatistics(0, np.zeros(n_features, np.int64), np.zeros(n_features, np.int64))

    def add(self, activations: Tensor, keep: Tensor | None = None) -> TopicStatistics:
        """With the tokens ``activations [n, S]``, those of ``keep [n]`` (bool) only: position 0 and massive ones are left out.

        Raises:
            TopicError: a wrong width, a value that is not finite or beyond :data:`LARGEST`, or sums that are full.
        """
        if activations.ndim != 2 or activations.shape[1] != len(self.total):
            raise TopicError(f"expected [tokens, {len(self.total)}] activations, got shape {list(activations.shape)}")
        rows = activations if keep is None else activations[keep]
        if not bool((rows.abs() <= LARGEST).all()):
            raise TopicError("an activation is not a number, or so large that its token should be left out")
        if float(rows.abs().sum(dim=0, dtype=torch.float64).max()) / STEP >= _FULL:
            raise TopicError("too many tokens at once: add them in smaller chunks")
        total = (rows.double() / STEP).round().to(torch.int64).sum(dim=0).cpu().numpy()
        fired = (rows != 0).sum(dim=0).cpu().numpy()
        return self.merge(TopicStatistics(len(rows), total, fired))

    def merge(self, other: TopicStatistics) -> TopicStatistics:
        """The statistics of both sets of tokens."""
        if len(other.total) != len(self.total):
            raise TopicError(
                f"statistics of {len(self.total)} and of {len(other.total)} latents do not belong together"
            )
        sizes = np.abs(self.total.astype(np.float64)) + np.abs(other.total.astype(np.float64))
        if sizes.max(initial=0.0) >= _FULL:
            raise TopicError("too many tokens: the sums are full")
        return TopicStatistics(self.tokens + other.tokens, self.total + other.total, self.fired + other.fired)

    @property
    def mean(self) -> Floats:
        """Mean activation over all tokens, zeros included, ``[S]``."""
        mean: Floats = self.total * STEP / max(self.tokens, 1)
        return mean

    @property
    def frequency(self) -> Floats:
        """Share of the tokens on which each latent is active, ``[S]``."""
        share: Floats = self.fired / max(self.tokens, 1)
        return share

    @property
    def mean_when_active(self) -> Floats:
        """Mean activation over the tokens on which the latent is active, 0 where there are none, ``[S]``."""
        mean: Floats = self.total * STEP / np.maximum(self.fired, 1)
        return mean


@dataclass(frozen=True)
class Selected:
    """Latents of a topic.

    Attributes:
        latents: best first; equal scores by index.
        scores: what they were ranked by.
        passed: criterion → how many of all latents meet it.
    """

    latents: tuple[int, ...]
    scores: tuple[float, ...]
    passed: Mapping[str, int]


def farrell(
    forget: TopicStatistics,
    retain: TopicStatistics,
    top: int,
    retain_below: float = 0.01,
    score: Literal["frequency", "mean"] = "frequency",
) -> Selected:
    """Retain score below ``retain_below``, then the largest forget scores (published: 0.001 or 0.01, top 10 or 20)."""
    _check(forget, retain)
    ours, theirs = getattr(forget, score), getattr(retain, score)
    criteria = {"fires on forget": forget.fired > 0, f"retain {score} < {retain_below:g}": theirs < retain_below}
    return _best(ours, criteria, top)


def dsg(
    forget: TopicStatistics,
    retain: TopicStatistics,
    top: int,
    ratio_percentile: float = 95.0,
    forget_percentile: float = 5.0,
    retain_percentile: float = 100.0,
) -> Selected:
    """Percentiles over all latents of importance and ratio, then the largest forget importance (95 biology, 90 cyber)."""
    _check(forget, retain)
    ours, theirs = forget.mean**2, retain.mean**2
    ratio = ours / (theirs + _EPSILON)
    criteria = {
        "fires on forget": forget.fired > 0,
        f"forget importance in percentile {forget_percentile:g}": ours >= np.percentile(ours, forget_percentile),
        f"retain importance up to percentile {retain_percentile:g}": theirs <= np.percentile(theirs, retain_percentile),
        f"ratio in percentile {ratio_percentile:g}": ratio >= np.percentile(ratio, ratio_percentile),
    }
    return _best(ours, criteria, top)


def crisp(forget: TopicStatistics, retain: TopicStatistics, top: int = 10, least_ratio: float = 3.0) -> Selected:
    """The largest differences of firing counts, of which Σa on forget / (Σa on retain + 1) ≥ ``least_ratio``.

    As published, counts and sums are compared as they are, for sets of equal size; here a retain set of another size is
    scaled to the forget set's number of tokens.
    """
    _check(forget, retain)
    scale = forget.tokens / retain.tokens
    difference = forget.fired - scale * retain.fired
    ratio = forget.total * STEP / (scale * retain.total * STEP + 1.0)
    candidates = np.zeros(len(difference), np.bool_)
    candidates[np.argsort(-difference, kind="stable")[: _CANDIDATES * top]] = True
    criteria = {
        "fires on forget": forget.fired > 0,
        "among the largest differences": candidates,
        f"ratio of sums >= {least_ratio:g}": ratio >= least_ratio,
    }
    return _best(difference, criteria, top)


def _check(forget: TopicStatistics, retain: TopicStatistics) -> None:
    if len(forget.total) != len(retain.total):
        raise TopicError(f"forget has {len(forget.total)} latents, retain {len(retain.total)}")
    if not (forget.tokens and retain.tokens):
        raise TopicError(f"needs tokens of both sets, got {forget.tokens} to forget and {retain.tokens} to retain")


def _best(score: Floats, criteria: Mapping[str, Bits], top: int) -> Selected:
    meets = np.logical_and.reduce(list(criteria.values()))
    order = np.argsort(-score, kind="stable")
    taken = order[meets[order]][:top]
    passed = {name: int(bits.sum()) for name, bits in criteria.items()} | {"all": int(meets.sum())}
    return Selected(tuple(int(i) for i in taken), tuple(float(score[i]) for i in taken), passed)
