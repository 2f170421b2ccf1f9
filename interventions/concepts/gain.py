"""What a suppression does to an activation: one family of transfer functions, told apart by a weight.

::

    a' = x·(1 − λ·w(x))           x = a, or the value that earlier edits of the same latent left
    mask, attenuate:  w(x) = 1
    range:            w(x) = 1 where x > 0 and μ − τσ ≤ x ≤ μ + τσ, else 0
    APP:              w(x) = P(concept | x)

λ is the strength; at λ = 1 mask and range give zero, and that is how requests serve those two whatever their strength
(:mod:`interventions.suppression`). Nothing is clipped: with λ·w > 1 a latent goes below zero. λ = 0 returns x bit for bit,
and a latent at zero stays there.

Masks and ranges are those of NeuronLens (μ and σ of the concept's class, ddof 0, τ = 2 by default), here over positive values
only. "Attenuation via posterior probabilities" is reconstructed from its name and abstract (Fereidouni et al., arXiv
2508.15094) and from the posterior in the same authors' earlier code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from interventions.concepts.density import bin_index, bin_scale, check_edges

TAU = 2.0
"""Half width of a range mask in standard deviations, unless told otherwise."""
HEADER = 2
"""Numbers of a table row before its posteriors."""


class Transfer(Protocol):
    """How much of the strength applies to each activation."""

    def weight(self, a: Tensor) -> Tensor:
        """w(a) ∈ [0, 1], float32, shape of ``a`` ``[…, n]``: the n latents of the concept last."""
        ...


def apply(transfer: Transfer, x: Tensor, strength: float = 1.0) -> Tensor:
    """x·(1 − strength·w(x)), float32.

    Args:
        x: current values ``[…, n]``: activations, or what earlier edits made of them. The weight is looked up at x, so that
            edits of one latent compose as functions, in order.
        strength: λ.
    """
    x = x.float()
    return x * (1.0 - strength * transfer.weight(x))


def delta(before: Tensor, after: Tensor, decoder: Tensor) -> Tensor:
    """Δh = Σ_j (a'_j − a_j)·W_dec[j]: ``[…, d_model]`` for ``before``, ``after`` ``[…, n]`` and ``decoder`` ``[n, d_model]``.

    Equals decode(f') + (h − decode(f)) − h for a linear decoder: bias and error term cancel.
    """
    return (after - before) @ decoder


@dataclass(frozen=True)
class Whole:
    """Mask and attenuation: w = 1."""

    def weight(self, a: Tensor) -> Tensor:
        """1 everywhere."""
        return torch.ones_like(a, dtype=torch.float32)


@dataclass(frozen=True, eq=False)
class Range:
    """Range mask: w = 1 on the positive part of [μ − τσ, μ + τσ], ends included.

    Attributes:
        mean, std: float ``[n]``, σ ≥ 0.
        tau: ≥ 0; ∞ is the full mask.
    """

    mean: Tensor
    std: Tensor
    tau: float = TAU

    def __post_init__(self) -> None:
        if not self.tau >= 0:
            raise ValueError(f"tau: expected a number ≥ 0, got {self.tau}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values.ndim != 1 or not bool(values.isfinite().all()):
                raise ValueError(f"{name}: expected one finite number per latent")
        if self.mean.shape != self.std.shape or bool((self.std < 0).any()):
            raise ValueError(f"std: expected {len(self.mean)} numbers ≥ 0")

    @property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """μ − τσ and μ + τσ, float32 ``[n]`` each."""
        mean = self.mean.double()
        half = torch.full_like(mean, math.inf) if math.isinf(self.tau) else self.tau * self.std.double()
        return (mean - half).float(), (mean + half).float()

    def weight(self, a: Tensor) -> Tensor:
        """1 inside, 0 outside."""
        low, high = self.bounds
        x = a.float()
        return ((x > 0) & (x >= low) & (x <= high)).float()


@dataclass(frozen=True, eq=False)
class GainTable:
    """P(concept | a) of n latents by bin, laid out so that one lookup per latent and token gives the gain.

    ``rows[j] = [low, 1/width, P_0, …, P_{nb−1}]``, float32, and with b = clamp(⌊(a − low)·(1/width)⌋, 0, nb − 1)::

        gain_j(a) = 1 − λ·rows[j, 2 + b]

    The table holds P rather than the gain, so that the strength stays with the request.

    Attributes:
        rows: float32 ``[n, 2 + nb]``.
    """

    rows: Tensor

    def __post_init__(self) -> None:
        rows = self.rows
        if rows.dtype is not torch.float32 or rows.ndim != 2 or rows.shape[1] <= HEADER:
            raise ValueError(f"rows: expected float32 [latents, {HEADER} + bins], got {rows.dtype} {list(rows.shape)}")
        table = rows[:, HEADER:]
        good = rows.isfinite().all(dim=1) & (rows[:, 1] > 0) & (table >= 0).all(dim=1) & (table <= 1).all(dim=1)
        if not bool(good.all()):
            row = int((~good).nonzero()[0])
            raise ValueError(
                f"rows[{row}]: expected a finite low end, an inverse width > 0 and posteriors within [0, 1]"
            )

    @property
    def n_bins(self) -> int:
        """nb."""
        return self.rows.shape[1] - HEADER

    def weight(self, a: Tensor) -> Tensor:
        """P(concept | a), float32."""
        place = bin_index(a, self.rows[:, 0], self.rows[:, 1], self.n_bins)
        table = self.rows[:, HEADER:].expand(*place.shape, -1)
        return table.gather(-1, place[..., None]).squeeze(-1)

    def hard(self, threshold: float) -> GainTable:
        """The table with 1 where P ≥ ``threshold`` and 0 elsewhere: a mask by posterior, as in NeuronLens (there 0.3)."""
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold: expected a probability, got {threshold}")
        steps = (self.rows[:, HEADER:] >= threshold).float()
        return GainTable(torch.cat([self.rows[:, :HEADER], steps], dim=1))


def gain_table(edges: Tensor, posterior: Tensor) -> GainTable:
    """The table of ``edges`` ``[n, 2]`` and P(concept | bin) ``[n, nb]``.

    Raises:
        ValueError: shapes that do not match, edges that do not increase, probabilities outside [0, 1].
    """
    check_edges(edges)
    if posterior.ndim != 2 or len(posterior) != len(edges):
        raise ValueError(f"posterior: expected [{len(edges)}, bins], got shape {list(posterior.shape)}")
    low, inverse_width = bin_scale(edges, posterior.shape[1])
    return GainTable(torch.cat([low[:, None], inverse_width[:, None], posterior.float()], dim=1))
