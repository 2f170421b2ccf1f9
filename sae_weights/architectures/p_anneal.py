"""p-annealed SAE: the exponent of its sparsity norm falls during training. Karvonen et al. 2024, arXiv:2408.00113."""

from __future__ import annotations

from .relu import ReLU


class PAnneal(ReLU):
    """f = relu(W_enc · x̃ + b_enc).

    The penalty Σ|f|^p starts at p = 1 and ends near p = 0, closer to a count of the active latents. Only the loss
    changes: the published trainer optimises the plain ReLU dictionary, and what it saves is one.
    """

    name = "p_anneal"
    title = "p-anneal"
    reference = "Karvonen et al. 2024, arXiv:2408.00113; dictionary_learning, trainers/p_anneal.py"
