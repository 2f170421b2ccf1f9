"""What a remap does to the latents of one token: one affine family that covers the published transfer functions.

With a the token's original activations, x the current value of one latent and s the token's unit (:class:`Unit`)::

    x ← clip(alpha·x + beta·s + gamma·a[source], lo, hi)

on the tokens where the remap acts, and only where a ≠ 0 if ``only_if_active``. Sources and activity look at *original*
activations, so the order of transfers on different latents is of no consequence; transfers on one latent compose in
order. The residual stream changes by ``Σ (x − a)·W_dec`` (times the SAE's per-token output scale): what the SAE does not
explain is left as it is.

=====================================  =====================================================  ==========================
transfer                               x                                                      source
=====================================  =====================================================  ==========================
:func:`interpolate`                    (1 − λ)·a + λ·μ                                        known → unknown (methods 2a)
:func:`clamp_active`                   −c·s where a ≠ 0                                       Farrell et al. 2410.19278
:func:`clamp_hit`                      −c·s for all of F, on hit tokens                       DSG, 2504.08192
:func:`clamp_active`, ``PREACT_MEAN``  −c·\\|mean pre-activation\\| where a ≠ 0               CRISP, 2508.13650
:func:`move`, :func:`moves`            b + g·a, and (1 − r)·a in the source                   transfer A → B
=====================================  =====================================================  ==========================
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import torch
from torch import Tensor

from interventions.errors import InterventionError
from interventions.wording import show


class Unit(StrEnum):
    """What ``beta`` is counted in: the factor s of a token."""

    ABSOLUTE = "absolute"
    """s = 1: latent units."""
    RESIDUAL_NORM = "residual_norm"
    """s = ‖h‖ / output scale: along a unit decoder row, −c writes c·‖h‖, whatever the model and the SAE's input scaling."""
    PREACT_MEAN = "preact_mean"
    """s = |mean over all latents of their pre-activations|: by definition a statistic of the full encode, but a linear
    one, so :func:`mean_row` reduces it to one row."""

    @property
    def reads_all_latents(self) -> bool:
        """Whether s depends on every latent of the dictionary."""
        return self is Unit.PREACT_MEAN


@dataclass(frozen=True)
class Transfer:
    """``x ← clip(alpha·x + beta·s + gamma·a[source], lo, hi)`` on one latent; the default is the identity.

    Attributes:
        latent: whose value is mapped.
        alpha, beta, gamma: finite.
        source: the latent whose original activation enters; exactly where gamma ≠ 0.
        lo, hi: bounds of the result in latent units, ``lo <= hi``; infinite = none.
        unit: of ``beta``.
        only_if_active: leave the latent alone where its original activation is 0.

    Raises:
        InterventionError: ``invalid_artifact``, ``param`` naming the attribute.
    """

    latent: int
    alpha: float = 1.0
    beta: float = 0.0
    gamma: float = 0.0
    source: int | None = None
    lo: float = -math.inf
    hi: float = math.inf
    unit: Unit = Unit.ABSOLUTE
    only_if_active: bool = False

    def __post_init__(self) -> None:
        for name in ("latent", "source"):
            index = getattr(self, name)
            if index is not None and index < 0:
                raise _invalid(name, f"latent {index}; indices count from 0")
        for name in ("alpha", "beta", "gamma"):
            value = getattr(self, name)
            if not math.isfinite(value):
                raise _invalid(name, f"must be a finite number, got {show(value)}")
        for name, never in (("lo", math.inf), ("hi", -math.inf)):
            bound = getattr(self, name)
            if math.isnan(bound) or bound == never:
                raise _invalid(name, f"{show(bound)} is not a bound that a value can keep")
        if self.lo > self.hi:
            raise _invalid("lo", f"lower bound {show(self.lo)} is above the upper bound {show(self.hi)}")
        if (self.source is None) != (self.gamma == 0.0):
            message = "names a latent that has no part in it" if self.gamma == 0.0 else "gamma needs a source latent"
            raise _invalid("source", message)

    @property
    def is_identity(self) -> bool:
        """Whether the value never changes."""
        same = self.alpha == 1.0 and self.beta == 0.0 and self.gamma == 0.0
        return same and self.lo == -math.inf and self.hi == math.inf

    def at(self, strength: float) -> Transfer:
        """The same transfer at another strength λ: ``(1 − λ)·x + λ·(alpha·x + beta·s + gamma·a[source])``.

        λ = 1 is the transfer itself, above it overshoots; λ = 0 is the identity, bounds included. At any other λ the
        bounds hold for the result as they are.

        Raises:
            InterventionError: ``strength`` is not a finite number.
        """
        if not math.isfinite(strength):
            raise _invalid("strength", f"must be a finite number, got {show(strength)}")
        if strength == 0.0:
            return Transfer(self.latent)
        gamma = strength * self.gamma
        return replace(
            self,
            alpha=(1.0 - strength) + strength * self.alpha,
            beta=strength * self.beta,
            gamma=gamma,
            source=self.source if gamma != 0.0 else None,
        )


def interpolate(latent: int, target: float, strength: float = 1.0) -> Transfer:
    """a' = (1 − λ)·a + λ·target; λ = ``strength`` = 1 sets the latent."""
    return Transfer(latent, alpha=0.0, beta=target).at(strength)


def clamp_active(latent: int, c: float, unit: Unit = Unit.ABSOLUTE) -> Transfer:
    """a' = −c·s where a ≠ 0, c ≥ 0. With ``PREACT_MEAN``, c is CRISP's α."""
    return Transfer(latent, alpha=0.0, beta=-_magnitude(c), unit=unit, only_if_active=True)


