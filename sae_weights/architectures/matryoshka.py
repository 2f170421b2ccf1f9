"""Matryoshka SAE: nested groups of latents, each prefix a dictionary of its own. Bussmann et al. 2025, arXiv:2503.17547."""

from __future__ import annotations

from .jumprelu import JumpReLU


class Matryoshka(JumpReLU):
    """f = relu(p) · 1[p > θ], the BatchTopK form: training estimated θ and it is broadcast to every feature.

    The loss sums the reconstructions by the first group, the first two groups …, so that early latents are general and
    late ones specific; at inference all groups are used. ``group_sizes`` names them, in order of the features, and
    ``SAE.prefix`` keeps the first few. Groups decide nothing about f, so they stay out of the digest: the same function
    of the same tensors as a JumpReLU, with the same digest.
    """

    name = "matryoshka"
    title = "Matryoshka (BatchTopK)"
    reference = "Bussmann et al. 2025, arXiv:2503.17547"
    settings = {"group_sizes": []}  # noqa: RUF012
    described = ("group_sizes",)
