"""End-to-end SAE: trained on what it does to the model's output. Braun et al. 2024, arXiv:2405.12241."""

from __future__ import annotations

from .relu import ReLU


class EndToEnd(ReLU):
    """f = relu(W_enc · x + b_enc), x̂ = f · W_dec + b_dec.

    The loss compares the model's output, and later layers, with and without the reconstruction; that is over at
    inference. The authors' code divides decoder rows by their norm at every forward pass: a loader does it once
    (``Folding(unit_decoder=True)``).
    """

    name = "e2e"
    title = "End-to-end"
    reference = "Braun et al. 2024, arXiv:2405.12241; e2e_sae"
