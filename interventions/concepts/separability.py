"""How far a latent tells concepts apart: the normalised Jensen-Shannon distance of its class-conditional distributions.

With masses p_1 … p_k and their mean M (Fereidouni et al., arXiv 2508.15094)::

    JSD  = H(M) − (1/k) Σ_i H(p_i)                H in bits
    D_JS = sqrt(JSD / log2 k)  ∈ [0, 1]
    S_l  = mean over the latents of layer l of D_JS

The zero mass is a point of the distributions like any bin: a latent that fires on 1 % of one class and 60 % of the other
separates them, however alike the positive values are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from interventions.concepts.density import Densities


def jensen_shannon_distance(masses: Tensor) -> Tensor:
    """D_JS of k distributions.

    Args:
        masses: ``[k, …, m]``, k ≥ 2, ≥ 0, sums over the last axis 1.

    Returns:
        float64 ``[…]`` within [0, 1]: 0 for equal distributions, 1 for disjoint ones.

    Raises:
        ValueError: fewer than two distributions, negative masses, or sums that are not 1.
    """
    p = masses.double()
    if p.ndim < 2 or len(p) < 2:
        raise ValueError(f"masses: expected at least two distributions, got shape {list(masses.shape)}")
    if bool((p < 0).any()) or not torch.allclose(p.sum(dim=-1), torch.ones((), dtype=p.dtype), rtol=0, atol=1e-6):
        raise ValueError("masses: expected numbers ≥ 0 that sum to 1")
    divergence = _entropy(p.mean(dim=0)) - _entropy(p).mean(dim=0)
    return (divergence / math.log2(len(p))).clamp(0, 1).sqrt()


def separability(densities: Densities) -> Tensor:
    """D_JS over all classes, zero mass included: float64 ``[n]``."""
    return jensen_shannon_distance(densities.masses)


def separability_from_rest(densities: Densities, target: int) -> Tensor:
    """D_JS of one class and the even mixture of all others, zero mass included: float64 ``[n]``."""
    masses = densities.masses
    rest = [i for i in range(len(masses)) if i != target]
    return jensen_shannon_distance(torch.stack([masses[target], masses[rest].mean(dim=0)]))


def layer_score(distances: Tensor) -> float:
    """S_l, the mean of D_JS ``[n]`` over all latents of a layer."""
    if distances.ndim != 1 or not len(distances):
        raise ValueError(f"distances: expected one per latent, got shape {list(distances.shape)}")
    return float(distances.double().mean())


def _entropy(p: Tensor) -> Tensor:
    """−Σ p log2 p over the last axis, 0·log 0 = 0."""
    nats: Tensor = torch.special.entr(p)
    return nats.sum(dim=-1) / math.log(2)
