"""From labelled tokens to a concept: counts, densities, separability, the choice of latents, and the artefact.

Activations come as the positive entries of tokens (:class:`~interventions.concepts.moments.Firings`), batch by batch; memory for
densities is bounded by going through the latents in blocks. Densities are kernel estimates on the bins
(:meth:`~interventions.concepts.density.Densities.spread`): most latents fire a few dozen times in a few hundred texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from interventions.concepts.concept import Concept, build_concept
from interventions.concepts.density import N_BINS, Densities, HistogramStream
from interventions.concepts.moments import Firings, Moments, MomentStream, concatenate
from interventions.concepts.posterior import class_index
from interventions.concepts.salient import MAX_RATE, TOP, By, background_rate, scores, select
from interventions.concepts.separability import layer_score, separability, separability_from_rest

_BLOCK = 2**24
"""Numbers of a block of densities (classes × latents × bins), about."""


@dataclass(frozen=True)
class Choice:
    """What is taken away, and how its latents are chosen; see :func:`interventions.concepts.salient.select`.

    Attributes:
        target: class that is taken away.
        background: class of ordinary text; ``None`` without one.
        priors: class → weight; uniform if None.
        bins: nb of the histograms.
    """

    target: str
    background: str | None = None
    by: By = "difference"
    top: int = TOP
    max_rate: float | None = MAX_RATE
    bins: int = N_BINS
    priors: Mapping[str, float] | None = None


@dataclass(frozen=True, eq=False)
class Fit:
    """A concept, and what was seen on the way.

    Attributes:
        concept: the artefact.
        moments: of all latents.
        separability: D_JS of every latent of the dictionary over all classes, float64 ``[n]``; 0 for one that never fired.
        dense: the latents that would have been chosen, were they not dense.
    """

    concept: Concept
    moments: Moments
    separability: Tensor
    dense: tuple[int, ...]

    @property
    def layer_score(self) -> float:
        """S_l, over all latents of the dictionary."""
        return layer_score(self.separability)

    @property
    def active_score(self) -> float:
        """The same over the latents that fired at least once."""
        fired = self.moments.firing.sum(dim=0) > 0
        return layer_score(self.separability[fired]) if bool(fired.any()) else 0.0

    @property
    def background_rate(self) -> Tensor:
        """Firing rate that says what is dense, float64 ``[n]``."""
        return background_rate(self.moments, self.concept.target, self.concept.background)


def fit_concept(
    batches: Sequence[Firings],
    classes: Sequence[str],
    n_features: int,
    choice: Choice,
    *,
    sae_digest: str,
    layer: int,
    model: str,
    fitted_on: Mapping[str, Any] | None = None,
) -> Fit:
    """Fit a concept. Equal batches give equal bytes.

    Raises:
        ValueError: no latent qualifies, a class has no tokens, or wrong priors, target or background.
    """
    class_index(tuple(classes), choice.target)
    stream = MomentStream(classes, n_features)
    for batch in batches:
        stream.count(batch)
    moments = stream.moments()
    hits = concatenate(batches)
    distance, score = _separabilities(hits, moments, choice)
    chosen = select(
        moments,
        choice.target,
        by=choice.by,
        top=choice.top,
        background=choice.background,
        max_rate=choice.max_rate,
        score=score,
    )
    open_to_all = select(moments, choice.target, by=choice.by, top=choice.top, max_rate=None, score=score)
    features = torch.tensor(chosen.features)
    densities = _densities(_of(hits, features, n_features), moments.select(features), choice.bins)
    concept = build_concept(
        moments,
        densities,
        chosen,
        choice.target,
        sae_digest=sae_digest,
        layer=layer,
        model=model,
        background=choice.background,
        priors=choice.priors,
        fitted_on=fitted_on,
    )
    dense = tuple(index for index in open_to_all.features if index not in set(chosen.features))
    return Fit(concept, moments, distance, dense if choice.max_rate is not None else ())


def _separabilities(hits: Firings, moments: Moments, choice: Choice) -> tuple[Tensor, Tensor]:
    """D_JS and the score of every latent, float64 ``[n]`` each."""
    distance = torch.zeros(moments.n_features, dtype=torch.float64)
    from_rest = torch.zeros_like(distance)
    target = class_index(moments.classes, choice.target)
    for fired, block in _blocks(moments, choice.bins):
        densities = _densities(_of(hits, fired, moments.n_features), block, choice.bins)
        distance[fired] = separability(densities)
        from_rest[fired] = separability_from_rest(densities, target)
    if choice.by != "separability":
        return distance, scores(moments, choice.target, choice.by)
    gap = scores(moments, choice.target, "difference")
    return distance, torch.where(gap > 0, from_rest, 0.0)


def _blocks(moments: Moments, bins: int) -> Iterator[tuple[Tensor, Moments]]:
    """The latents that fired, in blocks: indices, and their moments."""
    fired = (moments.firing.sum(dim=0) > 0).nonzero().squeeze(1)
    size = max(1, _BLOCK // (len(moments.classes) * bins))
    for block in fired.split(size):
        yield block, moments.select(block)


def _of(hits: Firings, features: Tensor, n_features: int) -> Firings:
    """The entries of ``features`` (ascending), which become 0, 1, …"""
    place = torch.full((n_features,), -1, dtype=torch.int64)
    place[features] = torch.arange(len(features))
    found = place[hits.feature]
    kept = found >= 0
    return Firings(hits.tokens, hits.label[kept], found[kept], hits.value[kept])


def _densities(hits: Firings, moments: Moments, bins: int) -> Densities:
    stream = HistogramStream(moments.classes, moments.edges(), bins)
    stream.count(hits)
    return stream.densities().spread()