def clamp_hit(latents: Sequence[int], c: float, unit: Unit = Unit.ABSOLUTE) -> tuple[Transfer, ...]:
    """a' = −c·s for every latent of F, inactive ones included, c ≥ 0: for the tokens that :func:`hit` F."""
    return tuple(Transfer(latent, alpha=0.0, beta=-_magnitude(c), unit=unit) for latent in latents)


def move(source: int, target: int, gain: float = 1.0, removed: float = 1.0) -> tuple[Transfer, ...]:
    """b' = b + gain·a and a' = (1 − removed)·a, with a the source's and b the target's activation."""
    return moves([Route(source, target, gain, removed)])


@dataclass(frozen=True)
class Route:
    """One move: ``gain`` times the source's activation onto the target, a share ``removed`` of it out of the source."""

    source: int
    target: int
    gain: float = 1.0
    removed: float = 1.0


def moves(routes: Sequence[Route]) -> tuple[Transfer, ...]:
    """All routes at once: a latent first loses Σ removed of its own activation, then gains what is moved onto it.

    So A → B → C shifts each activation by one, whatever the order of the routes.

    Raises:
        InterventionError: a latent moved onto itself.
    """
    removed: dict[int, float] = {}
    for route in routes:
        if route.source == route.target:
            raise _invalid("target", f"latent {route.source} cannot be moved onto itself")
        removed[route.source] = removed.get(route.source, 0.0) + route.removed
    losses = [Transfer(source, alpha=1.0 - share) for source, share in removed.items()]
    gains = [Transfer(r.target, gamma=r.gain, source=r.source) for r in routes if r.gain != 0.0]
    return tuple(t for t in (*losses, *gains) if not t.is_identity)


def median_norms(c: float, median_norm: float) -> float:
    """c in units of a stated median ‖h‖, as an absolute value: for a fixed clamp that carries over between layers."""
    if not (math.isfinite(median_norm) and median_norm > 0):
        raise _invalid("median_norm", f"must be a positive number, got {show(median_norm)}")
    return _magnitude(c) * median_norm


def canonical(transfers: Sequence[Transfer]) -> tuple[Transfer, ...]:
    """Sorted by latent, the order on one latent kept, identities dropped: equal meanings get equal tuples."""
    return tuple(sorted((t for t in transfers if not t.is_identity), key=lambda t: t.latent))


def reads(transfers: Sequence[Transfer]) -> tuple[int, ...]:
    """The latents whose activation is needed: mapped ones and sources, sorted."""
    return tuple(sorted({t.latent for t in transfers} | {t.source for t in transfers if t.source is not None}))


def hit(a: Tensor) -> Tensor:
    """bool ``[n]``: tokens where any of the latents in ``a [n, m]`` is active."""
    return (a != 0).any(dim=-1)


def units(
    h: Tensor, output_scale: Tensor | None = None, mean_preactivation: Tensor | None = None
) -> dict[Unit, Tensor]:
    """The factor s ``[n]`` of each unit for ``h [n, d]``.

    Args:
        h: residual stream before the edit.
        output_scale: ``[n]``, the SAE's per-token factor of what it writes; ``None`` = 1.
        mean_preactivation: ``[n]``, mean pre-activation over all latents; without it ``PREACT_MEAN`` is absent.
    """
    norm = h.norm(dim=-1)
    found = {Unit.ABSOLUTE: torch.ones_like(norm), Unit.RESIDUAL_NORM: norm}
    if output_scale is not None:
        found[Unit.RESIDUAL_NORM] = norm / output_scale
    if mean_preactivation is not None:
        found[Unit.PREACT_MEAN] = mean_preactivation.abs()
    return found


def mean_row(encoder: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """``(row [d], bias [])`` whose dot product with the SAE's input x̃ is the mean of ``encoder [S, d] @ x̃ + bias [S]``."""
    return encoder.mean(dim=0), bias.mean()


def apply(
    a: Tensor, latents: Sequence[int], transfers: Sequence[Transfer], acts: Tensor, unit: Mapping[Unit, Tensor]
) -> Tensor:
    """The latents after the remap.

    Args:
        a: original activations ``[n, m]``; computed in this dtype.
        latents: which latents the m columns are, sorted or not, each once; all of :func:`reads`.
        transfers: in order.
        acts: bool ``[n]``, the tokens where the remap acts (scope and gate).
        unit: s ``[n]`` of every unit that a transfer with ``beta`` ≠ 0 uses.

    Returns:
        ``[n, m]``; equal to ``a`` bit for bit where the remap does not act.
    """
    column = {latent: i for i, latent in enumerate(latents)}
    x = a.clone()
    for t in transfers:
        i = column[t.latent]
        mapped = t.alpha * x[:, i]
        if t.beta != 0.0:
            mapped = mapped + t.beta * unit[t.unit]
        if t.source is not None:
            mapped = mapped + t.gamma * a[:, column[t.source]]
        here = acts & (a[:, i] != 0) if t.only_if_active else acts
        x[:, i] = torch.where(here, mapped.clamp(t.lo, t.hi), x[:, i])
    return x


def delta(a: Tensor, x: Tensor, decoder: Tensor, output_scale: Tensor | None = None) -> Tensor:
    """What is added to h: ``Σ_i (x_i − a_i)·decoder_i`` ``[n, d]`` for a, x ``[n, m]``, decoder ``[m, d]``, scale ``[n]``."""
    change = (x - a) @ decoder
    return change if output_scale is None else output_scale[:, None] * change


def _magnitude(c: float) -> float:
    if not (math.isfinite(c) and c >= 0):
        raise _invalid("c", f"clamps go to −c with a finite c ≥ 0, got {show(c)}")
    return c


def _invalid(field: str, message: str) -> InterventionError:
    return InterventionError("invalid_artifact", f"{field}: {message}", field)
