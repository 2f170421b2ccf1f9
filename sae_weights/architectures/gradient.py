"""Gradient SAE (g-SAE): training prefers latents that matter to the model's output. Olmo et al. 2024, arXiv:2411.10397."""

from __future__ import annotations

from .topk import TopK


class Gradient(TopK):
    """f = relu(p) for the k largest p of a token.

    Training ranks latents by p + β · p · |d_j · ∇_x L| and keeps the values p. At inference there is no loss L whose
    gradient could be taken, so the ranking is that of TopK. No code was found: this inference rule is reconstructed.
    """

    name = "gradient"
    title = "Gradient (g-SAE)"
    reference = "Olmo et al. 2024, arXiv:2411.10397 (inference rule reconstructed)"
