"""Zero-inflated densities of a latent's activation, one per class.

p(a | c) = (1 − q_c)·δ₀(a) + q_c·g_c(a), with the firing rate q_c (share of the class's tokens with a > 0) and g_c, a
histogram of the positive values on equal bins that all classes of a latent share::

    g_c(b) = (counts_c(b) + s) / (w · Σ_b' (counts_c(b') + s))        w = bin width, s = smoothing

Densities by histogram follow Fereidouni et al. (arXiv 2508.15094, "histogram-based KDE"), whose earlier public code uses
100 bins on the range widened by 1 % and s = 1e-5; the zero mass is ours, since latents are zero on most tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from interventions.concepts.moments import Firings, class_names, firings

N_BINS = 100
"""Bins of a histogram, unless told otherwise."""
SMOOTHING = 1e-5
"""Count that every bin of every class starts with."""


def bin_scale(edges: Tensor, n_bins: int) -> tuple[Tensor, Tensor]:
    """Low end and inverse bin width, float32 ``[n]`` each, of ``edges`` ``[n, 2]``: what :func:`bin_index` needs."""
    low, high = edges[:, 0].double(), edges[:, 1].double()
    return low.float(), (n_bins / (high - low)).float()


def bin_index(a: Tensor, low: Tensor, inverse_width: Tensor, n_bins: int) -> Tensor:
    """clamp(⌊(a − low)·inverse_width⌋, 0, n_bins − 1), int64, in float32 arithmetic.

    Fitting and serving both use this very expression, so that a value falls into one bin everywhere; values outside the range
    belong to the first or last bin.
    """
    position = ((a.float() - low) * inverse_width).floor()
    # NaN has no bin, but must not become an index outside the table either; what it scales stays NaN.
    return position.clamp(0, n_bins - 1).nan_to_num(n_bins - 1).long()


@dataclass(frozen=True, eq=False)
class Densities:
    """Class-conditional densities of n latents, k classes, nb bins.

    Attributes:
        classes: names, k of them.
        edges: float32 ``[n, 2]``, low and high end of the bins of each latent.
        tokens: int64 ``[k]``.
        firing: int64 ``[k, n]``, tokens on which the latent fires.
        counts: ``[k, n, nb]``, firing tokens by bin: int64 as counted, float64 after :meth:`spread`. Sums over bins are ``firing``.
        smoothing: s.
    """

    classes: tuple[str, ...]
    edges: Tensor
    tokens: Tensor
    firing: Tensor
    counts: Tensor
    smoothing: float = SMOOTHING

    @property
    def n_bins(self) -> int:
        """nb."""
        return self.counts.shape[2]

    @property
    def firing_rate(self) -> Tensor:
        """q_c, float64 ``[k, n]``; 0 for a class without tokens."""
        return self.firing.double() / self.tokens.clamp(min=1).double()[:, None]

    @property
    def bin_width(self) -> Tensor:
        """w, float64 ``[n]``."""
        return (self.edges[:, 1].double() - self.edges[:, 0].double()) / self.n_bins

    @property
    def positive(self) -> Tensor:
        """w·g_c(b), the share of each bin among the positive values: float64 ``[k, n, nb]``, sums over bins are 1."""
        raised = self.counts.double() + self.smoothing
        whole = raised.sum(dim=-1, keepdim=True)
        return torch.where(whole > 0, raised / whole, 1.0 / self.n_bins)

    @property
    def density(self) -> Tensor:
        """g_c(b), per unit of activation: float64 ``[k, n, nb]``."""
        return self.positive / self.bin_width[:, None]

    @property
    def masses(self) -> Tensor:
        """P(zero), then P(bin b): float64 ``[k, n, 1 + nb]``, (1 − q_c, q_c·w·g_c); sums over the last axis are 1."""
        q = self.firing_rate[..., None]
        return torch.cat([1 - q, q * self.positive], dim=-1)

    def select(self, features: Tensor) -> Densities:
        """The same of some latents, by index."""
        return replace(
            self, edges=self.edges[features], firing=self.firing[:, features], counts=self.counts[:, features]
        )

    def spread(self, scale: float = 1.0) -> Densities:
        """Each count spread over neighbouring bins by a Gaussian: a kernel density estimate on the bins.

        The bandwidth of class c is Scott's, ``scale``·σ_c·N_c^(−1/5), with σ_c of its N_c binned values (of all classes
        together where N_c < 2). A kernel that reaches over an end is normalised within the range, so sums stay as they are.
        For latents that fire a few dozen times, bins of single tokens would say 0 or 1 where nothing is known.
        """
        if not scale > 0:
            raise ValueError(f"scale: expected a positive number, got {scale}")
        counts = self.counts.double()
        place = torch.arange(self.n_bins, dtype=torch.float64)
        pooled = _deviation(counts.sum(dim=0), place)
        size = counts.sum(dim=-1)
        sigma = torch.where(size < 2, pooled[None], _deviation(counts, place))
        # A Gaussian far narrower than a bin is the bin itself.
        bandwidth = (scale * sigma * size.clamp(min=1) ** -0.2).clamp(min=1e-3)
        distance = (place[:, None] - place[None, :]) ** 2
        out = torch.empty_like(counts)
        for feature in range(counts.shape[1]):  # one latent at a time: nb² numbers per class
            kernel = torch.exp(-0.5 * distance / bandwidth[:, feature, None, None] ** 2)
            kernel /= kernel.sum(dim=-1, keepdim=True)
            out[:, feature] = (counts[:, feature, None, :] @ kernel).squeeze(1)
        return replace(self, counts=out)

    def arrays(self) -> dict[str, Tensor]:
        """The tensors by name, contiguous: what a safetensors file needs besides class names and smoothing."""
        found = {"edges": self.edges, "tokens": self.tokens, "firing": self.firing, "counts": self.counts}
        return {name: tensor.contiguous() for name, tensor in found.items()}

    @classmethod
    def from_arrays(cls, classes: Sequence[str], arrays: dict[str, Tensor], smoothing: float = SMOOTHING) -> Densities:
        """Inverse of :meth:`arrays`.

        Raises:
            ValueError: a tensor that is missing or does not fit the others, named.
        """
        names = class_names(classes)
        for name in ("edges", "tokens", "firing", "counts"):
            if name not in arrays:
                raise ValueError(f"{name}: missing; densities have edges, tokens, firing, counts")
        counts = arrays["counts"]
        if counts.ndim != 3 or counts.shape[0] != len(names):
            raise ValueError(f"counts: expected [{len(names)}, latents, bins], got shape {list(counts.shape)}")
        n = counts.shape[1]
        for name, shape in (("edges", (n, 2)), ("tokens", (len(names),)), ("firing", (len(names), n))):
            if arrays[name].shape != shape:
                raise ValueError(f"{name}: expected shape {list(shape)}, got {list(arrays[name].shape)}")
        check_edges(arrays["edges"])
        return cls(names, arrays["edges"].float(), arrays["tokens"], arrays["firing"], counts, smoothing)


class HistogramStream:
    """Collects :class:`Densities` batch by batch, in any order; streams of the same classes and edges may be merged.

    Args:
        classes: names, at least two.
        edges: ``[n, 2]``, from :meth:`~interventions.concepts.moments.Moments.edges` of a first pass, or given. Values outside
            are counted in the first or last bin, never dropped.
        n_bins: nb ≥ 1.

    Raises:
        ValueError: edges that are not finite or not increasing.
    """

    def __init__(self, classes: Sequence[str], edges: Tensor, n_bins: int = N_BINS) -> None:
        self.classes = class_names(classes)
        if n_bins < 1:
            raise ValueError(f"n_bins: expected at least 1, got {n_bins}")
        self.edges = check_edges(edges).to("cpu", torch.float32)
        self.n_bins = n_bins
        self.n_features = len(edges)
        self._low, self._inverse_width = bin_scale(self.edges, n_bins)
        k = len(self.classes)
        self._tokens = torch.zeros(k, dtype=torch.int64)
        self._counts = torch.zeros(k * self.n_features * n_bins, dtype=torch.int64)

    def add(self, activations: Tensor, labels: Tensor | int, mask: Tensor | None = None) -> None:
        """Add a batch, as :meth:`interventions.concepts.moments.MomentStream.add` takes it."""
        self.count(firings(activations, labels, mask, len(self.classes), self.n_features))

    def count(self, hits: Firings) -> None:
        """Add a batch of which the positive entries are known already."""
        f = hits.feature
        place = bin_index(hits.value, self._low[f], self._inverse_width[f], self.n_bins)
        cell = (hits.label * self.n_features + f) * self.n_bins + place
        self._tokens += hits.tokens
        self._counts.index_add_(0, cell, torch.ones_like(cell))

    def merge(self, other: HistogramStream) -> None:
        """Add everything that ``other`` has seen."""
        same = (other.classes, other.n_bins) == (self.classes, self.n_bins) and torch.equal(other.edges, self.edges)
        if not same:
            raise ValueError("only streams of the same classes, edges and bins can be merged")
        self._tokens += other._tokens
        self._counts += other._counts

    def densities(self, smoothing: float = SMOOTHING) -> Densities:
        """What was seen so far; later batches do not change it. ``smoothing`` ≥ 0 is added to every bin's count."""
        if not 0 <= smoothing < float("inf"):
            raise ValueError(f"smoothing: expected a finite number ≥ 0, got {smoothing}")
        counts = self._counts.clone().view(len(self.classes), self.n_features, self.n_bins)
        return Densities(self.classes, self.edges, self._tokens.clone(), counts.sum(dim=-1), counts, smoothing)


def check_edges(edges: Tensor) -> Tensor:
    """``edges`` themselves, if they are ``[n, 2]``, finite and increasing; else ``ValueError`` naming the latent."""
    if edges.ndim != 2 or edges.shape[1] != 2:
        raise ValueError(f"edges: expected [latents, 2], got shape {list(edges.shape)}")
    bad = ~(edges.isfinite().all(dim=1) & (edges[:, 0] < edges[:, 1]))
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(f"edges[{row}]: expected two finite numbers, low < high, got {edges[row].tolist()}")
    return edges


def _deviation(counts: Tensor, place: Tensor) -> Tensor:
    """Standard deviation of the bin number under ``counts`` ``[..., nb]``: float64 ``[...]``."""
    size = counts.sum(dim=-1).clamp(min=1)
    mean = (counts * place).sum(dim=-1) / size
    return ((counts * (place - mean[..., None]) ** 2).sum(dim=-1) / size).sqrt()
