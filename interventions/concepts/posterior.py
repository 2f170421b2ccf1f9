"""The posterior of each class given one activation of one latent.

For a > 0 in bin b of a latent's shared bins, the bin width cancels::

    P(c | a) = π_c·q_c·g_c(b) / Σ_i π_i·q_i·g_i(b)            P(c | 0) = π_c·(1 − q_c) / Σ_i π_i·(1 − q_i)

π is uniform unless given. A class of background text beside the concepts keeps text outside the label set from being forced
into one of them.

Two things that the usual formula leaves open are settled here so that a strong activation never passes unhindered:

- An activation outside the range that was fitted belongs to the first or last bin, never to a density of zero.
- A bin in which no class has a token says nothing; it takes the posterior of the nearest bin that has one (of two equally near
  ones, the lower). Added to the denominator, a small ε would do the opposite: P of every class goes to 0 where data are few.

Without any firing token a latent says nothing: P = π.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from interventions.concepts.density import Densities
from interventions.wording import choices, nearest


def posteriors(densities: Densities, priors: Mapping[str, float] | None = None) -> Tensor:
    """P(c | bin) of every class: float64 ``[k, n, nb]``, each within [0, 1], sums over classes 1.

    Args:
        priors: class → weight ≥ 0, of all classes; scaled to sum 1. Uniform if None.

    Raises:
        ValueError: ``priors`` name other classes, or are not finite, negative or all zero; a class has no tokens.
    """
    pi = prior_weights(densities, priors)
    filled = _filled(densities)
    # counts·q/Σcounts rather than masses of the whole: with smoothing 0 an unfilled bin must not divide 0 by 0.
    joint = pi[:, None, None] * densities.firing_rate[..., None] * densities.positive
    joint = joint.gather(2, filled[None].expand_as(joint))
    whole = joint.sum(dim=0, keepdim=True)
    known = whole > 0
    return torch.where(known, joint / torch.where(known, whole, 1.0), pi[:, None, None].expand_as(joint))


def posterior(densities: Densities, target: str, priors: Mapping[str, float] | None = None) -> Tensor:
    """P(target | bin): float64 ``[n, nb]``. Errors as :func:`posteriors`, and a target that is not a class."""
    return posteriors(densities, priors)[class_index(densities.classes, target)]


def posteriors_at_zero(densities: Densities, priors: Mapping[str, float] | None = None) -> Tensor:
    """P(c | a = 0): float64 ``[k, n]``; the prior for a latent that fires on every token."""
    pi = prior_weights(densities, priors)[:, None]
    joint = pi * (1 - densities.firing_rate)
    whole = joint.sum(dim=0, keepdim=True)
    return torch.where(whole > 0, joint / torch.where(whole > 0, whole, 1.0), pi.expand_as(joint))


def prior_weights(densities: Densities, priors: Mapping[str, float] | None) -> Tensor:
    """π, float64 ``[k]``, sum 1."""
    classes = densities.classes
    for name, count in zip(classes, densities.tokens.tolist(), strict=True):
        if count == 0:
            raise ValueError(f"class {name!r} has no tokens")
    if priors is None:
        return torch.full((len(classes),), 1 / len(classes), dtype=torch.float64)
    if set(priors) != set(classes):
        raise ValueError(f"priors: expected a weight for each of {choices(classes)}, got {choices(priors)}")
    weights = torch.tensor([float(priors[name]) for name in classes], dtype=torch.float64)
    if not bool(weights.isfinite().all()) or bool((weights < 0).any()) or not float(weights.sum()) > 0:
        raise ValueError(f"priors: expected finite weights ≥ 0, not all zero, got {weights.tolist()}")
    return weights / weights.sum()


def class_index(classes: tuple[str, ...], name: str) -> int:
    """Index of a class by name.

    Raises:
        ValueError: naming the classes there are.
    """
    if name not in classes:
        raise ValueError(f"{name!r} is not a class; there are {choices(classes)}.{nearest(name, classes)}")
    return classes.index(name)


def _filled(densities: Densities) -> Tensor:
    """For each bin the nearest one with a token of any class, itself included: int64 ``[n, nb]``."""
    # Spread counts fade out without end: what is below the smoothing is no token.
    occupied = densities.counts.double().sum(dim=0) > min(densities.smoothing, 0.5)
    place = torch.arange(densities.n_bins)
    far = 2 * densities.n_bins
    below = torch.where(occupied, place, -far).cummax(dim=1).values
    above = torch.where(occupied, place, far).flip(1).cummin(dim=1).values.flip(1)
    chosen = torch.where(place - below <= above - place, below, above)
    return torch.where(occupied.any(dim=1, keepdim=True), chosen, place)
