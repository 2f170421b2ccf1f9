"""JumpReLU SAE: a ReLU with a threshold per feature. Rajamanoharan et al. 2024, arXiv:2407.14435, equation 4."""

from __future__ import annotations

from .base import BiasOnly


class JumpReLU(BiasOnly):
    """f = relu(p) · 1[p > threshold], p = W_enc · x̃ + b_enc; the comparison is strict."""

    name = "jumprelu"
    kind = "jumprelu"
    title = "JumpReLU"
    reference = "Rajamanoharan et al. 2024, arXiv:2407.14435"
    gate_tensors = ("b_enc", "threshold")
