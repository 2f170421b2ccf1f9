"""Labelled activations whose densities are known."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from interventions.concepts.concept import Concept
from interventions.concepts.density import SMOOTHING, Densities, HistogramStream
from interventions.concepts.moments import Moments, MomentStream
from sae_weights.sae import SAE

CLASSES = ("sports", "world", "background")


def fitted(
    batches: Sequence[tuple[Tensor, Tensor]],
    classes: Sequence[str],
    n_bins: int = 100,
    edges: Tensor | None = None,
    smoothing: float = SMOOTHING,
) -> tuple[Moments, Densities]:
    """Both passes over ``(activations [t, n], labels [t])``."""
    first = MomentStream(classes, batches[0][0].shape[1])
    for activations, labels in batches:
        first.add(activations, labels)
    second = HistogramStream(classes, first.moments().edges() if edges is None else edges, n_bins)
    for activations, labels in batches:
        second.add(activations, labels)
    return first.moments(), second.densities(smoothing)


def per_class(columns: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """One batch per class, of one latent's values."""
    return [(values[:, None], torch.full((len(values),), c)) for c, values in enumerate(columns)]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sparse_batch(seed: int, tokens: int = 400, n: int = 6, k: int = 3) -> tuple[Tensor, Tensor]:
    """Zero-inflated values whose rate and size differ by class and latent."""
    rng = generator(seed)
    labels = torch.randint(0, k, (tokens,), generator=rng)
    rate = 0.05 + 0.9 * torch.rand(k, n, generator=generator(99))
    size = 0.5 + 4 * torch.rand(k, n, generator=generator(98))
    fires = torch.rand(tokens, n, generator=rng) < rate[labels]
    values = (size[labels] + 0.5 * torch.randn(tokens, n, generator=rng)).clamp(min=0.01)
    return torch.where(fires, values, 0.0), labels


def gaussian_pair(tokens: int = 20_000) -> tuple[Tensor, Tensor]:
    """Draws of N(3, 1), another class, and N(6, 1), the concept; the 0.1 % that are not positive are dropped."""
    other = 3 + torch.randn(tokens, generator=generator(1))
    target = 6 + torch.randn(tokens, generator=generator(2))
    return other[other > 0], target[target > 0]


def made_concept(
    sae: SAE,
    layer: int,
    *,
    latents: Sequence[int] = (1, 3, 4, 7, 12, 20),
    n_bins: int = 20,
    width: float = 3.0,
    seed: int = 0,
    model: str = "m",
) -> Concept:
    """A concept of these latents (ascending) with random posteriors on about [0, width], and μ ± 2σ inside that."""
    rng = generator(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=rng)

    n = len(latents)
    low = 0.1 * width * uniform(n)
    return Concept(
        sae_digest=sae.digest,
        layer=layer,
        model=model,
        target="sports",
        classes=CLASSES,
        background="background",
        features=torch.tensor(list(latents)),
        edges=torch.stack([low, low + width * (0.5 + uniform(n))], dim=1),
        posterior=uniform(n, n_bins),
        separability=uniform(n),
        scores=uniform(n),
        tokens=torch.tensor([100, 100, 100]),
        firing=torch.randint(1, 100, (3, n), generator=rng),
        mean=width * (0.2 + 0.3 * uniform(3, n)),
        std=width * 0.1 * uniform(3, n),
        priors=torch.full((3,), 1 / 3),
        by="difference",
        max_rate=0.1,
    )
