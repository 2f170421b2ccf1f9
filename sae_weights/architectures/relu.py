"""ReLU ("standard") SAE: f = relu(p). Bricken et al. 2023, Towards Monosemanticity."""

from __future__ import annotations

from .base import BiasOnly


class ReLU(BiasOnly):
    """f = relu(W_enc · x̃ + b_enc)."""

    name = "relu"
    kind = "relu"
    title = "ReLU (standard)"
    reference = "Bricken et al. 2023, Towards Monosemanticity"
    gate_tensors = ("b_enc",)
