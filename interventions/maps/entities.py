"""Which latents tell known from unknown entities, and what they look like for the unknown ones.

With z(e) the SAE's activations at the *last token* of entity e (Ferrando et al., 2411.14257; the equations as in their
code)::

    f_known_j   = share of the known entities with z_j(e) > 1e-6;  f_unknown_j likewise
    s_known     = f_known − f_unknown                              "absolute_difference"
                  (f_known − f_unknown) / (f_unknown + 1e-6)       "relative_difference"
    s_unknown   = the same with the two exchanged
    score over entity types (player, film, …) = the minimum over types; latents are ranked by it (MaxMin)

Latents that fire on at least 2 % of the tokens of ordinary text are left out. Moving a known entity's latents to the mean
of the unknown ones, z' = (1 − λ)·z + λ·μ_U on K ∪ U, is the inference-time reading of Yamashita et al. (2509.15631).

Invented names take about twice as many tokens as known ones: without matching lengths, token count alone separates the two
(:func:`match_lengths`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from interventions.fitting.separation import AUROC, auroc
from interventions.maps.transfer import Transfer, interpolate
from interventions.wording import choices, show

Floats = npt.NDArray[np.float64]
Method = Literal["absolute_difference", "relative_difference"]

FIRES = 1e-6
"""An activation above this counts as firing (and keeps relative scores finite)."""
DENSE = 0.02
"""Share of ordinary tokens from which on a latent is too unspecific."""


class EntityError(ValueError):
    """Entities from which no latents can be had; the message says what is missing."""


def firing(z: npt.ArrayLike) -> Floats:
    """Share of the entities ``[n, S]`` on which each latent fires, ``[S]``."""
    values = np.asarray(z)
    if values.ndim != 2 or len(values) == 0:
        raise EntityError(f"expected activations [entities, latents], got shape {list(values.shape)}")
    if not np.isfinite(values).all():
        raise EntityError("an activation is not a finite number")
    share: Floats = (values > FIRES).mean(axis=0, dtype=np.float64)
    return share


def scores(f_known: Floats, f_unknown: Floats, method: Method = "absolute_difference") -> tuple[Floats, Floats]:
    """``(s_known, s_unknown)``, each ``[S]``."""
    if method not in get_args(Method):
        raise EntityError(f"no scoring method {show(method)}; there are {choices(get_args(Method))}")
    difference = f_known - f_unknown
    if method == "absolute_difference":
        return difference, -difference
    return difference / (f_unknown + FIRES), -difference / (f_known + FIRES)


@dataclass(frozen=True)
class EntityLatents:
    """The latents that tell known from unknown.

    Attributes:
        known, unknown: K and U, best first.
        known_scores, unknown_scores: their MaxMin scores, all positive.
        dense: latents that would be among them if they did not fire on so much ordinary text.
    """

    known: tuple[int, ...]
    unknown: tuple[int, ...]
    known_scores: tuple[float, ...]
    unknown_scores: tuple[float, ...]
    dense: int

    @property
    def all(self) -> tuple[int, ...]:
        """K ∪ U, sorted."""
        return tuple(sorted({*self.known, *self.unknown}))


def find_latents(
    known: Mapping[str, npt.ArrayLike],
    unknown: Mapping[str, npt.ArrayLike],
    top_known: int,
    top_unknown: int,
    background: npt.ArrayLike | None = None,
    method: Method = "absolute_difference",
) -> EntityLatents:
    """The best latents of each kind by MaxMin over entity types.

    Args:
        known, unknown: entity type → activations at the last token, ``[entities, S]``; the same types in both.
        top_known, top_unknown: at most so many; latents without a positive score are never taken.
        background: share of ordinary tokens on which each latent fires, ``[S]``.
        method: how frequencies are compared.

    Raises:
        EntityError: types that do not match, no entities, or nothing that scores above 0.
    """
    if not known or set(known) != set(unknown):
        raise EntityError(f"known has the types {choices(sorted(known))}, unknown {choices(sorted(unknown))}")
    by_type = [scores(firing(known[kind]), firing(unknown[kind]), method) for kind in sorted(known)]
    if len({len(s) for pair in by_type for s in pair}) != 1:
        raise EntityError("the entity types have different numbers of latents")
    least = [np.minimum.reduce([pair[side] for pair in by_type]) for side in (0, 1)]
    specific = np.ones(len(least[0]), np.bool_)
    if background is not None:
        shares = np.asarray(background, np.float64)
        if shares.shape != least[0].shape:
            raise EntityError(f"background has shape {list(shares.shape)}; there are {len(least[0])} latents")
        specific = shares < DENSE
    chosen, dense = [], 0
    for score, top in zip(least, (top_known, top_unknown), strict=True):
        order = np.argsort(-score, kind="stable")
        order = order[score[order] > 0]
        chosen.append(order[specific[order]][:top])
        dense += int((~specific[order[:top]]).sum())
    if not any(len(taken) for taken in chosen):
        raise EntityError("no latent fires more often on one kind of entity than on the other in every type")
    figures = [tuple(float(v) for v in score[taken]) for score, taken in zip(least, chosen, strict=True)]
    known_latents, unknown_latents = (tuple(int(i) for i in taken) for taken in chosen)
    return EntityLatents(known_latents, unknown_latents, figures[0], figures[1], dense)


def mean_activation(z: npt.ArrayLike, latents: Sequence[int]) -> Floats:
    """μ: mean activation ``[len(latents)]`` over the entities ``[n, S]`` (float64)."""
    values = np.asarray(z)
    if values.ndim != 2 or len(values) == 0:
        raise EntityError(f"expected activations [entities, latents], got shape {list(values.shape)}")
    mean: Floats = values[:, list(latents)].mean(axis=0, dtype=np.float64)
    return mean


def known_to_unknown(latents: Sequence[int], mean_unknown: npt.ArrayLike) -> tuple[Transfer, ...]:
    """The map of strength 1: every latent set to its mean over unknown entities; other strengths interpolate."""
    targets = np.asarray(mean_unknown, np.float64)
    return tuple(interpolate(latent, float(mu)) for latent, mu in zip(latents, targets, strict=True))


@dataclass(frozen=True)
class LengthMatching:
    """Known and unknown entities paired by token count.

    Attributes:
        pairs: (index into known, index into unknown), in the order of the known ones.
        dropped_known, dropped_unknown: indices without a partner.
        lengths: token count → pairs of that length.
    """

    pairs: tuple[tuple[int, int], ...]
    dropped_known: tuple[int, ...]
    dropped_unknown: tuple[int, ...]
    lengths: Mapping[int, int]

    @property
    def known(self) -> list[int]:
        """Indices of the known entities kept."""
        return [i for i, _ in self.pairs]

    @property
    def unknown(self) -> list[int]:
        """Indices of the unknown entities kept."""
        return [j for _, j in self.pairs]


def match_lengths(known: Sequence[int], unknown: Sequence[int]) -> LengthMatching:
    """Pair each known entity with the first unused unknown one of exactly its token count.

    No other one-to-one matching on equal lengths has more pairs. Both sides then have the same distribution of lengths.
    """
    waiting: defaultdict[int, list[int]] = defaultdict(list)
    for j in reversed(range(len(unknown))):
        waiting[unknown[j]].append(j)
    pairs: list[tuple[int, int]] = []
    dropped: list[int] = []
    lengths: dict[int, int] = {}
    for i, length in enumerate(known):
        if waiting[length]:
            pairs.append((i, waiting[length].pop()))
            lengths[length] = lengths.get(length, 0) + 1
        else:
            dropped.append(i)
    left = sorted(j for js in waiting.values() for j in js)
    return LengthMatching(tuple(pairs), tuple(dropped), tuple(left), dict(sorted(lengths.items())))


@dataclass(frozen=True)
class BeforeAfter:
    """The same separation measured twice."""

    before: AUROC
    after: AUROC


def auroc_matched(known: npt.ArrayLike, unknown: npt.ArrayLike, matching: LengthMatching) -> BeforeAfter:
    """How well a score ``[n]``, ``[m]`` tells known from unknown, with all entities and with length-matched ones only."""
    x, y = np.asarray(known, np.float64), np.asarray(unknown, np.float64)
    if not matching.pairs:
        raise EntityError("no known entity has an unknown one of its length")
    return BeforeAfter(auroc(x, y), auroc(x[matching.known], y[matching.unknown]))


def auroc_edited(target: npt.ArrayLike, edited: npt.ArrayLike, unknown: npt.ArrayLike) -> BeforeAfter:
    """How well a score tells the target from unknown entities, without and with the edit (½ = indistinguishable)."""
    return BeforeAfter(auroc(target, unknown), auroc(edited, unknown))
