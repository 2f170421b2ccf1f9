"""Structured SAE: training asks for latents that are sparse plus low-rank. Liu et al. 2025, arXiv:2503.08980."""

from __future__ import annotations

from .relu import ReLU


class Structured(ReLU):
    """f = relu(W_enc · x̃ + b_enc).

    The loss splits the latents of a batch into a sparse and a low-rank part and penalises |·|^p of the one (p annealed)
    and the nuclear norm of the other. Both are penalties on a batch; encoder and decoder stay those of a ReLU
    dictionary. No code was found: this inference rule is reconstructed from the paper.
    """

    name = "structured"
    title = "Structured (sparse + low-rank)"
    reference = "Liu et al. 2025, arXiv:2503.08980 (inference rule reconstructed)"
