"""What is known of each latent and class after one pass over labelled tokens: counts, sums, extremes.

Activations are zero-inflated: a latent *fires* on a token where its activation is above zero. Means and standard deviations
that describe firing are taken over positive activations only (on all tokens the zeros dominate, and μ ± 2σ ends below typical
values); ``mean_activation`` is the one that counts the zeros too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_NARROWEST = 1e-30
"""Smallest range: its inverse, times any number of bins, is a float32."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over tokens, k classes × n latents.

    Attributes:
        classes: names, k of them.
        tokens: int64 ``[k]``, tokens of each class, firing or not.
        firing: int64 ``[k, n]``, tokens on which the latent fires.
        total, squares: float64 ``[k, n]``, Σ a and Σ a².
        low, high: float32 ``[n]``, smallest and largest positive activation over all classes; +∞ and −∞ where there is none.
    """

    classes: tuple[str, ...]
    tokens: Tensor
    firing: Tensor
    total: Tensor
    squares: Tensor
    low: Tensor
    high: Tensor

    @property
    def n_features(self) -> int:
        """n."""
        return self.firing.shape[1]

    @property
    def firing_rate(self) -> Tensor:
        """q_c = firing / tokens, float64 ``[k, n]``; 0 for a class without tokens."""
        return self.firing.double() / self.tokens.clamp(min=1).double()[:, None]

    @property
    def mean_activation(self) -> Tensor:
        """Σ a / tokens, zeros included, float64 ``[k, n]``; 0 for a class without tokens."""
        return self.total / self.tokens.clamp(min=1).double()[:, None]

    @property
    def mean(self) -> Tensor:
        """μ of the positive activations, float64 ``[k, n]``; 0 where the latent never fires."""
        return self.total / self.firing.clamp(min=1).double()

    @property
    def std(self) -> Tensor:
        """σ (ddof 0) of the positive activations, float64 ``[k, n]``; 0 where the latent never fires."""
        variance = self.squares / self.firing.clamp(min=1).double() - self.mean**2
        return variance.clamp(min=0).sqrt()

    def edges(self, margin: float = 0.01) -> Tensor:
        """Ends of the range of each latent, widened by ``margin`` of it on both sides: float32 ``[n, 2]``, low < high.

        A latent with a single positive value v gets v ± ``margin``·v; one that never fires gets [0, 1].
        """
        if not margin > 0:
            raise ValueError(f"margin: expected a positive share of the range, got {margin}")
        low, high = self.low.double(), self.high.double()
        fired = low <= high
        low, high = torch.where(fired, low, 0.0), torch.where(fired, high, 1.0)
        room = margin * torch.where(high > low, high - low, high)
        room = torch.where(fired, room, 0.0)
        low, high = low - room, high + room
        return torch.stack([low, torch.maximum(high, low + _NARROWEST)], dim=1).float()

    def select(self, features: Tensor) -> Moments:
        """The same of some latents, by index."""
        return Moments(
            self.classes,
            self.tokens,
            self.firing[:, features],
            self.total[:, features],
            self.squares[:, features],
            self.low[features],
            self.high[features],
        )


class MomentStream:
    """Collects :class:`Moments` batch by batch. Batches may come in any order, and streams may be merged.

    Counts and extremes do not depend on the order at all, sums only in the last bits of float64.
    """

    def __init__(self, classes: Sequence[str], n_features: int) -> None:
        self.classes = class_names(classes)
        k, n = len(self.classes), n_features
        self._tokens = torch.zeros(k, dtype=torch.int64)
        self._firing = torch.zeros(k * n, dtype=torch.int64)
        self._total = torch.zeros(k * n, dtype=torch.float64)
        self._squares = torch.zeros(k * n, dtype=torch.float64)
        self._low = torch.full((n,), torch.inf)
        self._high = torch.full((n,), -torch.inf)
        self.n_features = n

    def add(self, activations: Tensor, labels: Tensor | int, mask: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            activations: ``[tokens, n]``, any floating dtype; ≥ 0 and finite where ``mask`` holds.
            labels: class index of each token, ``[tokens]``, or one for all.
            mask: bool ``[tokens]``, which tokens count. Position 0 and outlier tokens are for the caller to leave out.

        Raises:
            ValueError: shapes, a label without a class, an activation that is negative or not finite.
        """
        self.count(firings(activations, labels, mask, len(self.classes), self.n_features))

    def count(self, hits: Firings) -> None:
        """Add a batch of which the positive entries are known already."""
        cell = hits.label * self.n_features + hits.feature
        value = hits.value.double()
        self._tokens += hits.tokens
        self._firing.index_add_(0, cell, torch.ones_like(cell))
        self._total.index_add_(0, cell, value)
        self._squares.index_add_(0, cell, value * value)
        self._low.scatter_reduce_(0, hits.feature, hits.value, "amin")
        self._high.scatter_reduce_(0, hits.feature, hits.value, "amax")

    def merge(self, other: MomentStream) -> None:
        """Add everything that ``other`` has seen."""
        if (other.classes, other.n_features) != (self.classes, self.n_features):
            raise ValueError("only streams of the same classes and latents can be merged")
        self._tokens += other._tokens
        self._firing += other._firing
        self._total += other._total
        self._squares += other._squares
        self._low = torch.minimum(self._low, other._low)
        self._high = torch.maximum(self._high, other._high)

    def moments(self) -> Moments:
        """What was seen so far; later batches do not change it."""
        shape = (len(self.classes), self.n_features)
        return Moments(
            self.classes,
            self._tokens.clone(),
            self._firing.clone().view(shape),
            self._total.clone().view(shape),
            self._squares.clone().view(shape),
            self._low.clone(),
            self._high.clone(),
        )


