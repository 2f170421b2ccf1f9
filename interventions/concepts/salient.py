"""Which latents stand for a concept.

By mean: the largest mean activation on the concept's tokens, as published. Latents that fire everywhere are large for every
class, so two other scores are offered, and such dense latents are left out unless asked for:

- difference: mean activation on the concept less the even mean of the other classes';
- separability: D_JS between the concept and the even mixture of the other classes, where the concept activates more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from interventions.concepts.density import Densities
from interventions.concepts.moments import Moments
from interventions.concepts.posterior import class_index
from interventions.concepts.separability import separability_from_rest
from interventions.wording import choices

By = Literal["mean", "difference", "separability"]

TOP = 50
"""Latents of a concept, unless told otherwise (the paper's number)."""
MAX_RATE = 0.1
"""A latent is dense if it fires on more than this share of background tokens."""


@dataclass(frozen=True)
class Selection:
    """The latents of a concept, by index, ascending.

    Attributes:
        features: indices.
        scores: one per latent, > 0.
        by: what the score is.
        dense: latents with a positive score that were left out because they are dense.
        max_rate: the bound; ``None`` where dense latents were allowed.
    """

    features: tuple[int, ...]
    scores: tuple[float, ...]
    by: By
    dense: int
    max_rate: float | None


def scores(moments: Moments, target: str, by: By, densities: Densities | None = None) -> Tensor:
    """The score of every latent for one class: float64 ``[n]``; what is not above zero does not speak for the class.

    Args:
        densities: of the same latents; needed by "separability" only.

    Raises:
        ValueError: an unknown class or score, or densities that are missing or do not match.
    """
    if by not in get_args(By):
        raise ValueError(f"by: {by!r} is not a score; there are {choices(get_args(By))}")
    c = class_index(moments.classes, target)
    activation = moments.mean_activation
    if by == "mean":
        return activation[c]
    rest = [i for i in range(len(activation)) if i != c]
    gap = activation[c] - activation[rest].mean(dim=0)
    if by == "difference":
        return gap
    if densities is None:
        raise ValueError("densities: needed to score by separability")
    if (densities.classes, densities.counts.shape[1]) != (moments.classes, moments.n_features):
        raise ValueError("densities: expected the classes and latents of the moments")
    return torch.where(gap > 0, separability_from_rest(densities, c), 0.0)


def background_rate(moments: Moments, target: str, background: str | None = None) -> Tensor:
    """Firing rate on background text, float64 ``[n]``: of that class, or the even mean of all classes but the target."""
    c = class_index(moments.classes, target)
    rate = moments.firing_rate
    if background is not None:
        b = class_index(moments.classes, background)
        if b == c:
            raise ValueError(f"background: {background!r} is the concept itself")
        return rate[b]
    return rate[[i for i in range(len(rate)) if i != c]].mean(dim=0)


def select(
    moments: Moments,
    target: str,
    *,
    by: By = "difference",
    top: int | None = None,
    fraction: float | None = None,
    densities: Densities | None = None,
    background: str | None = None,
    max_rate: float | None = MAX_RATE,
    score: Tensor | None = None,
) -> Selection:
    """The latents with the largest scores above zero; of equal scores the lower index comes first.

    Args:
        top: how many at most (``TOP`` if neither is given); fewer if fewer qualify.
        fraction: instead, the share of all n latents, rounded up.
        background: class whose firing rate says what is dense; the mean of the other classes if None.
        max_rate: firing rate above which a latent is dense and left out; None keeps dense latents.
        score: :func:`scores` of every latent, where they are known already; ``densities`` are not needed then.

    Raises:
        ValueError: both ``top`` and ``fraction``, values out of range, or no latent that qualifies.
    """
    if top is not None and fraction is not None:
        raise ValueError("top: give either top or fraction")
    if top is not None and top < 1:
        raise ValueError(f"top: expected at least 1, got {top}")
    if fraction is not None and not 0 < fraction <= 1:
        raise ValueError(f"fraction: expected a share above 0 and at most 1, got {fraction}")
    if max_rate is not None and not 0 <= max_rate <= 1:
        raise ValueError(f"max_rate: expected a share between 0 and 1, got {max_rate}")
    wanted = math.ceil(fraction * moments.n_features) if fraction is not None else top or TOP
    score = scores(moments, target, by, densities) if score is None else score
    speaks = (score > 0) & (moments.firing[class_index(moments.classes, target)] > 0)
    dense = torch.zeros_like(speaks)
    if max_rate is not None:
        dense = speaks & (background_rate(moments, target, background) > max_rate)
    candidates = int((speaks & ~dense).sum())
    if not candidates:
        left_out = f"; {int(dense.sum())} that do are dense (max_rate {max_rate})" if bool(dense.any()) else ""
        raise ValueError(f"no latent has a {by} score above 0 for {target!r}{left_out}")
    ranked = torch.where(speaks & ~dense, score, -torch.inf).argsort(descending=True, stable=True)
    chosen = ranked[: min(wanted, candidates)].sort().values
    return Selection(tuple(chosen.tolist()), tuple(score[chosen].tolist()), by, int(dense.sum()), max_rate)