@dataclass(frozen=True, eq=False)
class Firings:
    """The positive entries of a batch, on the CPU.

    Attributes:
        tokens: int64 ``[k]``, tokens that count, by class.
        label, feature: int64 ``[m]``, class and latent of each entry.
        value: float32 ``[m]``, > 0.
    """

    tokens: Tensor
    label: Tensor
    feature: Tensor
    value: Tensor

    @classmethod
    def of(cls, label: int, n_classes: int, n_tokens: int, feature: Tensor, value: Tensor) -> Firings:
        """``n_tokens`` tokens of one class with the non-zero activations ``value`` of latents ``feature``, ``[m]`` each.

        Raises:
            ValueError: a value that is negative or not finite, a label that is no class.
        """
        if not 0 <= label < n_classes:
            raise ValueError(f"labels: {label} is not a class; there are 0..{n_classes - 1}")
        value = value.to("cpu", torch.float32)
        _check_values(value)
        tokens = torch.zeros(n_classes, dtype=torch.int64)
        tokens[label] = n_tokens
        kept = value > 0
        feature = feature.to("cpu", torch.int64)[kept]
        return cls(tokens, torch.full_like(feature, label), feature, value[kept])


def concatenate(batches: Sequence[Firings]) -> Firings:
    """All batches as one; at least one."""
    return Firings(
        torch.stack([batch.tokens for batch in batches]).sum(dim=0),
        torch.cat([batch.label for batch in batches]),
        torch.cat([batch.feature for batch in batches]),
        torch.cat([batch.value for batch in batches]),
    )


def firings(activations: Tensor, labels: Tensor | int, mask: Tensor | None, n_classes: int, n_features: int) -> Firings:
    """Read a batch as :meth:`MomentStream.add` describes it."""
    if activations.ndim != 2 or activations.shape[1] != n_features:
        raise ValueError(f"activations: expected [tokens, {n_features}], got shape {list(activations.shape)}")
    n = len(activations)
    if isinstance(labels, int):
        labels = torch.full((n,), labels, dtype=torch.int64)
    for name, given in (("labels", labels), ("mask", mask)):
        if given is not None and given.shape != (n,):
            raise ValueError(f"{name}: expected one entry per token ([{n}]), got shape {list(given.shape)}")
    labels = labels.to("cpu", torch.int64)
    if mask is not None:
        if mask.dtype is not torch.bool:
            raise ValueError(f"mask: expected booleans, got {mask.dtype}")
        activations, labels = activations[mask.to(activations.device)], labels[mask.cpu()]
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < n_classes:
        wrong = next(label for label in labels.tolist() if not 0 <= label < n_classes)
        raise ValueError(f"labels: {wrong} is not a class; there are 0..{n_classes - 1}")
    token, feature = activations.detach().nonzero(as_tuple=True)
    value = activations.detach()[token, feature].to("cpu", torch.float32)
    _check_values(value)
    counts = torch.bincount(labels, minlength=n_classes)
    # A value below float32's smallest number is no longer positive here; it did not fire.
    kept = value > 0
    return Firings(counts, labels[token.cpu()][kept], feature.cpu()[kept], value[kept])


def _check_values(value: Tensor) -> None:
    if not bool(value.isfinite().all()):
        raise ValueError("activations: a value is not finite")
    if bool((value < 0).any()):
        raise ValueError(
            "activations: a value is negative; densities of positive values need an SAE whose latents never are"
        )


def class_names(classes: Sequence[str]) -> tuple[str, ...]:
    """The names of at least two classes, all different.

    Raises:
        ValueError: fewer than two, or one twice.
    """
    names = tuple(classes)
    if len(names) < 2:
        raise ValueError(f"classes: needs at least two, got {len(names)}")
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"classes: {twice!r} is named twice")
    return names
